"""Recipes of methods related to REPA: their settings, that they train, and their published figures."""

import pytest
import torch
from torch import nn

from repa.alignment import SCHEDULES
from repa.base.registry import parse_spec
from repa.cli.main import run as repa_run
from repa.data import open_data
from repa.diffusion import GUIDANCES
from repa.diffusion.samplers import ode_grid
from repa.encoders.contract import Features, VisionEncoder
from repa.models.config import ROUTING, Route
from repa.recipes import RECIPES, load_recipe
from repa.recipes.methods import METHODS, method_recipes
from repa.recipes.networks import _JIT_SAMPLING, NETWORKS, network_recipes
from repa.recipes.paper import ROWS
from repa.recipes.recipe import PUBLISHED, headline, results_table
from repa.runs import read_metrics
from repa.training import TrainConfig
from repa.training import train as start_training
from repa.training.config import PreviewConfig
from tests.promises import understood


def terms_of(name: str) -> list[tuple]:
    return [
        (t.target, t.depth, t.tap, t.loss, t.projector, t.token_norm, t.weight) for t in load_recipe(name).alignments
    ]


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("sit-xl2-irepa", [("dinov2-b", 8, "hidden", "cosine", "conv", "zscore:alpha=0.6", 1.0)]),
        ("sit-b2-irepa", [("dinov2-b", 4, "hidden", "cosine", "conv", "zscore:alpha=0.6", 1.0)]),
        (
            "sit-xl2-haste",
            [
                ("dinov2-b", 8, "hidden", "cosine", "mlp", "none", 0.5),
                *(
                    (f"dinov2-b:part=attention,layer={deep}", own, "attention", "attention_ce:heads=12", "none", "none", 0.125)
                    for own, deep in ((5, 9), (6, 10), (7, 11), (8, 12))
                ),
            ],
        ),
        ("sit-xl2-reg", [("dinov2-b:part=all", 8, "hidden", "cosine", "mlp", "none", 0.5)]),
        ("sit-xl2-sra", [("ema:depth=20,earlier=0.2", 8, "hidden", "smooth_l1:beta=0.05", "mlp2", "none", 0.2)]),
        ("sit-b2-sra", [("ema:depth=8,earlier=0.2", 4, "hidden", "smooth_l1:beta=0.05", "mlp2", "none", 0.2)]),
        ("sit-b2-sra-dts-as", [("ema:depth=8,earlier=0.2", 3, "hidden", "cosine", "mlp2", "none", 0.5)]),
        ("sit-xl2-self-flow", [("ema:depth=20,cleanest=true", 8, "hidden", "cosine", "mlp", "none", 0.5)]),
        ("sit-xl2-layersync", [("block:depth=16", 8, "hidden", "cosine", "none", "none", 0.2)]),
        ("sit-xl2-vae-repa", [("latent", 8, "hidden", "cosine", "mlp2", "none", 0.5)]),
        ("sit-xl2-self-transcendence", [("latent", 9, "hidden", "mse", "mlp", "none", 0.5)]),
        ("sit-b2-dispersive", [("none", 3, "hidden", "dispersive:temperature=0.5", "none", "none", 0.5)]),
        ("sit-xl2-dispersive-last", [("none", 28, "hidden", "dispersive:temperature=1,scope=device", "none", "none", 0.25)]),
        (
            "sit-xl2-urepa",
            [
                ("dinov2-b", 8, "hidden", "cosine", "mlp", "none", 0.5),
                ("dinov2-b", 8, "hidden", "gram", "mlp", "none", 1.5),
            ],
        ),
        ("sit-xl2-reed", [("dinov2-b", 8, "hidden", "cosine", "mlp", "none", 0.5)]),
        ("sit-xl2-trd", [("dinov2-b", 8, "hidden", "gram:norm=l1,margin=0.1", "mlp", "none", 0.5)]),
        ("sit-xl2-internal-guidance", []),
        ("sit-xl2-tread", []),
        ("sit-b2-sprint", []),
    ],
)  # fmt: skip
def test_recipes_match_the_papers_settings(name, terms):
    assert terms_of(name) == terms


