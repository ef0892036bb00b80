"""Loading a network from its run folder: the same weights as in memory, and errors for missing files."""

import shutil

import pytest
import torch
import yaml

from repa.base.errors import UserError
from repa.data import open_data
from repa.runs import layout, load_run
from repa.training import train
from tests.calls import call


@pytest.fixture(scope="module")
def trained(tiny_config, data_folder, tmp_path_factory):
    """A run folder, and the state in memory at the end of training."""
    run, states = tmp_path_factory.mktemp("runs") / "r", []
    config = tiny_config.override(num_steps=4, save_every=2, optimizer={"learning_rate": 1e-2})
    train(
        config, open_data(data_folder), run, device=torch.device("cpu"), progress=states.append, say=lambda text: None
    )
    return run, states[-1]


@pytest.fixture
def copy(random_run, tmp_path):
    return shutil.copytree(random_run, tmp_path / "elsewhere")


def inputs(num=3):
    stream = torch.Generator().manual_seed(0)
    return torch.randn(num, 3, 16, 16, generator=stream), torch.rand(num, generator=stream), torch.tensor([0, 1, 2])


def test_a_run_folder_restores_the_trained_network(trained, tmp_path):
    run, state = trained
    moved = shutil.copytree(run, tmp_path / "moved")
    for weights, network in (("ema", state.ema.model), ("model", state.model)):
        loaded = load_run(moved, weights)
        assert (loaded.step, loaded.weights, loaded.folder) == (4, weights, moved)
        with torch.no_grad():
            wanted = call(network, *inputs()).prediction
        assert wanted.abs().max() > 0
        assert torch.equal(call(loaded.model, *inputs()).prediction, wanted)


def test_a_loaded_network_is_frozen_and_in_eval_mode(random_run):
    loaded = load_run(random_run)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.latent_shape == (3, 16, 16)
    assert loaded.class_names == ("dark", "light")
    assert (loaded.autoencoder.name, loaded.diffusion.path) == ("pixels", "linear")
    path = loaded.path(torch.tensor(0.25))
    assert (float(path.alpha), float(path.sigma)) == (0.75, 0.25)


def test_the_denoiser_includes_labels_and_guidance(random_run):
    loaded = load_run(random_run)
    x, _, _ = inputs()
    labels, null = torch.tensor([0, 1, 0]), torch.full((3,), loaded.model.null_label)
    t = torch.full((3,), 0.3)
    conditional, unconditional = (call(loaded.model, x, t, y).prediction for y in (labels, null))
    torch.testing.assert_close(loaded.denoiser(labels).velocity(x, 0.3), conditional)
    guided = loaded.denoiser(labels, ["cfg:scale=2.5,high=0.4"])
    torch.testing.assert_close(guided.velocity(x, 0.3), unconditional + 2.5 * (conditional - unconditional))
    t = torch.full((3,), 0.5)
    torch.testing.assert_close(guided.velocity(x, 0.5), call(loaded.model, x, t, labels).prediction)


def test_steps_and_weights_can_be_chosen(random_run):
    outputs = [
        call(load_run(random_run, weights, step=step).model, *inputs()).prediction
        for step in (10, 20)
        for weights in ("ema", "model")
    ]
    newest = call(load_run(random_run).model, *inputs()).prediction
    assert [torch.equal(output, newest) for output in outputs] == [False, False, True, False]


def test_loading_does_not_change_the_folder(random_run):
    before = {path: path.stat().st_mtime_ns for path in random_run.rglob("*")}
    load_run(random_run)
    assert before == {path: path.stat().st_mtime_ns for path in random_run.rglob("*")}


def test_unknown_weights_and_steps_are_refused(random_run):
    with pytest.raises(UserError, match="has no weights 'best' at step 20: choose ema, model,"):
        load_run(random_run, "best")
    with pytest.raises(UserError, match="no checkpoint of step 15: there are 10, 20"):
        load_run(random_run, step=15)


def test_folders_without_a_run_or_checkpoint_are_refused(copy, tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a checkpoint, not a run folder: give .*`--checkpoint 20` selects it"):
        load_run(copy / layout.CHECKPOINTS / "0000020")
    shutil.rmtree(copy / layout.CHECKPOINTS)
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(copy)


def test_a_damaged_checkpoint_is_refused(copy):
    path = layout.checkpoint_folder(copy, 20) / layout.EMA_FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"ema\.safetensors is damaged"):
        load_run(copy)
    assert load_run(copy, step=10).step == 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda config: config.pop("diffusion"), "lacks the setting 'diffusion'"),
        (lambda config: config["model"].update(depth=3), "do not fit the network"),
        (lambda config: config["model"].update(widht=3), "unknown setting 'widht'"),
        # sizes of gigabytes, which must not be allocated
        (lambda config: config["model"].update(latent_size=65_536), "do not fit the network"),
        (lambda config: config["model"].update(hidden_dim=65_536, num_heads=64), "do not fit the network"),
        (lambda config: config["model"].update(num_classes=10_000_000), "do not fit the network"),
        (lambda config: config["model"].update(latent_channels=65_536), "do not fit the network"),
        (lambda config: config["model"].update(depth=1_000), "do not fit the network"),
        (lambda config: config["model"].update(latent_size=0), "do not fit the network"),
        # settings that do not change tensor shapes
        (
            lambda config: config["model"].update(num_heads=4),
            "has model.num_heads: 4, but the checkpoint of step 20 has model.num_heads: 2",
        ),
        (lambda config: config.update(label_dropout=0.5), "has label_dropout: 0.5"),
        # parts that are read without a configuration class
        (lambda config: config.update(label_dropout=2), "'label_dropout' has the impossible value '2'"),
        (lambda config: config.update(feature_weights={"tiny": 3}), "'feature_weights' has the impossible value"),
        (lambda config: config.update(alignments=[3]), "'alignments' has the impossible value"),
        (lambda config: config["diffusion"].update(path="trigonometric"), "has diffusion.path: 'trigonometric'"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(change, sentence, copy):
    config = yaml.safe_load((copy / layout.CONFIG).read_text())
    change(config)
    (copy / layout.CONFIG).write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=sentence):
        load_run(copy)


@pytest.mark.parametrize("text", ["[1, 2]", "model: [", "\x00"])
def test_a_configuration_that_is_not_a_mapping_is_refused(text, copy):
    (copy / layout.CONFIG).write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_run(copy)
