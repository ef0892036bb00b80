"""Every recipe builds at full size, trains at toy size and keeps its promises; figures match the paper."""

from pathlib import Path

import pytest
import torch
import yaml

from repa.alignment import Alignment
from repa.base.errors import UserError
from repa.cli.main import run as repa_run
from repa.data import PrepareConfig, open_data, prepare
from repa.encoders import ENCODERS
from repa.models import build
from repa.recipes import RECIPES, load_recipe
from repa.recipes.methods import method_recipes
from repa.recipes.networks import network_recipes
from repa.recipes.paper import ROWS
from repa.recipes.recipe import printed
from repa.recipes.small import own_image_recipes
from repa.report import read_run, write_report
from repa.report.results import paper_row_of, unmatched_paper_rows
from repa.report.speedups import group_seeds
from repa.runs import load_run, read_metrics
from repa.training import TrainConfig
from repa.training import train as start_training
from tests.promises import understood
from tests.report.fakes import fake_run

# numbers of trainable parameters of the networks without projectors, and of the projector to width 768
PARAMETERS = {"SiT-B/2": 130_303_504, "SiT-L/2": 457_824_272, "SiT-XL/2": 674_816_272}
PROJECTOR_768 = {"SiT-B/2": 7_344_896, "SiT-L/2": 7_869_184, "SiT-XL/2": 8_131_328}
WIDTHS = {"SiT-B/2": 768, "SiT-L/2": 1024, "SiT-XL/2": 1152, "DiT-L/2": 1024, "DiT-XL/2": 1152}
FEATURES = {
    "dinov2-b": 768, "dinov2-l": 1024, "dinov2-g": 1536, "dino-b": 768, "mocov3-l": 1024, "mae-l": 1024,
    "ijepa-h": 1280, "clip-l": 1024, "siglip-b": 768,
}  # fmt: skip

paper_recipes = pytest.mark.parametrize("name", ROWS)


def test_every_row_of_the_papers_tables_has_a_recipe():
    """From the paper: encoders, depths and objectives of Table 2, Table 3, lambda, 512 pixels."""
    encoders = ("mae-l", "dino-b", "mocov3-l", "ijepa-h", "clip-l", "siglip-b", "dinov2-b", "dinov2-l", "dinov2-g")
    expected = {f"sit-l2-repa-{encoder}-ntxent" for encoder in encoders} | {"sit-l2-repa-dinov2-l"}
    expected |= {f"sit-l2-repa-depth{depth}" for depth in (6, 8, 10, 12, 14, 16)}
    expected |= {f"sit-xl2-repa-lambda{weight}" for weight in ("0.25", "0.5", "0.75", "1")}
    expected |= {
        f"{model}{tail}" for model in ("sit-b2", "sit-l2", "sit-xl2", "dit-l2", "dit-xl2") for tail in ("", "-repa")
    }
    expected |= {"sit-xl2-512", "sit-xl2-repa-512", "quickstart", "quickstart-repa"}
    expected |= {"cifar10", "cifar10-repa", "quickstart-text"}
    assert set(RECIPES) == expected | set(method_recipes()) | set(network_recipes()) | set(own_image_recipes())


@pytest.mark.parametrize(
    ("name", "alignment"),
    [
        ("sit-b2-repa", ("dinov2-b", 4, "cosine", 0.5)),
        ("sit-l2-repa", ("dinov2-b", 8, "cosine", 0.5)),
        ("sit-xl2-repa", ("dinov2-b", 8, "cosine", 0.5)),
        ("dit-xl2-repa", ("dinov2-b", 8, "cosine", 0.5)),
        ("sit-l2-repa-mae-l-ntxent", ("mae-l", 8, "nt_xent", 0.5)),
        ("sit-l2-repa-dinov2-l", ("dinov2-l", 8, "cosine", 0.5)),
        ("sit-l2-repa-depth12", ("dinov2-l", 12, "nt_xent", 0.5)),
        ("sit-xl2-repa-lambda0.25", ("dinov2-b", 8, "cosine", 0.25)),
        ("sit-xl2-repa-512", ("dinov2-b", 8, "cosine", 0.5)),
    ],
)
def test_recipe_names_describe_what_is_trained(name, alignment):
    config = load_recipe(name)
    (term,) = config.alignments
    assert (term.target, term.depth, term.loss, term.weight) == alignment
    assert (term.projector, term.schedule, term.token_norm, term.measure_only) == ("mlp", "constant", "none", False)
    family, size = name.split("-")[:2]
    assert config.model.name == {"sit": "SiT", "dit": "DiT"}[family] + f"-{size[:-1].upper()}/{size[-1]}"
    assert config.model.latent_size == (64 if name.endswith("512") else 0)


