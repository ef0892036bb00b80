"""`repa train --init` from a run, an export or a released file: what is kept, what is new, what is refused."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from repa.cli.main import run as repa
from repa.data import PrepareConfig, prepare
from repa.models.layers import sincos_positions
from repa.models.published import FIRST_TIME_LAYER
from repa.runs import layout, load_checkpoint, load_run, read_metrics
from tests.calls import call
from tests.oracles import released
from tests.oracles.published import sit_velocity

TABLE = "y_embedder.embedding_table.weight"
STILL = ("--num-steps", "1", "--optimizer.learning-rate", "1e-30")  # too small to change float32 weights


def same(a, b):
    """Equal, except for zeros, which one step of STILL does change."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-20)


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(tiny_config.to_yaml())
    return path


@pytest.fixture
def tune(recipe, data_folder, tmp_path):
    """(init, *options) -> exit code and run folder of a fine-tuning run."""

    def command(init, *options, data=data_folder, out="new"):
        argv = ["train", recipe, "--data", data, "--out", tmp_path / out, "--init", init, *options]
        return repa([str(word) for word in argv]), tmp_path / out

    return command


@pytest.fixture(scope="module")
def other_data(tmp_path_factory, image_folder):
    """Three classes at 32 pixels with the tokens of tiny, so that labels and grid differ."""
    root = tmp_path_factory.mktemp("three")
    shutil.copytree(image_folder, root / "images")
    shutil.copytree(root / "images" / "dark", root / "images" / "black")
    prepare(str(root / "images"), root / "data", PrepareConfig(resolution=32, features=("tiny",)))
    return root / "data"


def test_fine_tuning_starts_from_the_average_and_keeps_the_projector(random_run, tune):
    code, new = tune(random_run, *STILL, "--seed", "1")  # another seed, so that a new projector would differ
    assert code == 0
    before, after = load_checkpoint(random_run), load_checkpoint(new)
    for key, value in before.ema.items():
        assert torch.equal(after.model[key], value)
        assert torch.equal(after.ema[key], value)
    assert before.projectors
    for key, value in before.projectors.items():
        assert same(after.projectors[key], value)
    assert yaml.safe_load((new / layout.CONFIG).read_text())["init"] == str(random_run)


def test_the_projector_is_new_where_it_does_not_match(random_run, tune):
    before = load_checkpoint(random_run).projectors
    for out, options in {
        "deeper": ("--alignments.0.depth", "2"),
        "wider": ("--alignments.0.projector", "mlp:width=24"),
    }.items():
        code, new = tune(random_run, *STILL, *options, out=out)
        assert code == 0
        scratch, plain = tune("", *STILL, *options, out=f"{out}-scratch")
        assert scratch == 0
        fresh, wanted = load_checkpoint(new).projectors, load_checkpoint(plain).projectors
        assert all(same(value, wanted[key]) for key, value in fresh.items())
        (last,) = (key for key in fresh if key.endswith("projector.4.weight"))
        assert not same(fresh[last], before["tiny@1.projector.4.weight"])


def test_alignment_can_be_added_to_a_released_network(tune, tmp_path):
    state = released.random_state(learn_sigma=True)
    torch.save(released.sit_training(state), tmp_path / "sit.pt")
    command = [
        "convert",
        tmp_path / "sit.pt",
        tmp_path / "run",
        "--kind",
        "sit",
        "--model.num-heads",
        2,
        "--autoencoder",
        "pixels",
    ]
    assert repa([str(word) for word in command]) == 0
    outputs = []
    x = torch.randn(2, 3, 16, 16)
    for out, init in (("a", f"sit:{tmp_path / 'sit.pt'}"), ("b", tmp_path / "run")):
        code, new = tune(init, *STILL, out=out)
        assert code == 0
        assert load_checkpoint(new).projectors
        outputs.append(call(load_run(new).model, x, torch.tensor([0.2, 0.7]), torch.tensor([0, 2])).prediction)
    expected = -sit_velocity(state, x, torch.tensor([0.8, 0.3]), torch.tensor([0, 2]), 2)
    for output in outputs:
        torch.testing.assert_close(output, expected.float(), rtol=1e-3, atol=1e-4)


def test_a_dit_is_fine_tuned_with_its_own_objective(tune, tmp_path):
    state = released.random_state(learn_sigma=True)
    torch.save(released.dit_training(state), tmp_path / "dit.pt")
    options = ("--model.name", "DiT-S/4", "--diffusion.objective", "ddpm")
    code, new = tune(f"dit:{tmp_path / 'dit.pt'}", *STILL, *options)
    assert code == 0
    checkpoint = load_checkpoint(new)
    assert all(torch.equal(value, state[key]) for key, value in checkpoint.ema.items())
    assert checkpoint.projectors  # aligned, unlike any released DiT