def test_other_settings_of_the_recipes_match_the_papers():
    assert {t.schedule for t in load_recipe("sit-xl2-haste").alignments} == {"stop:step=250000"}
    (stream,) = load_recipe("sit-xl2-reg").streams
    assert (stream.source, stream.weight) == ("dinov2-b", 0.03)
    dual = load_recipe("sit-xl2-sra-dts-as")
    assert (dual.diffusion.token_times, dual.model.separate_times) == (0.25, True)
    flow = load_recipe("sit-xl2-self-flow")
    assert (flow.diffusion.token_times, flow.model.separate_times) == (0.25, False)
    assert load_recipe("sit-xl2-self-transcendence").alignments[0].times == (0.4, 0.7)
    assert load_recipe("sit-xl2-cfm").diffusion.contrastive == 0.05
    assert load_recipe("sit-xl2-reed").denoising_schedule == "warmup:steps=50000"
    assert load_recipe("sit-xl2-urepa").alignments[1].projector_of == "tokens"
    guided = load_recipe("sit-xl2-internal-guidance")
    assert (guided.model.heads, guided.head_weight) == ((8,), 0.5)
    assert load_recipe("sit-b2-tread").model.routing == Route(3, 8, 0.5)
    assert load_recipe("sit-xl2-tread").model.routing == Route(3, 24, 0.5)
    assert load_recipe("sit-b2-sprint").model.routing == Route(3, 10, 0.25, 2, "fuse", 0.1)
    sprint = load_recipe("sit-xl2-sprint")
    assert sprint.model.routing == Route(3, 26, 0.25, 2, "fuse", 0.1)
    assert (sprint.model.rotary, sprint.model.positions, sprint.model.qk_norm) == (True, False, "rms")
    assert sprint.diffusion.timesteps == "logit_normal"


@pytest.mark.parametrize(("size", "depth", "heads"), [("b", 4, 12), ("l", 8, 16), ("h", 10, 16)])
def test_the_pixelrepa_recipe_matches_the_paper(size, depth, heads):
    """On JiT's recipe: one cosine term of weight 0.1 through the adapter, at the last block before the class tokens."""
    config = load_recipe(f"jit-{size}16-pixelrepa")
    (term,) = config.alignments
    found = (term.target, term.depth, term.loss, term.weight, term.projector)
    assert found == ("dinov2-b", depth, "cosine", 0.1, f"adapter:masked=0.2,heads={heads}")
    assert config.model.name == f"JiT-{size.upper()}/16"
    diffusion = config.diffusion
    assert (diffusion.prediction, diffusion.loss_weight, diffusion.sigma_min) == ("data", "velocity", 0.05)
    assert diffusion.timesteps == "logit_normal:mean=0.8,std=0.8"
    assert (config.optimizer.learning_rate, config.optimizer.beta2) == (2e-4, 0.95)
    assert (config.batch_size, config.num_steps, config.ema_decays) == (1024, 750_600, (0.9996,))


class Attentive(VisionEncoder):
    """Stands in for DINOv2: patches, pooled features and attention from one random layer."""

    def prepare(self, pixels, side):
        return nn.functional.interpolate(pixels, (side, side))

    def extract(self, pixels, grid):
        tokens = self.net(pixels.flatten(2).mT)  # (N, G*G, 12)
        return Features(tokens, tokens.mean(1))

    def extract_attention(self, pixels, grid, layers):
        found = self.extract(pixels, grid)
        logits = (found.patches @ found.patches.mT)[:, None].expand(-1, 2, -1, -1)  # (N, 2, G*G, G*G)
        return found._replace(attention=dict.fromkeys(layers, logits))


def attentive(name, weights):
    net = nn.Linear(3, 12)
    nn.init.normal_(net.weight, generator=torch.Generator().manual_seed(0))
    return Attentive(net, name=name, dim=12, patch_size=1, preprocessing="none", weights_file=None)


def toy(config: TrainConfig) -> TrainConfig:
    """The same run with a narrow network of equal depth, small images and a replaced encoder."""
    stand_in = f"{__name__}.attentive"
    terms = [t.override(target=t.target.replace("dinov2-b", stand_in)) for t in config.alignments]
    terms = [t.override(projector="mlp:width=8") if t.projector == "mlp" else t for t in terms]
    streams = [s.override(source=stand_in) for s in config.streams]
    terms = [t.override(projector="mlp:width=8") if t.projector.startswith("mlp:") else t for t in terms]
    model = config.model.override(hidden_dim=16, num_heads=2, name=config.model.name.replace("/2", "/4"))
    return config.override(
        model=model,
        alignments=terms,
        streams=streams,
        batch_size=4,
        num_steps=2,
        log_every=1,
        precision="fp32",
        preview=PreviewConfig(),
    )


@pytest.mark.parametrize("name", method_recipes())
def test_every_method_trains(name, data_folder, tmp_path):
    """After two steps the logged loss is the denoising loss plus the weighted terms, as in Eq. 9."""
    config = toy(load_recipe(name))
    run = tmp_path / "run"
    state = start_training(config, open_data(data_folder), run, device=torch.device("cpu"), say=lambda text: None)
    assert state.step == 2
    row = next(row for row in read_metrics(run) if row["kind"] == "train")
    total = row["denoising"] + row.get("contrastive", 0.0)  # already weighted
    total *= SCHEDULES.build(config.denoising_schedule)(0)
    total += sum(config.head_weight * loss for loss in (row.get("head") or {}).values())
    total += sum(s.weight * row["stream"][s.name] for s in config.streams)
    total += sum(t.weight * row["alignment"][t.key] for t in config.alignments)
    assert row["loss"] == pytest.approx(total, rel=1e-5, abs=1e-5)
    assert ("contrastive" in row) == (config.diffusion.contrastive > 0)
    assert set(row.get("head") or {}) == {str(depth) for depth in config.model.heads}