@paper_recipes
def test_all_recipes_share_the_papers_settings(name):
    """From appendix D of the paper and the defaults of its code."""
    config = load_recipe(name)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (1e-4, 0.9, 0.999, 0)
    assert (optimizer.max_grad_norm, config.batch_size, config.label_dropout) == (1.0, 256, 0.1)
    assert (config.ema_decay, config.diffusion.path, config.diffusion.timesteps) == (0.9999, "linear", "uniform")
    assert config.diffusion.objective == ("ddpm" if name.startswith("dit") else "flow")
    assert config.num_steps == (3_000_000 if name == "sit-xl2-512" else 400_000)


def trainable(module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def full_size(config: TrainConfig) -> TrainConfig:
    size = config.model.latent_size or 32
    return config.override(model=config.model.override(latent_size=size, latent_channels=4, num_classes=1000))


@pytest.mark.parametrize("model", [*PARAMETERS, "DiT-L/2", "DiT-XL/2"])
def test_networks_of_the_recipes_have_the_papers_sizes(model):
    """Every network named by a recipe is built on the meta device."""
    sizes = {}
    for name, row in ROWS.items():
        config = full_size(load_recipe(name)).model
        if config.name == model and config.latent_size not in sizes:
            with torch.device("meta"):
                sizes[config.latent_size] = trainable(build(config))
            assert row.resolution == 8 * config.latent_size
    width = WIDTHS[model]
    of_sit = PARAMETERS["S" + model[1:]]
    variance = 4 * 2 * 2 * (width + 1) if model.startswith("DiT") else 0  # outputs of four more channels
    assert set(sizes.values()) == {of_sit + variance}
    assert set(sizes) == ({32, 64} if model == "SiT-XL/2" else {32})


@paper_recipes
def test_projectors_have_the_papers_sizes(name):
    config = load_recipe(name)
    width = WIDTHS[config.model.name]
    for term in config.alignments:
        features = FEATURES[term.target]
        with torch.device("meta"):
            projector = Alignment(term, width, features)
        layers = (width * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * features + features)
        assert trainable(projector) == layers
        if features == 768 and config.model.name in PROJECTOR_768:
            assert layers == PROJECTOR_768[config.model.name]


def toy(config: TrainConfig) -> TrainConfig:
    """The same run with a narrow network, as many blocks as alignment needs, small images and a replaced encoder."""
    depth = max((term.depth for term in config.alignments), default=1)
    terms = [{**term.model_dump(), "target": "tiny", "projector": "mlp:width=8"} for term in config.alignments]
    small = {"latent_size": 0, "hidden_dim": 8, "depth": depth + 1, "num_heads": 1}
    return config.override(
        model=config.model.override(**small), alignments=terms, batch_size=4, num_steps=2, log_every=1, precision="fp32"
    )


def kinds() -> dict[tuple, str]:
    """Settings that select different code or another block -> the first recipe with them."""
    found: dict[tuple, str] = {}
    for name in ROWS:
        config = load_recipe(name)
        terms = [(term.loss, term.depth, term.weight) for term in config.alignments]
        found.setdefault((config.diffusion.objective, *terms), name)
    return found


@pytest.mark.parametrize("name", kinds().values())
def test_every_kind_of_recipe_trains(name, data_folder, tmp_path):
    config = toy(load_recipe(name))
    state = start_training(
        config, open_data(data_folder), tmp_path / "run", device=torch.device("cpu"), say=lambda text: None
    )
    assert state.step == 2
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2]
    names = {f"tiny@{term.depth}" for term in config.alignments}
    assert all(set(row.get("alignment") or {}) == names for row in rows)
    for term in config.alignments:  # Eq. 9 with the recipe's weight
        row = rows[0]
        denoising = row["denoising"] + (row["vb"] if config.diffusion.objective == "ddpm" else 0.0)
        assert row["loss"] == pytest.approx(
            denoising + term.weight * row["alignment"][f"tiny@{term.depth}"], rel=1e-5, abs=1e-5
        )