def test_a_released_projector_is_kept_when_the_file_names_it(tune, tmp_path):
    content = {**released.random_state(), **released.projectors(features=released_features())}
    torch.save(released.repa_training(content, enc_type="tiny", encoder_depth=1), tmp_path / "repa.pt")
    code, new = tune(f"repa:{tmp_path / 'repa.pt'}", *STILL)
    assert code == 0
    assert torch.equal(load_checkpoint(new).projectors["tiny@1.projector.4.bias"], content["projectors.0.4.bias"])


def released_features():
    from repa.encoders import load_encoder

    return load_encoder("tiny").dim


def test_classes_and_resolution_may_change(random_run, other_data, tune):
    code, new = tune(random_run, *STILL, data=other_data)
    assert code == 0
    before, after = load_checkpoint(random_run).ema, load_checkpoint(new).model
    assert after["pos_embed"].shape == (1, 64, 32)
    assert torch.equal(after["pos_embed"], sincos_positions(32, (8, 8)))
    assert after[TABLE].shape == (4, 32)
    assert torch.equal(after[TABLE][-1], before[TABLE][-1])
    _, plain = tune("", *STILL, data=other_data, out="plain")
    assert torch.equal(after[TABLE][:3], load_checkpoint(plain).model[TABLE][:3])
    rest = before.keys() - {TABLE, "pos_embed"}
    assert all(torch.equal(after[key], before[key]) for key in rest)


@pytest.mark.parametrize(("form", "tolerance"), [("safetensors", 0), ("diffusers", 1e-5)])
def test_fine_tuning_starts_from_an_export(random_run, tune, tmp_path, form, tolerance):
    assert repa(["export", str(random_run), str(tmp_path / "exported"), "--format", form]) == 0
    code, new = tune(tmp_path / "exported", *STILL)
    assert code == 0
    before = load_checkpoint(random_run).ema
    before.pop(FIRST_TIME_LAYER)  # of other frequencies in diffusers
    after = load_checkpoint(new).model
    assert all(torch.allclose(after[key], value, rtol=0, atol=tolerance) for key, value in before.items())


def test_the_same_command_resumes_without_the_starting_network(random_run, tune, tmp_path):
    start = shutil.copytree(random_run, tmp_path / "start")
    _, whole = tune(start, "--num-steps", "4", out="whole")
    _, halves = tune(start, "--num-steps", "2", out="halves")
    shutil.rmtree(start)
    code, _ = tune(start, "--num-steps", "4", out="halves")
    assert code == 0
    for name in (layout.MODEL_FILE, layout.EMA_FILE, layout.PROJECTORS_FILE):
        a, b = (load_file(layout.checkpoint_folder(run, 4) / name) for run in (whole, halves))
        assert all(torch.equal(a[key], b[key]) for key in a)
    # it was trained
    assert not torch.equal(load_checkpoint(whole).model[TABLE], load_checkpoint(random_run).ema[TABLE])


def test_another_start_in_the_same_folder_is_refused(random_run, tune, tmp_path, capsys):
    assert tune(random_run, *STILL)[0] == 0
    assert tune("", *STILL)[0] == 2
    assert "holds a run with another configuration (init:" in capsys.readouterr().err


