"""Released checkpoints become run folders whose samples equal those of the projects' own samplers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from repa.base.errors import UserError
from repa.cli.main import run as repa
from repa.diffusion import SAMPLERS
from repa.runs import layout, load_checkpoint, load_run
from repa.runs.importing import read_checkpoint
from repa.sampling import SampleConfig
from repa.training import TrainConfig
from tests.oracles import released

LABELS = torch.tensor([0, 1, 0])
NOISE = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PIXELS = ("--autoencoder", "pixels", "--model.num-heads", "2")


def convert(content, folder, *options, name="last.pt"):
    """Convert a checkpoint file with `content`: exit code and run folder."""
    save = save_file if name.endswith(".safetensors") else torch.save
    save(content, folder / name)
    code = repa(["convert", str(folder / name), str(folder / "run"), *PIXELS, *options])
    return code, folder / "run"


def latents(run, sampler, steps, weights="ema"):
    return SAMPLERS.build(sampler)(load_run(run, weights).denoiser(LABELS), NOISE.double(), steps)


def check(found, wanted):
    """Equal up to float32 rounding in the network."""
    assert wanted.abs().max() > 0.1
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("form", ["bare", "safetensors", "training", "legacy"])
def test_repa_checkpoints_become_runs(form, tmp_path):
    state = released.random_state()
    content = {**state, **released.projectors()}
    if form in ("training", "legacy"):
        content = released.repa_training(content, enc_type="dinov2-vit-b", encoder_depth=1, proj_coeff=0.25)
    if form == "legacy":
        content = released.legacy(content, depth=1)
    code, run = convert(content, tmp_path, name="last.safetensors" if form == "safetensors" else "last.pt")
    assert code == 0
    check(latents(run, "euler", 3), released.repa_euler(state, NOISE, LABELS, 3))
    config = TrainConfig.load(run / layout.CONFIG)
    checkpoint = load_checkpoint(run)
    if form in ("bare", "safetensors"):
        assert (checkpoint.step, checkpoint.projectors, config.alignments) == (0, {}, ())
        with pytest.raises(UserError, match="has no weights 'model' at step 0: choose ema"):
            load_run(run, "model")
    else:
        (alignment,) = config.alignments
        assert (alignment.key, alignment.weight, alignment.projector) == ("dinov2-b@1", 0.25, "mlp:width=16")
        ours = checkpoint.projectors["dinov2-b@1.projector.2.bias"]
        assert torch.equal(ours, released.projectors()["projectors.0.2.bias"])
        assert len(checkpoint.projectors) == 6
        assert checkpoint.step == 30
        raw = {key: value + 0.01 for key, value in state.items()}
        check(latents(run, "euler", 3, "model"), released.repa_euler(raw, NOISE, LABELS, 3))


def test_projectors_of_a_bare_file_need_a_named_target(tmp_path, capsys):
    content = {**released.random_state(), **released.projectors(number=2)}
    code, run = convert(content, tmp_path, "--targets", "dinov2-b", "tiny", "--depth", "2")
    assert code == 0
    assert [a.key for a in TrainConfig.load(run / layout.CONFIG).alignments] == ["dinov2-b@2", "tiny@2"]
    assert torch.equal(load_checkpoint(run).projectors["tiny@2.projector.4.bias"], content["projectors.1.4.bias"])
    (tmp_path / "other").mkdir()
    capsys.readouterr()
    assert convert(content, tmp_path / "other")[0] == 0
    assert "Its projectors (2) were dropped" in capsys.readouterr().out
    for options, sentence in [
        (("--targets", "tiny", "--depth", "2"), "has 2 projectors, but got 1 encoders"),
        (("--targets", "tiny", "dinov2-b"), "does not record the block of its projectors"),
    ]:
        assert convert(content, tmp_path, *options)[0] == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("training", [True, False])
def test_sit_checkpoints_become_runs(training, tmp_path):
    state = released.random_state(learn_sigma=True)
    code, run = convert(released.sit_training(state) if training else state, tmp_path, "--kind", "sit")
    assert code == 0
    check(latents(run, "euler", 3), released.sit_euler(state, NOISE, LABELS, 3))
    config = TrainConfig.load(run / layout.CONFIG)
    assert (config.model.name, config.diffusion.path, config.model.learn_sigma) == ("SiT-S/4", "linear", False)


@pytest.mark.parametrize("training", [True, False])
def test_dit_checkpoints_become_runs(training, tmp_path):
    state = released.random_state(learn_sigma=True)
    code, run = convert(released.dit_training(state) if training else state, tmp_path, "--kind", "dit")
    assert code == 0
    check(latents(run, "ddim", 4), released.dit_ddim(state, NOISE, LABELS, 4))
    config = TrainConfig.load(run / layout.CONFIG)
    assert (config.model.name, config.diffusion.objective) == ("DiT-S/4", "ddpm")


@pytest.mark.parametrize(
    ("kind", "said", "path"),
    [("repa", "cosine", "trigonometric"), ("sit", "GVP", "trigonometric"), ("sit", "VP", "vp")],
)
def test_the_path_comes_from_the_file(kind, said, path, tmp_path):
    state = released.random_state()
    torch.save(released.sit_training(state, path_type=said), tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt", kind, num_heads=2).settings["diffusion"] == {"path": path}
    given = read_checkpoint(tmp_path / "c.pt", kind, num_heads=2, path="linear")
    assert given.settings["diffusion"] == {"path": "linear"}


@pytest.mark.parametrize(
    "lie",
    [
        {"path_type": []}, {"path_type": {}}, {"path_type": 3}, {"prediction": [1]}, {"encoder_depth": []}, {"encoder_depth": -1},
        {"encoder_depth": 10**9}, {"encoder_depth": "1"}, {"proj_coeff": "x"}, {"proj_coeff": float("nan")}, {"proj_coeff": -1.0},
        {"proj_coeff": 10**400}, {"enc_type": "os.system"}, {"enc_type": "../.."}, {"enc_type": ","},
    ],
)  # fmt: skip
def test_contradicting_arguments_give_a_one_line_error(lie, tmp_path, capsys):
    content = {**released.random_state(), **released.projectors(number=1)}
    told = {"enc_type": "tiny", "encoder_depth": 1, "proj_coeff": 0.5, **lie}
    assert convert(released.repa_training(content, **told), tmp_path)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("repa: ")


@pytest.mark.parametrize("steps", [-1, 10**30, True, "7", float("inf")])
def test_impossible_step_numbers_are_ignored(steps, tmp_path):
    code, run = convert({"ema": released.random_state(), "steps": steps}, tmp_path)
    assert (code, layout.checkpoint_steps(run)) == (0, [0])


def test_the_alignment_weight_is_divided_among_encoders(tmp_path):
    """REPA averages its alignment loss over encoders, while ours is a sum."""
    content = {**released.random_state(), **released.projectors(number=2)}
    torch.save(
        released.repa_training(content, enc_type="dinov2-vit-b,tiny", encoder_depth=1, proj_coeff=0.6),
        tmp_path / "a.pt",
    )
    torch.save(released.repa_training(content, enc_type="dinov2-vit-b,tiny", encoder_depth=1), tmp_path / "b.pt")
    told, untold = (
        read_checkpoint(tmp_path / name, "repa", num_heads=2).settings["alignments"] for name in ("a.pt", "b.pt")
    )
    assert [a["weight"] for a in told] == [0.3, 0.3]
    assert [a["weight"] for a in untold] == [0.25, 0.25]


def raw_of(state):
    return {key: value + 0.01 for key, value in state.items()}


STATE = released.random_state()
LIT = {f"model.{key}": value for key, value in raw_of(STATE).items()} | {
    f"ema_model.{key}": value for key, value in STATE.items()
}
AVERAGES = {
    "ema": {"ema": STATE, "model": raw_of(STATE)},
    "model_ema": {"model_ema": STATE, "model": raw_of(STATE)},
    "ema_model": {"ema_model": STATE, "net": raw_of(STATE)},
    "ema_state_dict": {"ema_state_dict": STATE, "state_dict": raw_of(STATE)},
    "state_dict_ema": {"state_dict": raw_of(STATE), "state_dict_ema": STATE},
    "modelEma": {"model": raw_of(STATE), "modelEma": {"model": STATE}},
    "shadow": {"model": raw_of(STATE), "ema": {"decay": 0.9999, "num_updates": 3, "shadow": STATE}},
    "averaged": {"model": raw_of(STATE), "averaged_model": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in STATE.items()}}},
    "swa": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in STATE.items()}},
    "lucidrains": {"ema": {"step": torch.tensor(3), "initted": torch.tensor(True), **{f"ema_model.{k}": v for k, v in STATE.items()},
                           **{f"online_model.{k}": v for k, v in raw_of(STATE).items()}}},
    "lightning": {"state_dict": LIT, "global_step": 30, "callbacks": {}},
    "latent-diffusion": {"state_dict": {f"model.net.{key}": value for key, value in raw_of(STATE).items()}
                         | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
                         | {"model_ema.net" + key.replace(".", ""): value for key, value in STATE.items()}},
    "inside": {"checkpoint": {"state_dict": {"module": {"model": STATE}}}},
    "optimizer": {"model": STATE, "optimizer": {"exp_avg": raw_of(STATE)}},
}  # fmt: skip


@pytest.mark.parametrize("name", list(AVERAGES))
def test_the_average_is_found_under_every_known_name(name, tmp_path, capsys):
    code, run = convert(AVERAGES[name], tmp_path)
    assert code == 0, capsys.readouterr().err
    checkpoint = load_checkpoint(run)
    assert all(torch.equal(checkpoint.ema[key], STATE[key]) for key in STATE)
    if name not in ("swa", "inside", "optimizer"):
        assert all(torch.equal(checkpoint.model[key], value) for key, value in raw_of(STATE).items())
        assert "raw weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model.", "module.model.", "model._orig_mod."],
)
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path):
    code, run = convert({"ema": {prefix + key: value for key, value in STATE.items()}}, tmp_path)
    assert code == 0
    assert load_checkpoint(run).ema.keys() == STATE.keys()


def test_a_tensor_with_and_without_a_wrapper_is_ambiguous(tmp_path, capsys):
    wrapped = {"module." + key: value for key, value in STATE.items()}
    assert convert({"ema": {**STATE, **wrapped}}, tmp_path)[0] == 0
    (tmp_path / "two").mkdir()
    changed = {**wrapped, "module.pos_embed": STATE["pos_embed"] + 1}
    assert convert({"ema": {**STATE, **changed}}, tmp_path / "two")[0] == 2
    assert "holds 'pos_embed' twice with different values, once as 'module.pos_embed'" in capsys.readouterr().err


def test_a_missing_or_ambiguous_average_is_reported(tmp_path, capsys):
    assert convert({"ema": None, "model": STATE}, tmp_path)[0] == 0
    assert "'ema' has no named tensors, so the raw weights are used" in capsys.readouterr().out
    part = {"ema": {"pos_embed": STATE["pos_embed"]}, "model": STATE}
    assert convert(part, tmp_path)[0] == 2
    assert "an average 'ema' that is no whole network: it has no 'x_embedder" in capsys.readouterr().err
    (tmp_path / "raw").mkdir()
    assert convert(part, tmp_path / "raw", "--weights", "model")[0] == 0
    two = {"ema_0": STATE, "ema_1": raw_of(STATE)}
    (tmp_path / "two").mkdir()
    assert convert(two, tmp_path / "two")[0] == 2
    assert "contains several networks, 'ema_0', 'ema_1'" in capsys.readouterr().err
    assert convert(two, tmp_path / "two", "--weights", "ema_2")[0] == 2
    code, run = convert(two, tmp_path / "two", "--weights", "ema_1")
    assert code == 0
    assert torch.equal(load_checkpoint(run).ema["pos_embed"], STATE["pos_embed"] + 0.01)


@pytest.mark.parametrize(
    ("saved", "kind", "right"),
    [
        (released.sit_training, "dit", "sit"), (released.sit_training, "repa", "sit"), (released.dit_training, "sit", "dit"),
        (released.repa_training, "sit", "repa"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_code_is_refused(saved, kind, right, tmp_path, capsys):
    """Its tensors have the right shapes, but its time runs backwards, or it predicts something else."""
    state = released.random_state(learn_sigma=True)
    assert convert(saved(state), tmp_path, "--kind", kind)[0] == 2
    assert f"saved by the code of kind {right!r}" in capsys.readouterr().err


def test_converted_runs_sample_like_the_released_code(tmp_path, capsys):
    """By default guided channels and sampler follow the released script, and a line says so."""
    code, run = convert(released.random_state(learn_sigma=True), tmp_path, "--kind", "sit")
    assert code == 0
    for number, (options, sampler, guidance) in enumerate([
        ((), "euler_maruyama:diffusion=2sigma", []),
        (("--guidance", "cfg:scale=2"), "euler_maruyama:diffusion=2sigma", ["cfg:scale=2,channels=3"]),
        (("--guidance", "cfg:scale=2,channels=1"), "euler_maruyama:diffusion=2sigma", ["cfg:scale=2,channels=1"]),
    ]):  # fmt: skip
        out = tmp_path / f"{number}.npz"
        capsys.readouterr()
        assert repa(["sample", str(run), "--num-images", "2", "--steps", "2", "--out", str(out), *options]) == 0
        made = json.loads(out.with_suffix(".json").read_text())
        assert (made["sampler"], made["guidance"]) == (sampler, guidance)
        assert "converted from a checkpoint of kind sit" in capsys.readouterr().out
    exported, again = tmp_path / "exported", tmp_path / "again"
    assert repa(["export", str(run), str(exported)]) == 0
    assert repa(["convert", str(exported), str(again)]) == 0
    for folder, kind in ((run, "sit"), (again, "sit")):
        assert json.loads((folder / layout.ORIGIN).read_text())["kind"] == kind
    (tmp_path / "dit").mkdir()
    _, dit = convert(released.random_state(learn_sigma=True), tmp_path / "dit", "--kind", "dit")
    config, said = SampleConfig(guidance=("cfg:scale=1.5",)).as_origin_of(dit)
    assert (config.sampler, config.guidance) == ("ddpm", ("cfg:scale=1.5,channels=3",))
    assert said


def test_a_named_model_size_needs_no_number_of_heads(tmp_path, monkeypatch):
    monkeypatch.setattr("repa.base.weights.MOST_VIEWS", 2**20)  # the file repeats one number, to be small
    small = {"hidden_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 8, "latent_size": 8, "latent_channels": 4}
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in released.DiT(**small, num_classes=3).state_dict().items()}
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "c.pt")
    model = read_checkpoint(tmp_path / "c.pt", "repa").settings["model"]
    block = {"norm": "layer", "mlp": "gelu", "qk_norm": "none", "bias": True, "rotary": False}
    assert model == {
        "name": "SiT-S/8",
        "latent_size": 8,
        "latent_channels": 4,
        "num_classes": 3,
        "patch_overlap": 0,
        **block,
    }


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_mistakes_give_one_line_errors(tmp_path, capsys):
    two, one = released.random_state(learn_sigma=True), released.random_state()
    wide = released.random_state(mlp_ratio=2.0)
    for content, options, sentence in [
        (one, ("--model.num-heads", "0"), "The option is --model.num-heads."),
        (two, (), "give --kind sit or --kind dit"),
        (one, ("--kind", "dit"), "give --kind repa or sit"),
        (two, ("--kind", "dit", "--path", "linear"), "A DiT has no choice of path"),
        (wide, (), "MLP ratio 2"),
        (released.sit_training(one, prediction="noise"), ("--kind", "sit"), "only networks that predict velocity"),
        (released.repa_training(one, path_type="edm"), (), "unknown path 'edm'"),
        (one, ("--path", "liner"), "Did you mean 'linear'"),
        (one, ("--autoencoder", "pixel"), "Did you mean 'pixels'"),
        ({"ema": Payload(), "model": one}, (), "class exec, which is not read"),
        (
            {**one, "pos_embed": one["pos_embed"] * float("nan")},
            (),
            "tensor 'pos_embed' has numbers that are not finite",
        ),
        ({**one, "pos_embed": one["pos_embed"].long()}, (), "tensor 'pos_embed' has the type int64"),
        ({**one, "pos_embed": one["pos_embed"].cfloat()}, (), "tensor 'pos_embed' has the type complex64"),
        (
            {**one, "pos_embed": one["pos_embed"].to(torch.float8_e5m2)},
            (),
            "tensor 'pos_embed' has the type float8_e5m2",
        ),
        (one | {f"blocks.{10**9}.a": torch.ones(1)}, (), "1000000001 blocks"),
    ]:
        assert convert(content, tmp_path, *options)[0] == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert convert(one, tmp_path)[0] == 0
    assert convert(one, tmp_path)[0] == 0  # converting again finds the existing run
    assert convert({key: value + 1 for key, value in one.items()}, tmp_path)[0] == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert repa(["convert", str(tmp_path / "absent.pt"), str(tmp_path / "new")]) == 2
    assert "There is no file or folder" in capsys.readouterr().err


def test_a_converted_run_contains_all_weights(tmp_path):
    state = {**released.random_state(), **released.projectors()}
    _, run = convert(released.repa_training(state), tmp_path)
    assert sorted(p.name for p in run.iterdir()) == [layout.CHECKPOINTS, layout.CONFIG, layout.ORIGIN]
    ema = load_file(layout.checkpoint_folder(run, 30) / layout.EMA_FILE)
    assert ema.keys() | released.projectors().keys() == state.keys()
    assert all(torch.equal(ema[key], state[key]) for key in ema)


def test_a_converted_run_works_with_the_other_commands(data_folder, tmp_path, capsys):
    _, run = convert(released.repa_training(released.random_state()), tmp_path)
    out = tmp_path / "rows.json"
    analyse = [
        "analyse",
        "cknna",
        run,
        "--data",
        data_folder,
        "--num-images",
        24,
        "--encoder",
        "tiny",
        "--times",
        0.5,
        "--out",
        out,
    ]
    assert repa([str(word) for word in analyse]) == 0
    found = json.loads(out.read_text())
    assert {row["step"] for row in found["rows"]} == {30}
    assert [row["depth"] for row in found["rows"]] == [1, 2]
    assert repa(["sample", str(run), "--num-images", "2", "--steps", "2", "--out", str(tmp_path / "s.npz")]) == 0
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["arr_0"].shape == (2, 16, 16, 3)
    capsys.readouterr()
    assert repa(["show", str(run)]) == 0
    assert "checkpoints 30" in capsys.readouterr().out