def test_all_kinds_of_recipe_are_tested():
    found = kinds()
    depths = {(term[0], term[1]) for key in found for term in key[1:]}
    assert depths == {("cosine", 4), ("cosine", 8), *(("nt_xent", depth) for depth in (6, 8, 10, 12, 14, 16))}
    assert {key[0] for key in found if len(key) == 1} == {"flow", "ddpm"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_round_trip_through_yaml(name, tmp_path):
    config = load_recipe(name)
    assert TrainConfig.parse(yaml.safe_load(config.to_yaml())) == config
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml())
    assert load_recipe(str(path)) == config


@paper_recipes
def test_targets_are_encoders_and_samplers_fit_the_objective(name):
    """Targets are known encoders, and samplers of published figures fit the recipe's network."""
    config = load_recipe(name)
    for term in config.alignments:
        assert ENCODERS.check(term.target) == term.target
    for sampling in RECIPES[name].samplings:
        config.diffusion.check_sampler(sampling.sampler)


def test_the_documentation_page_names_every_recipe():
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in page] == []


def test_show_prints_a_file_that_train_takes(tmp_path, capsys):
    assert repa_run(["show", "sit-l2-repa-depth12"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "shown.yaml")) == load_recipe("sit-l2-repa-depth12")
    for expected in ("after block 12", "Table 2", "11.2", "0.19", "fp16", "not stated in the paper", "negatives"):
        assert expected in text, expected


def test_the_expected_training_time_is_stated():
    assert "5.4 steps per second on 8 H100, 20.6 h for 400K steps" in RECIPES["sit-xl2-repa"].promise
    assert "not stated in the paper" in RECIPES["sit-b2-repa"].promise


def test_the_text_to_image_network_matches_the_paper():
    config = RECIPES["coco-mmdit-repa"]()
    with torch.device("meta"):
        model = build(config.model.override(latent_size=32, latent_channels=4))
        projector = Alignment.of(config.alignments[0], model, {"dinov2-b": 768})
    counts = [sum(p.numel() for p in module.parameters()) for module in (model, projector)]
    assert counts == [512_415_504 - 7_344_896, 7_344_896]
    assert model.state_shapes == {"x": (4, 32, 32)}
    assert RECIPES["coco-mmdit"]().alignments == ()


def test_the_small_text_recipe_trains_on_captioned_photographs(tmp_path):
    prepare("photographs:num=40,captions=true", tmp_path / "data", PrepareConfig(
        resolution=32, features=("tiny",), text="tiny-text", num_workers=0
    ))  # fmt: skip
    config = RECIPES["quickstart-text"]().override(num_steps=2, batch_size=4, preview={"every": 0}, save_every=2)
    start_training(config, open_data(tmp_path / "data"), tmp_path / "run", device=torch.device("cpu"), say=str)
    assert load_run(tmp_path / "run").text == "tiny-text"


def test_list_prints_name_headline_and_fid(capsys):
    assert repa_run(["list", "recipes"]) == 0
    printed_lines = capsys.readouterr().out.splitlines()
    lines = {line.split()[0]: line for line in printed_lines if line and not line.startswith("#")}
    assert set(lines) == set(RECIPES)
    assert [line[2:] for line in printed_lines[1:] if line.startswith("#")] == [
        "REPA, the results of its paper", "Methods on SiT-B/2", "Methods on SiT-XL/2", "Methods on CIFAR-10, for a CPU",
        "A few thousand images of your own", "Text to image", "Other latents, and DDT", "JiT, on pixels", "Small runs",
    ]  # fmt: skip
    assert "FID 7.9 at 400K, 5.9 at 4M, 1.42 guided" in lines["sit-xl2-repa"]
    assert "FID 10.0 at 400K" in lines["sit-l2-repa"]
    assert all("FID" in lines[name] for name, row in ROWS.items() if row.figures)