SMALL = [name for name in (*method_recipes(), *network_recipes()) if name.startswith("cifar10")]


@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_train_unchanged(name, data_folder, tmp_path):
    """In half precision, on stored float16 features of the packaged encoder, with a measured preview."""
    run = tmp_path / "run"
    given = [
        "--num-steps", "2", "--batch-size", "2", "--log-every", "1", "--precision", "bf16", "--preview.every", "2",
        "--preview.num-images", "2", "--preview.num-scored", "4", "--preview.num-steps", "2",
    ]  # fmt: skip
    assert repa_run(["train", name, "--data", str(data_folder), "--out", str(run), *given]) == 0
    rows = {row["kind"]: row for row in read_metrics(run)}
    assert rows["train"]["step"] == 2
    assert rows["eval"]["frechet_distance"] > 0


def test_figures_have_a_column_for_each_way_of_drawing_labels():
    heads, *lines = results_table(PUBLISHED["internal-guidance"])
    titles = {labels: f"FID, labels {labels}" for labels in ("random", "balanced", "not stated")}
    for line, figure in zip(lines, PUBLISHED["internal-guidance"], strict=True):
        found = {labels: line[heads.index(title) :][: len(title)].strip() for labels, title in titles.items()}
        assert {labels for labels, cell in found.items() if cell} == {figure.labels}
        assert float(found[figure.labels]) == figure.fid


@pytest.mark.parametrize(
    ("key", "model", "line"),
    [
        ("reg", "SiT-XL/2", "FID 5.0 at 200K, 1.8 at 4M"),
        ("reg", "SiT-B/2", "FID 15.2 at 400K"),
        ("dispersive", "SiT-B/2", "FID 32.35 at 400K"),
        ("dispersive", "SiT-XL/2", "no unguided result known"),
        ("internal-guidance", "SiT-XL/2", "no unguided result known"),
    ],
)
def test_headlines_quote_the_published_fid(key, model, line):
    assert headline(PUBLISHED.get(key, ()), model) == line


def test_jit_is_guided_at_the_same_times_as_the_released_code():
    """The released code guides at data times above 0.1 (arXiv 2511.13720), and one of 50 steps is exactly there."""
    guidance = GUIDANCES.build(_JIT_SAMPLING.partition("--guidance ")[2].format(scale=2.9))
    guided = [step for step, t in enumerate(ode_grid(50).tolist()) if guidance.active(t)]
    assert guided == [step for step in range(51) if step / 50 > 0.1]


FULL = [name for name in (*method_recipes(), *network_recipes()) if name.startswith(("sit-", "jit-"))]


@pytest.mark.parametrize("name", FULL)
def test_promised_commands_lead_from_images_to_figures(name):
    given = understood(name)
    assert set(given) == {"prepare", "train", "sample", "evaluate"}
    assert given["train"].recipe == name
    assert given["train"].data == given["prepare"].out == given["evaluate"].reference
    assert given["sample"].run == given["train"].out
    assert given["evaluate"].samples == given["sample"].out
    heads = load_recipe(name).model.heads
    if name.startswith("jit"):
        assert given["sample"].labels == "balanced"
        assert given["prepare"].flip
        return
    wanted = tuple(f"internal:head={head},scale=1.4" for head in heads)
    assert given["sample"].guidance == (("path_drop:scale=3",) if "sprint" in name else wanted)


def test_published_figures_belong_to_existing_recipes():
    assert set(PUBLISHED) <= {*METHODS, *NETWORKS, *network_recipes(), *ROWS}
    for key in METHODS:
        assert f"arXiv {METHODS[key].paper}" in RECIPES[f"sit-xl2-{key}"].promise


def test_small_recipes_differ_from_the_baseline_only_in_the_method():
    baseline = load_recipe("cifar10").override(alignments=()).model_dump()
    for name in (name for name in method_recipes() if name.startswith("cifar10-")):
        config = load_recipe(name).model_dump()
        changed = {key for key in baseline if config[key] != baseline[key]}
        assert changed, name
        assert changed <= {"alignments", "streams", "model", "diffusion", "head_weight", "denoising_schedule"}, name
        model = {key for key in baseline["model"] if config["model"][key] != baseline["model"][key]}
        assert model <= {"heads", "separate_times", "route", *ROUTING}, name
        assert all("dinov2" not in term["target"] for term in config["alignments"]), name


def test_encoders_of_all_terms_exist():
    from repa.encoders import ENCODERS

    for name in METHODS:
        for term in load_recipe(f"sit-b2-{name}").alignments:
            encoder, _ = term.encoder
            assert not encoder or parse_spec(encoder)[0] in ENCODERS.table
