"""Loading of weights from a folder, a pipeline's folder or the hub's cache: precision and identity."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from repa.autoencoders import AUTOENCODERS, load_autoencoder
from repa.base.errors import UserError
from tests.autoencoders.folders import save_kl, save_tiny

SPECS = {"sdxl-vae": "kl", "sd3-vae": "kl", "flux-vae": "kl", "dc-ae-f32": "dc", "taesdxl": "tiny", "taef1": "tiny"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache in its client's layout; repository() adds a folder."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def repository(name, source, subfolder=""):
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, root / "snapshots" / ("0" * 40) / subfolder, dirs_exist_ok=True)

    return repository


def test_any_kl_autoencoder_loads_by_its_hub_name(hub, kl_folder, images, tmp_path):
    other = save_kl(tmp_path / "other", seed=1)
    hub("owner/pipeline.v1-0", kl_folder, "vae")
    hub("owner/plain", other)
    for spec, folder in [("kl:hub=owner/pipeline.v1-0,subfolder=vae", kl_folder), ("kl:hub=owner/plain", other)]:
        assert AUTOENCODERS.check(spec) == spec
        autoencoder, expected = load_autoencoder(spec), load_autoencoder("kl", weights=folder)
        assert autoencoder.name == autoencoder.identity["name"] == spec
        assert {**autoencoder.identity, "name": "kl"} == expected.identity
        assert torch.equal(autoencoder.encode(images), expected.encode(images))
    with pytest.raises(UserError, match="no setting 'hubb'.*Did you mean 'hub'"):
        AUTOENCODERS.check("kl:hubb=owner/plain")
    with pytest.raises(UserError, match=r"owner/none.* could not be downloaded .* of its folder vae"):
        load_autoencoder("kl:hub=owner/none,subfolder=vae")
    with pytest.raises(UserError, match="'kl' needs weights: .*'kl:hub=owner/name,subfolder=vae'"):
        load_autoencoder("kl")


@pytest.mark.parametrize(
    ("name", "repository", "subfolder"),
    [
        ("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse", ""),
        ("sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema", ""),
        ("sdxl-vae", "stabilityai/sdxl-vae", ""),
        ("sd3-vae", "stabilityai/stable-diffusion-3-medium-diffusers", "vae"),
        ("flux-vae", "black-forest-labs/FLUX.1-dev", "vae"),
        ("dc-ae-f32", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", ""),
        ("taesd", "madebyollin/taesd", ""),
        ("taesdxl", "madebyollin/taesdxl", ""),
        ("taesd3", "madebyollin/taesd3", ""),
        ("taef1", "madebyollin/taef1", ""),
    ],
)
def test_every_name_has_its_repository(name, repository, subfolder, hub, kl_folder, tiny_folder, dc_folder):
    with pytest.raises(UserError, match=rf"{name!r} \({repository}\) .*could not be downloaded"):
        load_autoencoder(name)
    folder = dc_folder if name == "dc-ae-f32" else tiny_folder if name.startswith("tae") else kl_folder
    hub(repository, folder, subfolder)
    assert load_autoencoder(name).identity["name"] == name


def test_a_downloaded_pipeline_or_its_vae_folder_loads(kl_folder, tmp_path):
    shutil.copytree(kl_folder, tmp_path / "vae")
    alone = load_autoencoder("sd3-vae", weights=tmp_path / "vae").identity
    assert load_autoencoder("sd3-vae", weights=tmp_path).identity == alone
    assert load_autoencoder("kl:subfolder=vae", weights=tmp_path).identity["sha256"] == alone["sha256"]
    with pytest.raises(UserError, match="holds no config.json"):
        load_autoencoder("sdxl-vae", weights=tmp_path)


def test_weights_without_quant_conv_load(tmp_path, images):
    """SD3 and FLUX have no quant_conv: the encoder's last convolution gives the moments."""
    from diffusers import AutoencoderKL

    folder = save_kl(tmp_path, use_quant_conv=False, use_post_quant_conv=False, latent_channels=16)
    autoencoder = load_autoencoder("flux-vae", weights=folder)
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    moments = autoencoder.encode(images)
    with torch.no_grad():
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    assert moments.shape == (2, 32, 4, 6)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], 1))
    assert all(key.startswith("encoder.") for key in autoencoder.encoder_weights())


@pytest.mark.parametrize(("name", "kind"), SPECS.items())
def test_half_precision_weights_compute_in_float32(name, kind, images, tmp_path, request):
    folder = shutil.copytree(request.getfixturevalue(f"{kind}_folder"), tmp_path / name)
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    autoencoder = load_autoencoder(name, weights=folder)
    assert {p.dtype for p in autoencoder.parameters()} == {torch.float32}
    decoded = autoencoder.decode(autoencoder.sample(autoencoder.encode(images)))
    assert (decoded.dtype, decoded.shape) == (torch.uint8, images.shape)


@pytest.mark.parametrize(("name", "kind"), SPECS.items())
def test_a_folder_of_another_family_is_refused(name, kind, kl_folder, tiny_folder, dc_folder):
    for other, folder in (("kl", kl_folder), ("tiny", tiny_folder), ("dc", dc_folder)):
        if other == kind:
            assert load_autoencoder(name, weights=folder).name == name
        else:
            held = json.loads((folder / "config.json").read_text())["_class_name"]
            with pytest.raises(UserError, match=f"type {held!r}, but the autoencoder {name!r} is of type 'Autoencoder"):
                load_autoencoder(name, weights=folder)


@pytest.mark.parametrize(("name", "kind"), SPECS.items())
def test_a_missing_file_is_named(name, kind, tmp_path, request):
    folder = shutil.copytree(request.getfixturevalue(f"{kind}_folder"), tmp_path / name)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        UserError, match=f"holds no diffusion_pytorch_model.safetensors, which the autoencoder {name!r} needs"
    ):
        load_autoencoder(name, weights=folder)


@pytest.mark.parametrize("place", ["{}/nowhere", "./nowhere", "../nowhere"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(place, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    source = place.format(tmp_path)
    with pytest.raises(UserError, match=f"There is no folder {source}"):
        load_autoencoder("sd-vae-ft-ema", weights=source)


def test_identities_differ_when_encoder_weights_differ(tmp_path):
    identities = [
        load_autoencoder("taesd", weights=save_tiny(tmp_path / str(seed), seed=seed)).identity["sha256"]
        for seed in (0, 1, 0)
    ]
    assert identities[0] == identities[2] != identities[1]


def test_a_folder_with_two_sets_of_weights_is_refused(kl_folder, tmp_path):
    """diffusers reads the parts of an index, where other libraries read the single file."""
    folder = shutil.copytree(kl_folder, tmp_path / "kl")
    single, index = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
    weights = load_file(folder / single)
    entries = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(weights, "other.safetensors")}
    (folder / index).write_text(json.dumps(entries))
    save_file({name: value + 1 for name, value in weights.items()}, folder / "other.safetensors")
    with pytest.raises(UserError, match=f"holds {single} and {index}, which may hold different weights: remove one"):
        load_autoencoder("kl", weights=folder)
    (folder / single).unlink()
    parts = load_autoencoder("kl", weights=folder)
    assert torch.equal(parts.vae.state_dict()["encoder.conv_in.weight"], weights["encoder.conv_in.weight"] + 1)