@paper_recipes
def test_promised_commands_can_be_parsed(name):
    """The commands can be parsed, and each uses the result of the one before."""
    given = understood(name)
    assert set(given) == {"prepare", "train", "sample", "evaluate"}
    assert given["train"].recipe == name
    assert given["train"].data == given["prepare"].out == given["evaluate"].reference
    assert given["sample"].run == given["train"].out
    assert given["evaluate"].samples == given["sample"].out
    assert given["prepare"].resolution == ROWS[name].resolution
    # samples are not measured in the alignment target's features
    assert given["evaluate"].features != ROWS[name].target
    sampled = {key: getattr(given["sample"], key) for key in ("sampler", "steps")}
    assert sampled == {"sampler": "ddpm" if name.startswith("dit") else "euler_maruyama", "steps": 250}


def test_published_figures_record_how_they_were_sampled():
    found = RECIPES["sit-xl2-repa"].samplings
    assert {(sampling.sampler, sampling.steps) for sampling in found} == {("euler_maruyama", 250)}
    guidances = [sampling.guidance for sampling in found]
    assert guidances[0] == ()
    assert {("cfg:scale=1.8,high=0.7",), ("cfg:scale=1.35",)} < set(guidances)
    assert len(found) == len(set(guidances)) == 13
    (dit,) = RECIPES["dit-xl2-repa"].samplings
    assert (dit.sampler, dit.steps) == ("ddpm", 250)


def figures(name, step, guidance="none", sampler="euler_maruyama"):
    (found,) = [f for f in ROWS[name].figures if (f.step, f.guidance, f.sampler) == (step, guidance, sampler)]
    return found


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("sit-b2", 400_000, (33.0, 6.46, 43.7, 0.53, 0.63, None)),
        ("sit-b2-repa", 400_000, (24.4, 6.40, 59.9, 0.59, 0.65, 61.2)),
        ("sit-b2-repa", 50_000, (78.2, 11.71, 17.1, 0.33, 0.48, 43.2)),
        ("sit-l2", 400_000, (18.8, 5.29, 72.0, 0.64, 0.64, None)),
        ("sit-l2-repa", 400_000, (10.0, 5.20, 109.2, 0.69, 0.65, 69.4)),
        ("sit-l2-repa", 200_000, (14.0, 5.18, 86.5, 0.67, 0.64, 66.3)),
        ("sit-xl2", 7_000_000, (8.3, 6.32, 131.7, 0.68, 0.67, None)),
        ("sit-xl2-repa", 200_000, (11.1, 5.05, 100.4, 0.69, 0.64, 67.3)),
        ("sit-xl2-repa", 400_000, (7.9, 5.06, 122.6, 0.70, 0.65, 70.3)),
        ("sit-xl2-repa", 4_000_000, (5.9, 5.73, 157.8, 0.70, 0.69, 74.6)),
    ],
)
def test_published_figures_match_the_paper(name, step, expected):
    assert figures(name, step)[1:7] == expected


@pytest.mark.parametrize(
    ("names", "fids"),
    [
        (["sit-l2-repa-depth6", "sit-l2-repa-depth8", "sit-l2-repa-depth10"], [10.3, 10.0, 10.5]),
        (["sit-l2-repa-depth12", "sit-l2-repa-depth14", "sit-l2-repa-depth16"], [11.2, 11.6, 12.1]),
        ([f"sit-xl2-repa-lambda{w}" for w in ("0.25", "0.5", "0.75", "1")], [8.6, 7.9, 7.8, 7.8]),
        ([f"sit-l2-repa-{e}-ntxent" for e in ("mae-l", "dino-b", "mocov3-l", "ijepa-h")], [12.5, 11.9, 11.9, 11.6]),
        ([f"sit-l2-repa-{e}-ntxent" for e in ("clip-l", "dinov2-b", "dinov2-l", "dinov2-g")], [11.0, 9.7, 10.0, 9.8]),
    ],
)
def test_fids_of_ablations_match_the_paper(names, fids):
    assert [figures(name, 400_000).fid for name in names] == fids


