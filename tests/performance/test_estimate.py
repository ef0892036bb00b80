"""The cost of runs against formulas, published figures, and the memory that autograd really keeps."""

import functools

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repa.alignment.config import AlignmentConfig
from repa.base.errors import UserError
from repa.cli.main import run
from repa.models import build
from repa.models.config import ModelConfig
from repa.models.cost import model_cost
from repa.performance import estimate as estimates
from repa.performance.costs import autoencoder_cost, encoder_cost
from repa.performance.counts import activation_bytes, saved_bytes
from repa.performance.estimate import estimate, passes_of
from repa.recipes import load_recipe
from repa.training.config import TrainConfig
from tests.calls import call
from tests.oracles.cost import dit_forward, vit_forward

IMAGENET = 1_281_167


@pytest.fixture(scope="module", autouse=True)
def _counted_once():
    """Count each network once for all tests, because counting takes a second."""
    counted = {name: getattr(estimates, name) for name in ("encoder_cost", "autoencoder_cost", "model_cost")}
    for name, function in counted.items():
        setattr(estimates, name, functools.cache(function))
    yield
    for name, function in counted.items():
        setattr(estimates, name, function)


def sit(name: str) -> ModelConfig:
    return ModelConfig(name=name, latent_size=32, latent_channels=4, num_classes=1000)


def aligned(name: str, *targets: str, **changes) -> TrainConfig:
    alignments = tuple(AlignmentConfig(target=target, depth=4) for target in targets)
    return TrainConfig(model=ModelConfig(name=name), alignments=alignments, autoencoder="sd-vae-ft-mse", **changes)


def estimated(config: TrainConfig, **changes):
    settings = {"num_images": IMAGENET, "num_devices": 8, "resolution": 256, "rate": 1e14, "num_classes": 1000}
    return estimate(config, **{**settings, **changes})


@pytest.fixture(scope="module")
def base():
    return estimated(aligned("SiT-B/2", "dinov2-b", precision="fp32", parallel="ddp"))


@pytest.mark.parametrize(
    ("name", "width", "depth", "millions"),
    [("SiT-S/2", 384, 12, 33), ("SiT-B/2", 768, 12, 130), ("SiT-XL/2", 1152, 28, 675)],
)
def test_network_cost_matches_the_formula_and_the_paper(name, width, depth, millions):
    cost = estimates.model_cost(sit(name))
    assert cost.forward == dit_forward(width, depth, 256, 16, 16)
    assert cost.training / cost.forward == pytest.approx(3, rel=1e-3)  # without the gradient of the input
    assert round(cost.parameters / 1e6) == millions


def test_network_cost_matches_torchs_counter():
    config = ModelConfig(
        name="SiT-S/4", hidden_dim=32, depth=2, num_heads=2, latent_size=8, latent_channels=4, qk_norm="layer"
    )
    model = build(config)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # torch does not count the CPU's fused kernel
        call(
            model, torch.randn(1, 4, 8, 8), torch.rand(1), torch.zeros(1, dtype=torch.int64)
        ).prediction.sum().backward()
    cost = model_cost(config)
    assert cost.training == counter.get_total_flops()
    assert cost.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "width", "depth", "prefix", "patch", "gigaflops"),
    [("dinov2-s", 384, 12, 1, 14, 12), ("dinov2-b", 768, 12, 1, 14, 46), ("dinov2-l", 1024, 24, 1, 14, 162),
     ("dinov2-reg-b", 768, 12, 5, 14, 47), ("siglip-b", 768, 12, 0, 16, 46), ("ijepa-h", 1280, 32, 0, 14, 333)],
)  # fmt: skip
def test_encoder_cost_matches_the_formula(name, width, depth, prefix, patch, gigaflops):
    dim, cost = estimates.encoder_cost(name, 16, None)
    assert dim == width
    assert cost.forward == cost.training == pytest.approx(vit_forward(width, depth, 256, prefix, patch), rel=2e-3)
    assert round(cost.forward / 1e9) == gigaflops


def test_costs_of_the_giant_and_a_packaged_encoder_are_known():
    assert estimates.encoder_cost("dinov2-g", 16, None).cost.forward == pytest.approx(598e9, rel=5e-3)
    tiny = encoder_cost("tiny", 8)
    assert tiny.dim == 192
    assert 0 < tiny.cost.forward < encoder_cost("tiny", 16).cost.forward


