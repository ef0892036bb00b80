import json
import os
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError

SCALE, SHIFT = 0.3611, 0.1159  # of the fixture


def copy_of(folder, tmp_path, change):
    """A copy of the folder with its weights changed by `change`."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(path)), path)
    return copy


def test_moments_are_mean_and_deviation_of_the_posterior(kl_folder, images):
    from diffusers import AutoencoderKL

    autoencoder = load_autoencoder("kl", weights=kl_folder)
    moments = autoencoder.encode(images)
    assert (autoencoder.channels, autoencoder.factor) == (5, 4)
    assert moments.shape == (2, 10, 4, 6)
    vae = AutoencoderKL.from_pretrained(kl_folder, local_files_only=True, low_cpu_mem_usage=False)
    with torch.no_grad():
        parameters = vae.quant_conv(vae.encoder(images.float() / 127.5 - 1))
    mean, log_variance = parameters.chunk(2, dim=1)
    torch.testing.assert_close(moments[:, :5], mean)
    torch.testing.assert_close(moments[:, 5:], log_variance.clamp(-30, 20).exp().sqrt())


def test_latents_use_shift_and_scale_of_the_folder(kl_folder, images):
    autoencoder = load_autoencoder("kl", weights=kl_folder)
    moments = autoencoder.encode(images)
    mean, std = moments[:, :5], moments[:, 5:]
    noise = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = (mean + std * noise - SHIFT) * SCALE
    torch.testing.assert_close(autoencoder.sample(moments, noise=noise), expected)
    drawn = autoencoder.sample(moments, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, expected)
    with torch.no_grad():
        pixels = autoencoder.vae.decode(mean).sample
    decoded = autoencoder.decode((mean - SHIFT) * SCALE)
    torch.testing.assert_close(decoded.float(), (127.5 * pixels + 127.5).clamp(0, 255).round(), atol=1, rtol=0)
    assert (decoded.float() - (127.5 * pixels + 127.5).clamp(0, 255)).abs().max() < 0.51


def test_half_precision_moments_give_float32_latents(kl_folder):
    autoencoder = load_autoencoder("kl", weights=kl_folder)
    moments = torch.ones(1, 10, 2, 2, dtype=torch.float16)
    latents = autoencoder.sample(moments, noise=torch.zeros(1, 5, 2, 2))
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, torch.full((1, 5, 2, 2), (1 - SHIFT) * SCALE))


def test_it_is_frozen_in_eval_mode_and_ignores_autocast(kl_folder, images):
    autoencoder = load_autoencoder("kl", weights=kl_folder).train()
    assert not any(module.training for module in autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    moments = autoencoder.encode(images)
    latents = autoencoder.sample(moments, torch.Generator().manual_seed(0))
    decoded = autoencoder.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoencoder.encode(images), moments)
        assert torch.equal(autoencoder.decode(latents), decoded)


def test_the_identity_depends_on_the_encoder_only(kl_folder, tmp_path):
    identity = load_autoencoder("sd-vae-ft-mse", weights=kl_folder).identity
    assert identity["name"] == "sd-vae-ft-mse"
    assert (identity["scale"], identity["shift"]) == (SCALE, SHIFT)
    assert json.loads(json.dumps(identity)) == identity

    def with_changed(name):
        changed = copy_of(kl_folder, tmp_path / name, lambda state: {**state, name: state[name] + 1})
        return load_autoencoder("sd-vae-ft-ema", weights=changed).identity["sha256"]

    assert with_changed("decoder.conv_in.bias") == identity["sha256"]
    assert with_changed("encoder.conv_in.bias") != identity["sha256"]
    assert with_changed("quant_conv.weight") != identity["sha256"]


def test_wrong_inputs_are_refused(kl_folder, images):
    autoencoder = load_autoencoder("kl", weights=kl_folder)
    for given, message in [
        (images.float() / 255, r"float32 \(2, 3, 16, 24\)"),
        (images.permute(0, 2, 3, 1), r"uint8 \(2, 16, 24, 3\)"),
        (images[0], r"uint8 \(3, 16, 24\)"),
        (images[..., :22], "multiples of 4, but got 16 x 22"),
    ]:
        with pytest.raises(UserError, match=message):
            autoencoder.encode(given)
    with pytest.raises(UserError, match=r"moments as floats \(N, 10, h, w\), but got float32 \(2, 5, 4, 4\)"):
        autoencoder.sample(torch.zeros(2, 5, 4, 4))
    with pytest.raises(UserError, match=r"latents as floats \(N, 5, h, w\), but got float32 \(2, 10, 4, 4\)"):
        autoencoder.decode(torch.zeros(2, 10, 4, 4))


def test_folders_that_cannot_be_loaded_are_refused(kl_folder, tiny_folder, tmp_path):
    def fails(message, weights, spec="sd-vae-ft-mse"):
        with pytest.raises(UserError, match=message):
            load_autoencoder(spec, weights=weights)

    def without(state):
        return {key: value for key, value in state.items() if key != "encoder.conv_in.bias"}

    fails("of type 'AutoencoderTiny'", tiny_folder)
    fails("does not fit.*encoder.conv_in.bias", copy_of(kl_folder, tmp_path / "missing", without))
    reshaped = copy_of(kl_folder, tmp_path / "shape", lambda s: {**s, "encoder.conv_in.weight": torch.zeros(1)})
    fails("size mismatch", reshaped)
    empty = tmp_path / "empty"
    empty.mkdir()
    fails("empty holds no config.json", empty)
    cut = copy_of(kl_folder, tmp_path / "cut", lambda state: state) / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    fails("cannot be read as a file of weights: it ends within its header", cut.parent)
    cut = copy_of(kl_folder, tmp_path / "half", lambda state: state) / "diffusion_pytorch_model.safetensors"
    os.truncate(cut, cut.stat().st_size // 2)
    fails(r"it has [\d,]+ bytes, but its header describes [\d,]+\. Download", cut.parent)
    fails("'kl' needs weights", None, spec="kl")


def test_without_network_the_error_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'sd-vae-ft-ema' \(nobody/not-a-repository\).*as --autoencoder-weights"):
        load_autoencoder("sd-vae-ft-ema", weights="nobody/not-a-repository")


def test_missing_and_broken_diffusers_are_reported(monkeypatch, kl_folder):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    for module, said in ((None, r'pip install "repa\[latents\]"'), (Broken("diffusers"), "remove a torchvision")):
        monkeypatch.setitem(sys.modules, "diffusers", module)
        with pytest.raises(UserError, match=said):
            load_autoencoder("kl", weights=kl_folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda x: x * float("nan"), "weights of the autoencoder 'kl' have numbers that are not finite, in vae"),
        (lambda x: x.to(torch.float8_e4m3fn), "the type 'F8_E4M3'. Give weights of 16 or 32 bits"),
        (lambda x: (100 * x).to(torch.int8), "the type 'I8'"),
        (lambda x: x > 0, "the type 'BOOL'"),
    ],
)
def test_non_finite_and_quantised_weights_are_refused(changed, message, kl_folder, tmp_path):
    """diffusers converts every type to float32, so quantised weights would silently give other latents."""
    folder = copy_of(kl_folder, tmp_path, lambda state: {key: changed(value) for key, value in state.items()})
    with pytest.raises(UserError, match=message):
        load_autoencoder("kl", weights=folder)


def test_a_flipped_bit_in_a_pickled_file_is_found(kl_folder, tmp_path):
    """Neither diffusers nor torch verifies the checksums of such a file."""
    folder = copy_of(kl_folder, tmp_path, lambda state: state)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    path = folder / "diffusion_pytorch_model.bin"
    torch.save(state, path)
    load_autoencoder("kl", weights=folder)
    data = bytearray(path.read_bytes())
    data[data.index(state["encoder.conv_in.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"the tensor 'encoder\.conv_in\.weight' does not match its checksum"):
        load_autoencoder("kl", weights=folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"scaling_factor": 0}, {"scaling_factor": True}, {"scaling_factor": 1e300}, {"shift_factor": "x"},
        {"shift_factor": None, "latents_mean": [0] * 5, "latents_std": [1, 1, 1, 1, "x"]},
        {"shift_factor": None, "latents_mean": 0, "latents_std": 1},
    ],
)  # fmt: skip
def test_invalid_scales_are_refused(changed, kl_folder, tmp_path):
    folder = copy_of(kl_folder, tmp_path, lambda state: state)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(UserError, match=r"config\.json of .* [Cc]orrect it"):
        load_autoencoder("kl", weights=folder)