def test_figures_of_dit_and_of_guided_samples_match_the_papers():
    names = ("dit-l2", "dit-l2-repa", "dit-xl2", "dit-xl2-repa")
    assert [figures(name, 400_000, sampler="ddpm").fid for name in names] == [23.3, 15.6, 19.5, 12.3]
    assert figures("dit-xl2-repa", 850_000, sampler="ddpm").fid == 9.6
    best = figures("sit-xl2-repa", 4_000_000, "cfg:scale=1.8,high=0.7")
    assert best[1:6] == (1.42, 4.70, 305.7, 0.80, 0.65)
    others = {"1.35": 1.80, "1.325": 1.79, "2,high=0.65": 1.44, "2,high=0.8": 2.23, "1.9,high=0.7": 1.45}
    for scale, fid in others.items():
        assert figures("sit-xl2-repa", 4_000_000, f"cfg:scale={scale}").fid == fid
    assert figures("sit-xl2-repa-512", 1_000_000, "not stated", "").fid == 2.08


def test_figures_are_printed_as_in_the_paper():
    assert [printed(value) for value in (10.0, 1.42, 0.70, 122.6, 31.24, None)] == [
        "10.0", "1.42", "0.70", "122.6", "31.24", "-",
    ]  # fmt: skip


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match=r"recipe 'sit-xl2-rep'.*Did you mean 'sit-xl2-repa'\?.*repa list recipes"):
        load_recipe("sit-xl2-rep")
    with pytest.raises(UserError, match=r"Did you mean 'sit-l2-repa-mae-l-ntxent'\?"):
        load_recipe("sit-l2-repa-mae-l-ntxen")


def run_of(folder, name: str, **changes):
    """A run folder of recipe `name` on ImageNet."""
    config = full_size(load_recipe(name)).override(**changes)
    return read_run(fake_run(folder, settings=config.model_dump(mode="json")))


@paper_recipes
def test_a_run_is_matched_to_a_recipe_by_its_configuration(name, tmp_path):
    row = paper_row_of(run_of(tmp_path / "run", name))
    assert load_recipe(row.name) == load_recipe(name)  # two rows of the paper may be the same run


def test_a_run_with_a_changed_setting_is_not_matched_to_the_recipe(tmp_path):
    whole = load_recipe("sit-xl2-repa")
    term = whole.alignments[0]
    departures = {
        "batch": {"batch_size": 64},
        "weight": {"alignments": [term.override(weight=0.4)]},
        "stop": {"alignments": [term.override(schedule="stop:step=1000")]},
        "narrow": {"model": full_size(whole).model.override(hidden_dim=512)},
        "head": {"model": full_size(whole).model.override(heads=(8,))},
        "classes": {"model": full_size(whole).model.override(num_classes=10)},
        "path": {"diffusion": {"path": "trigonometric"}},
        "data": {"diffusion": {"prediction": "data"}},
    }
    for name, changes in departures.items():
        assert paper_row_of(run_of(tmp_path / name, "sit-xl2-repa", **changes)) is None, name
    measured = {"alignments": [term.override(measure_only=True)]}  # does not affect the network: the baseline
    assert paper_row_of(run_of(tmp_path / "measured", "sit-xl2-repa", **measured)).name == "sit-xl2"


def test_the_report_shows_the_papers_figures_only_next_to_matching_runs(tmp_path):
    known = run_of(tmp_path / "known", "sit-xl2-repa")
    other = run_of(tmp_path / "other", "sit-xl2-repa", batch_size=64)
    at_512 = run_of(tmp_path / "large", "sit-xl2-repa-512")
    found = unmatched_paper_rows([], group_seeds([other, known, at_512]))  # there are no comparable results
    assert [(run.name, row.name) for run, row in found] == [("known", "sit-xl2-repa")]
    page = write_report([other, known], tmp_path / "both.html").read_text()
    section = page.split("What the paper reports")[1].split("</section>")[0]
    assert [cell in section for cell in ("7.9", "122.6", "0.70", "5.9", "arXiv 2410.06940")] == [True] * 5
    assert "1.42" not in section  # a guided figure, which is not comparable with unguided runs
    assert "other" not in section.split("<p")[0]
    assert "What the paper reports" not in write_report([other], tmp_path / "one.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_cost_of_every_recipe_is_known(name, capsys):
    assert repa_run(["estimate", name]) == 0
    assert "FLOP" in capsys.readouterr().out
