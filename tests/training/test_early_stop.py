"""HASTE's early stop of alignment (arXiv 2505.16792): unchanged before it, without encoder and term after it."""

import pytest
import torch
from safetensors.torch import load_file

from repa.data import PrepareConfig, open_data, prepare
from repa.runs import layout, read_metrics
from repa.training import inputs, train


@pytest.fixture(scope="module")
def images_only(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    prepare(str(image_folder), folder, PrepareConfig(resolution=16, shard_size=16))
    return folder


def rows(run):
    return [row for row in read_metrics(run) if row["kind"] == "train"]


def start(config, data, run):
    train(config, open_data(data), run, device=torch.device("cpu"), say=lambda text: None)
    return rows(run)


def test_alignment_and_its_encoder_stop_together(tiny_config, images_only, tmp_path, monkeypatch):
    seen = []

    def load(*arguments, **options):
        encoder = load_encoder(*arguments, **options)
        encoder.register_forward_hook(lambda *_: seen.append(1))
        return encoder

    load_encoder = inputs.load_encoder
    monkeypatch.setattr(inputs, "load_encoder", load)
    (term,) = tiny_config.alignments
    stopped = tiny_config.override(alignments=(term.override(schedule="stop:step=4"),), num_steps=7, save_every=7)
    mine = start(stopped, images_only, tmp_path / "stopped")
    assert len(seen) == 4
    assert ["alignment" in row for row in mine] == [True] * 4 + [False] * 3
    assert all(row["loss"] == row["denoising"] for row in mine[4:])

    always = start(tiny_config.override(num_steps=7, save_every=7), images_only, tmp_path / "always")
    assert len(seen) == 4 + 7
    assert [row["loss"] for row in mine[:4]] == [row["loss"] for row in always[:4]]
    assert mine[4]["denoising"] == always[4]["denoising"]  # the weights before step 5 are equal

    start(stopped.override(num_steps=5), images_only, tmp_path / "halves")  # resumed after the stop
    assert [row["loss"] for row in start(stopped, images_only, tmp_path / "halves")] == [row["loss"] for row in mine]
    whole, halves, aligned = (
        load_file(layout.checkpoint_folder(tmp_path / n, 7) / layout.EMA_FILE) for n in ("stopped", "halves", "always")
    )
    assert all(torch.equal(value, halves[key]) for key, value in whole.items())
    assert any(not torch.equal(value, aligned[key]) for key, value in whole.items())


def test_a_plateau_stops_a_resumed_run_at_the_same_step(tiny_config, images_only, tmp_path):
    """No loss falls by 10 in two steps, so the term stops after its second span, also in a resumed run."""
    (term,) = tiny_config.alignments
    config = tiny_config.override(
        alignments=(term.override(schedule="plateau:span=2,gain=10"),), num_steps=7, save_every=1
    )
    whole = start(config, images_only, tmp_path / "whole")
    assert ["alignment" in row for row in whole] == [True] * 4 + [False] * 3
    start(config.override(num_steps=3), images_only, tmp_path / "parts")
    parts = start(config, images_only, tmp_path / "parts")
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    start(config.override(num_steps=5), images_only, tmp_path / "after")
    after = start(config, images_only, tmp_path / "after")
    assert [row["loss"] for row in after] == [row["loss"] for row in whole]
