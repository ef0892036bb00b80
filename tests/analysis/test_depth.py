"""The effect of skipping a block, compared with a network in which the block does nothing."""

import copy
from dataclasses import replace

import pytest
import torch

from repa.analysis import depth_effects
from repa.analysis.blocks import without_block
from repa.analysis.config import DepthConfig
from repa.base.errors import UserError
from repa.cli.main import run as repa
from repa.data import open_data
from repa.models import Condition, DiT
from repa.runs import load_run

CONFIG = DepthConfig(num_images=6, times=(0.3, 0.8), batch_size=4)


@pytest.fixture(scope="module")
def run(random_run):
    return load_run(random_run)


def test_skipping_a_block_equals_closing_its_gates(run, data_folder):
    """A block whose gates are zero returns its input, so skipping it changes nothing."""
    rows = depth_effects(run, open_data(data_folder), CONFIG)
    assert [(row["t"], row["depth"]) for row in rows] == [(t, depth) for t in (0.3, 0.8) for depth in (1, 2)]
    assert all(row["change"] > 1e-3 for row in rows)
    for t in (0.3, 0.8):
        assert sum(row["share"] for row in rows if row["t"] == t) == pytest.approx(1)
    silent = copy.deepcopy(run.model)
    for p in silent.blocks[1].adaLN_modulation.parameters():
        torch.nn.init.zeros_(p)
    quiet = depth_effects(replace(run, model=silent), open_data(data_folder), CONFIG)
    assert [row["change"] for row in quiet if row["depth"] == 2] == pytest.approx([0.0, 0.0], abs=1e-7)


def test_the_batch_size_does_not_matter_and_hooks_are_removed(run, data_folder):
    data = open_data(data_folder)
    one, other = (depth_effects(run, data, CONFIG.override(batch_size=size)) for size in (2, 6))
    assert [row["change"] for row in one] == pytest.approx([row["change"] for row in other], rel=1e-5)
    assert not any(block._forward_hooks for block in run.model.blocks)
    with pytest.raises(UserError, match="no block 9"):
        depth_effects(run, data, CONFIG.override(depths=(9,)))


def test_a_network_with_a_noised_vector_is_refused(run, data_folder):
    sizes = {"latent_size": 4, "latent_channels": 4, "patch_size": 2, "hidden_dim": 8, "depth": 1, "num_heads": 1}
    model = DiT(**sizes, num_classes=2, streams={"class": 3})
    with pytest.raises(UserError, match="also noises class"):
        depth_effects(replace(run, model=model), open_data(data_folder), CONFIG)


def test_the_command_writes_rows_and_a_picture(random_run, data_folder, tmp_path, capsys):
    out = tmp_path / "depth.json"
    assert (
        repa(["analyse", "depth", str(random_run), "--data", str(data_folder), "--num-images", "4", "--out", str(out)])
        == 0
    )
    assert "share" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth.csv", "depth.json", "depth.png"]


def test_skipping_a_block_of_two_streams_keeps_both_streams(text_run):
    model = load_run(text_run).model
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[:2]))
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[:2]))
    state = {"x": torch.randn(2, *model.state_shapes["x"])}
    condition = model.completed(Condition(torch.zeros(2, dtype=torch.int64)))
    with without_block(model, 1):
        model(state, torch.full((2,), 0.5), condition)
    (before, after) = seen
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