def test_a_converted_folder_is_not_resumed(recipe, data_folder, tmp_path, capsys):
    torch.save(released.random_state(), tmp_path / "last.pt")
    command = [
        "convert",
        str(tmp_path / "last.pt"),
        str(tmp_path / "run"),
        "--model.num-heads",
        "2",
        "--autoencoder",
        "pixels",
    ]
    assert repa(command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for name in (str(recipe), str(tmp_path / "run")):
        assert repa(["train", name, "--data", str(data_folder), "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert "was converted from last.pt" in error
        assert "fine-tune it in a new folder" in error
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--model.hidden-dim", "16"), "width 32 (here 16)"),
        (("--model.depth", "3"), "depth 2 (here 3)"),
        (("--model.num-heads", "4"), "heads 2 (here 4)"),
        (("--model.name", "SiT-S/2"), "patch 4 (here 2)"),
        (("--model.qk-norm", "rms"), "qk-norm none (here rms)"),
        (("--model.rotary",), "rotary False (here True)"),
        (("--model.rotary", "--model.positions", "false"), "rotary False (here True), fixed positions"),
        (("--model.name", "DiT-S/4", "--diffusion.objective", "ddpm"), "learned variance False (here True)"),
    ],
)
def test_a_network_of_another_size_is_refused(options, sentence, random_run, tune, capsys):
    code, new = tune(random_run, *STILL, *options)
    assert code == 2
    assert f"init is {random_run}, a network with {sentence}" in capsys.readouterr().err
    assert not new.exists()  # an error does not create the folder


def test_other_channels_are_refused(tune, tmp_path, capsys):
    torch.save(released.random_state(latent_channels=4), tmp_path / "r.pt")
    assert tune(f"repa:{tmp_path / 'r.pt'}", *STILL)[0] == 2
    assert "channels 4 (here 3)" in capsys.readouterr().err


def test_an_invalid_start_is_refused(random_run, tune, tmp_path, capsys):
    torch.save(released.random_state(), tmp_path / "last.pt")
    bare = shutil.copytree(random_run, tmp_path / "bare")
    shutil.rmtree(bare / layout.CHECKPOINTS)
    for init, sentence in [
        (tmp_path / "last.pt", "give its kind (repa:FILE, sit:FILE, dit:FILE)"),
        (tmp_path / "nothing", "nothing does not exist"),
        (f"sit:{bare}", f"is a folder: give --init {bare}"),
        (f"sit:{tmp_path / 'nothing.pt'}", "nothing.pt does not exist"),
        (bare, "has no checkpoint yet"),
    ]:
        code, new = tune(init, *STILL)
        assert code == 2
        assert sentence in capsys.readouterr().err
        assert not new.exists()


def test_a_lora_trains_only_its_updates_and_loads_as_a_plain_network(random_run, tune, tmp_path):
    options = ("--lora.rank", "2", "--num-steps", "3", "--optimizer.learning-rate", "0.01", "--ema-decay", "0.5")
    code, new = tune(random_run, *options)
    assert code == 0
    before, after = load_checkpoint(random_run), load_checkpoint(new)
    for key, value in before.ema.items():
        assert key == TABLE or torch.equal(after.model[key], value)  # frozen
    updates = [key for key in after.model if key.endswith("lora_B")]
    assert updates
    assert all(after.model[key].any() for key in updates)

    model = load_run(new).model  # merged, so without LoRA updates
    key = updates[0].removesuffix(".lora_B")
    merged = after.ema[f"{key}.weight"] + after.ema[f"{key}.lora_B"] @ after.ema[f"{key}.lora_A"]
    torch.testing.assert_close(model.state_dict()[f"{key}.weight"], merged)
    assert repa(["export", str(new), "--out", str(tmp_path / "exported")]) == 0
    assert not any("lora" in name for name in load_file(next((tmp_path / "exported").glob("*.safetensors"))))
    code, onwards = tune(new, *STILL, out="onwards")  # trains all weights, starting from the merged ones
    assert code == 0
    torch.testing.assert_close(load_checkpoint(onwards).model[f"{key}.weight"], merged)

    code, parts = tune(random_run, *options, "--num-steps", "1", out="parts")
    code, parts = tune(random_run, *options, out="parts")
    assert code == 0
    for name, value in after.ema.items():
        assert torch.equal(load_checkpoint(parts).ema[name], value)


def test_a_lora_needs_a_network_to_start_from(recipe, data_folder, tmp_path, capsys):
    argv = ["train", recipe, "--data", data_folder, "--out", tmp_path / "new", "--lora.rank", "2"]
    assert repa([str(word) for word in argv]) == 2
    assert "LoRA needs a trained network" in capsys.readouterr().err


def test_epochs_limit_training_on_small_data(random_run, tune, capsys):
    code, new = tune(random_run, "--epochs", "2", "--num-steps", "1000", "--batch-size", "6")
    assert code == 0
    # two epochs of 40 images, 6 per step
    assert load_checkpoint(new).step == layout.read_config(new)["num_steps"] == 14
    assert "2 epochs of 40 images are 14 steps" in capsys.readouterr().out


def test_the_recipe_for_few_images_fine_tunes_a_run(random_run, data_folder, tmp_path, capsys):
    small = ("--model.name", "SiT-S/4", "--model.hidden-dim", "32", "--model.depth", "2", "--model.num-heads", "2")
    term = ("--alignments.0.target", "tiny", "--alignments.0.depth", "1")
    argv = ["train", "finetune-256", "--data", data_folder, "--out", tmp_path / "new", *small, *term]
    assert repa([str(word) for word in argv]) == 2
    assert "give --init RUN" in capsys.readouterr().err
    short = ("--init", random_run, "--epochs", "1", "--preview.every", "0", "--lora.rank", "2")
    assert repa([str(word) for word in (*argv, *short, "--log-every", "1")]) == 0, capsys.readouterr().err
    assert load_checkpoint(tmp_path / "new").step == 2  # 40 images, 32 per step
    row = next(row for row in read_metrics(tmp_path / "new") if row["kind"] == "train")
    assert 0 < row["alignment"]["tiny@1"] < 4