def test_autoencoder_cost_matches_torchs_counter():
    """Stable Diffusion's shape on a small image; the cost grows with the pixels, except for the middle attention."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        )  # fmt: skip
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        vae.encode(torch.empty(1, 3, 32, 32, device="meta"))
    found = autoencoder_cost("sd-vae-ft-mse", 32)
    assert found.cost.forward == counter.get_total_flops()
    assert found.cost.parameters == sum(p.numel() for p in vae.parameters()) == 83_653_863
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        vae.decode(torch.empty(1, 4, 4, 4, device="meta"))
    assert found.decoding == counter.get_total_flops()
    assert (found.channels, found.factor) == (4, 8)
    assert autoencoder_cost("sd3-vae", 32).channels == 16
    assert autoencoder_cost("pixels", 32)[:3] == (3, 1, False)


@pytest.mark.parametrize(
    ("network", "shares"),
    [
        ("SiT-B/2", (0.09, 0.33, 1.17, 4.34)),
        pytest.param("SiT-L/2", (0.025, 0.095, 0.33, 1.24), marks=pytest.mark.slow),
        pytest.param("SiT-XL/2", (0.017, 0.065, 0.23, 0.84), marks=pytest.mark.slow),
    ],
)
def test_the_encoders_share_of_a_step_matches_the_literature(network, shares, monkeypatch):
    """Equal to all digits of the published table of encoders and networks."""
    monkeypatch.setattr("repa.performance.estimate.activation_bytes", lambda config, dims: 0)
    encoders = ("dinov2-s", "dinov2-b", "dinov2-l", "dinov2-g")
    found = estimated(aligned(network, *encoders))
    for encoder, share in zip(encoders, shares, strict=True):
        assert found.share(encoder) == pytest.approx(share, rel=0.03)


@pytest.mark.parametrize(
    ("encoder", "gigabytes"), [("dinov2-s", 252), ("dinov2-b", 504), ("dinov2-l", 672), ("dinov2-g", 1008)]
)
def test_disk_space_for_tokens_is_computed(encoder, gigabytes, monkeypatch):
    monkeypatch.setattr("repa.performance.estimate.activation_bytes", lambda config, dims: 0)
    found = estimated(aligned("SiT-S/2", encoder))
    assert round(IMAGENET * found.tokens_bytes(encoder, "fp16") / 1e9) == gigabytes


def test_disk_space_depends_on_the_token_form(base):
    assert round(IMAGENET * base.moments_bytes() / 1e9) == 21
    assert base.tokens_bytes("dinov2-b", "int8") == 256 * (768 + 4)
    assert base.tokens_bytes("dinov2-b", "pca256") == 256 * 256 * 2
    assert base.tokens_bytes("dinov2-b", "pca256-int8") == 256 * (256 + 4)


def test_only_forms_smaller_than_the_encoders_width_are_offered(monkeypatch):
    monkeypatch.setattr("repa.performance.estimate.activation_bytes", lambda config, dims: 0)
    found = estimated(aligned("SiT-S/2", "tiny", "dinov2-b"))
    assert found.forms("tiny") == ["fp16", "int8"]
    assert found.forms("dinov2-b") == ["fp16", "int8", "pca256", "pca256-int8"]


def test_the_bytes_of_a_form_match_packed_tokens(base):
    from repa.data.packing import pack

    tokens = torch.randn(1, 256, 768)
    for form, basis in (("fp16", None), ("int8", None), ("pca256-int8", torch.randn(257, 768))):
        packed = pack(tokens, form, basis).values()
        assert base.tokens_bytes("dinov2-b", form) == sum(t.numel() * t.element_size() for t in packed)


def test_time_is_flops_divided_by_the_rate(base):
    images, flops = 400_000 * 256, 138.005e9 + base.projectors.training
    assert base.training_seconds(cached=True) == pytest.approx(images * flops / 8e14, rel=1e-3)
    extra = base.training_seconds(cached=False) - base.training_seconds(cached=True)
    assert extra == pytest.approx(images * 46.32e9 / 8e14, rel=1e-3)
    assert base.preparing_seconds(cached=True) == pytest.approx(IMAGENET * (272.7e9 + 46.32e9) / 8e14, rel=1e-3)
    mlp = 256 * (768 * 2048 + 2048 * 2048 + 2048 * 768)
    assert base.projectors.training == 6 * mlp


def test_memory_is_listed_by_content(base):
    weights = base.network.parameters + base.projectors.parameters
    memory = base.memory(cached=False)
    assert (memory["weights"], memory["optimizer"]) == (4 * weights, 8 * weights)
    assert memory["averages"] == 4 * base.network.parameters
    assert memory["activations"] == 256 / 8 * base.activations
    assert base.memory(cached=True)["encoders"] == 0 < memory["encoders"]


@pytest.mark.slow
def test_memory_is_computed_for_the_faster_strategy(base):
    large = estimated(aligned("SiT-XL/2"))
    assert large.parallel == "fsdp"
    assert large.memory(cached=True)["optimizer"] == 8 * (large.network.parameters + large.projectors.parameters) / 8
    assert base.parallel == "ddp"  # as configured
    assert estimated(aligned("SiT-XL/2"), num_devices=1).parallel == "ddp"


def test_several_processes_share_memory(monkeypatch):
    monkeypatch.setattr("repa.performance.estimate.activation_bytes", lambda config, dims: 1000)
    whole = estimated(aligned("SiT-S/2", parallel="ddp")).memory(cached=True)
    shared = estimated(aligned("SiT-S/2", parallel="fsdp", accumulate=2)).memory(cached=True)
    for what in ("weights", "gradients", "optimizer", "averages"):
        assert shared[what] == whole[what] / 8
    assert (whole["activations"], shared["activations"]) == (32_000, 16_000)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_extrapolated_from_one_and_two_blocks(precision):
    config = TrainConfig(
        model=ModelConfig(name="SiT-S/2", hidden_dim=64, depth=5, num_heads=2, latent_size=8, latent_channels=4),
        precision=precision,
    )
    model, dtype = build(config.model), torch.bfloat16

    def forward(num):
        return (
            call(model, torch.randn(num, 4, 8, 8), torch.rand(num), torch.zeros(num, dtype=torch.int64))
            .prediction.square()
            .sum()
        )

    with torch.autocast("cpu", dtype, enabled=precision == "bf16"):
        kept = saved_bytes(lambda: forward(4), 16) - saved_bytes(lambda: forward(1), 16)
    assert activation_bytes(config, {}) == pytest.approx(kept / 3, rel=0.05)
    fewer = config.override(checkpoint_activations=True)
    assert activation_bytes(fewer, {}) < activation_bytes(config, {}) / 2


def test_activations_of_a_contrastive_loss_are_counted():
    config = TrainConfig.parse({"model": {"name": "SiT-S/4", "latent_size": 8, "latent_channels": 3}, "alignments": [
        {"target": "tiny", "depth": 2, "loss": "nt_xent"}]})  # fmt: skip
    cosine = config.override(alignments=(config.alignments[0].override(loss="cosine"),))
    assert activation_bytes(config, {"tiny": 128}) > activation_bytes(cosine, {"tiny": 128})


def test_saved_bytes_counts_each_storage_once_and_no_attention_weights():
    x = torch.randn(3, 5, requires_grad=True)
    assert saved_bytes(lambda: (x.exp() * 2).sum(), 7) == 3 * 5 * 4  # exp keeps its result

    def twice():
        y = x.exp()
        return (y.sin() * y.cos()).sum()  # both keep y, and the product keeps their results

    assert saved_bytes(twice, 7) == 3 * (3 * 5 * 4)
    q = torch.randn(1, 2, 5, 5, requires_grad=True)
    assert saved_bytes(lambda: q.exp().sum(), 5) == 0


def test_invalid_input_is_refused():
    with pytest.raises(UserError, match="A batch of 256 images cannot be split into 7 equal parts"):
        estimated(aligned("SiT-S/2"), num_devices=7)
    config = aligned("SiT-S/2")
    config = config.override(model=config.model.override(latent_size=64))
    with pytest.raises(UserError, match=r"model\.latent.size is 64, but sd-vae-ft-mse encodes 256 pixels to 32"):
        estimated(config)
    with pytest.raises(UserError, match=r"latents of 33 .*patch|33 cannot be cut into patches of 2"):
        estimated(aligned("SiT-S/2"), resolution=264)


def test_the_command_prints_the_estimate(capsys):
    small = ["--model.depth", "2", "--model.hidden-dim", "64", "--model.num-heads", "2", "--alignments.0.depth", "1"]
    assert run(["estimate", "sit-b2-repa", *small, "--device", "a100", "--devices", "4", "--utilisation", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line[2:30].strip(): line[30:].split("  ") for line in lines if line.startswith("  ")}
    assert "503.8 GB" in " ".join(table["dinov2-b as fp16"])
    assert "21.0 GB" in " ".join(table["latents"])
    assert "85.7 M" in " ".join(table["dinov2-b"])
    assert "time on 4 x a100 of 312 TFLOP/s at 50% utilisation (assumed)" in lines
    assert {"encoders in every step", "stored tokens"} <= set(table)
    samples = next(
        line for line in lines if line.startswith("50,000 samples, 250 steps, cfg:scale=1.8,high=0.7 (the paper")
    )
    assert samples.endswith(", on the same devices at the same utilisation")
    assert float(table["images/s"][-1].replace(",", "")) > 100
    assert run(["estimate", "sit-b2", *small[:-2], "--tflops", "100", "--devices", "8"]) == 0
    out = capsys.readouterr().out
    assert "8 x a device of 100 TFLOP/s" in out
    assert "stored tokens" not in out
    pixels = ["--autoencoder", "pixels", "--resolution", "32", "--images", "50000", "--classes", "10", "--devices", "1"]
    assert run(["estimate", "cifar10-repa", *pixels]) == 0
    out = capsys.readouterr().out
    assert "153.6 MB" in out  # 50,000 x 3 x 32 x 32
    assert "these are the latents" in out
    assert run(["estimate", "sit-b2", "--device", "h1000"]) == 2
    assert "Did you mean 'h100'?" in capsys.readouterr().err


def test_sampling_cost_counts_the_passes_of_guidance(monkeypatch):
    """Of the times 1, 0.76, 0.52, 0.28 and 0.04, cfg below 0.7 guides three; two guidances share equal passes."""
    assert passes_of(5, ()) == (5, 0)
    assert passes_of(5, ["cfg:scale=1.8,high=0.7"]) == (5 + 3, 0)
    assert passes_of(5, ["internal:head=8,scale=1.4"]) == (5, 0)  # a head costs no pass
    assert passes_of(5, ["cfg:scale=2,high=0.7", "autoguidance:scale=1.5,low=0.7"]) == (5 + 3 + 2, 0)
    found = estimated(TrainConfig(model={"name": "SiT-S/2"}, autoencoder="sd-vae-ft-mse"))
    passes = passes_of(250, ["cfg:scale=1.8,high=0.7"])
    assert found.sampling_flops(passes) == passes.whole * found.network.forward + found.autoencoder.decoding
    assert 420 <= passes.whole <= 426  # 250 plus the steps below 0.7
    assert found.samples_per_second(passes) == pytest.approx(
        found.rate * found.num_devices / found.sampling_flops(passes)
    )


def recipe(name: str) -> TrainConfig:
    return load_recipe(name).override(autoencoder="sd-vae-ft-mse", precision="fp32")


def test_an_averaged_network_as_target_costs_one_forward():
    found = estimated(recipe("sit-b2-sra"))
    assert found.averaged == found.network.forward
    assert found.step_flops == found.network.training + found.projectors.training + found.network.forward
    assert not found.storable


def test_two_times_per_image_cost_two_modulations():
    width, depth = 768, 12
    found, plain = estimated(recipe("sit-b2-self-flow")), estimated(recipe("sit-b2"))
    modulations = 2 * width * width * (6 * depth + 2)
    times = 2 * (256 * width + width * width)  # two layers embed a time
    assert found.network.forward - plain.network.forward == modulations + times
    assert found.averaged == plain.network.forward  # it sees one time an image
    assert found.activations > plain.activations


def test_the_attention_of_an_encoder_is_not_counted_on_disk():
    assert not estimated(recipe("sit-b2-haste")).storable
    assert estimated(recipe("sit-b2-repa")).storable
