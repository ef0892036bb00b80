"""Recipes of LightningDiT, DDT and DiT^DH on RAE: their settings, that they train, and their published figures."""

import pytest
import torch

from repa.data import open_data
from repa.diffusion import build_process
from repa.models import build
from repa.performance.estimate import estimate, passes_of
from repa.recipes import load_recipe
from repa.recipes.networks import NETWORKS
from repa.recipes.recipe import PUBLISHED
from repa.runs import read_metrics
from repa.training import train as start_training
from repa.training.config import PreviewConfig
from tests.promises import understood

NAMES = [name for key in ("lightningdit", "ddt", "rae") for name in NETWORKS[key].names]


def test_recipes_match_the_papers_settings():
    config = load_recipe("lightningdit-xl1")
    assert (config.model.norm, config.model.mlp, config.model.rotary, config.model.qk_norm) == (
        "rms",
        "swiglu",
        True,
        "none",
    )
    assert (config.diffusion.timesteps, config.diffusion.velocity_cosine) == ("logit_normal", 1.0)
    assert (config.batch_size, config.num_steps, config.optimizer.max_grad_norm) == (1024, 64 * 1251, 1e9)
    config = load_recipe("ddt-xl2")
    assert [(t.target, t.depth, t.projector, t.weight) for t in config.alignments] == [
        ("dinov2-b", 8, "mlp:width=1152", 0.5)
    ]
    assert (config.model.qk_norm, config.model.bias, config.batch_size, config.optimizer.beta2) == (
        "rms",
        False,
        256,
        0.95,
    )
    config = load_recipe("rae-dh-xl")
    assert (config.diffusion.for_latents((768, 16, 16)).shift, config.ema_decay) == (
        pytest.approx(6.9282, abs=1e-4),
        0.9995,
    )


@pytest.mark.parametrize(
    ("name", "channels", "side", "millions"),
    [("lightningdit-xl1", 32, 16, 675), ("ddt-xl2", 4, 32, 675), ("ddt-b2", 4, 32, 130), ("rae-dh-xl", 768, 16, 838)],
)
def test_networks_have_the_papers_sizes(name, channels, side, millions):
    """The RAE paper states 839 million because it includes the fixed positions."""
    config = load_recipe(name).model.override(latent_channels=channels, latent_size=side, num_classes=1000)
    with torch.device("meta"):
        model = build(config)
    assert model.grid == (16, 16)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains(name, data_folder, tmp_path):
    """Two steps of a narrow network with all its blocks; the logged loss is the sum of its parts."""
    config = load_recipe(name)
    backbone = config.model.backbone.replace("head_dim=2048,head_heads=16", "head_dim=24,head_heads=3")
    name = f"{config.model.name.partition('/')[0]}/4"
    terms = [t.override(target="tiny", projector="mlp:width=8") for t in config.alignments]
    config = config.override(
        model=config.model.override(name=name, backbone=backbone, hidden_dim=16, num_heads=2), alignments=terms, autoencoder="",
        batch_size=4, num_steps=2, log_every=1, precision="fp32", preview=PreviewConfig(),
    )  # fmt: skip
    run = tmp_path / "run"
    state = start_training(config, open_data(data_folder), run, device=torch.device("cpu"), say=lambda text: None)
    assert state.step == 2
    row = next(row for row in read_metrics(run) if row["kind"] == "train")
    total = row["denoising"] + row.get("velocity_cosine", 0.0) + sum(t.weight * row["alignment"][t.key] for t in terms)
    assert row["loss"] == pytest.approx(total, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_promised_commands_lead_from_images_to_figures(name):
    given = understood(name)
    assert set(given) == {"prepare", "train", "sample", "evaluate"}
    assert (given["train"].recipe, given["sample"].run) == (name, given["train"].out)
    assert given["train"].data == given["prepare"].out == given["evaluate"].reference
    assert given["prepare"].autoencoder == load_recipe(name).autoencoder
    assert (given["sample"].labels == "balanced") == name.startswith("rae")


def test_published_figures_name_models_of_the_recipes():
    for key, network in NETWORKS.items():
        models = {model for _, model in network.names.values()}
        assert {figure.model for figure in PUBLISHED[key]} <= models
    assert {figure.labels for figure in PUBLISHED["rae"]} == {"balanced"}


@pytest.mark.slow
def test_the_estimate_of_a_recipe_uses_the_time_shift_of_its_latents():
    config = load_recipe("rae-dh-s")
    found = estimate(config, num_images=1000, num_devices=8, resolution=256, rate=1e12, num_classes=1000)
    assert found.config.diffusion.shift == pytest.approx((768 * 16 * 16 / 4096) ** 0.5)
    assert passes_of(250, ("cfg:scale=1.8,high=0.7",), build_process(found.config.diffusion).shift).whole > 250
