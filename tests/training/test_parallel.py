"""Two gloo processes with DDP or FSDP2 train like one, and runs resume with another number or strategy."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repa.alignment.config import AlignmentConfig
from repa.base.errors import UserError
from repa.data import open_data
from repa.runs import layout, read_metrics
from repa.training import train
from repa.training.parallel import mesh_sides
from repa.training.resolve import require_equal_parts
from tests.training.processes import probes, run_all

NUM_STEPS, HALF = 20, 10


@pytest.fixture(scope="module")
def config(tiny_config):
    """Several losses: nt_xent compares images of all processes; the projector of `tiny@1` has a bias of odd length."""
    alignments = (
        AlignmentConfig(target="tiny", depth=1, projector="mlp:width=15"),
        AlignmentConfig(target="tiny", depth=2, projector="linear", loss="nt_xent:temperature=0.2"),
        AlignmentConfig(target="ema:depth=2,earlier=0.2", depth=1, projector="mlp2", loss="smooth_l1", weight=0.2),
    )
    return tiny_config.override(
        alignments=alignments, num_steps=NUM_STEPS, save_every=HALF, keep_checkpoints=0, optimizer={"learning_rate": 1e-3},
        ema_decays=(0.5,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(config, data_folder, tmp_path_factory) -> Path:
    """Runs by name: `one` process, two with `ddp` and `fsdp`, and ten steps each in turn; `plain` has no NT-Xent."""
    folder = tmp_path_factory.mktemp("parallel")
    plain = config.override(alignments=config.alignments[:1])
    parts = plain.override(accumulate=2)

    def alone(config, name):
        device, silent = torch.device("cpu"), lambda text: None
        train(config, open_data(data_folder), folder / name, device=device, make_hooks=probes, say=silent)

    alone(config, "one")
    alone(plain, "plain")
    alone(config.override(num_steps=HALF), "one, then ddp")
    jobs = [
        (config, "ddp"), (config.override(parallel="fsdp"), "fsdp"), (config, "one, then ddp"),
        (config.override(num_steps=HALF), "ddp, then fsdp"), (config.override(parallel="fsdp"), "ddp, then fsdp"),
        (config.override(parallel="fsdp", num_steps=HALF), "fsdp, then one"),
        (parts, "in parts, ddp"), (parts.override(parallel="fsdp", async_save=True), "in parts, fsdp"),
    ]  # fmt: skip
    run_all([(config, data_folder, folder / name) for config, name in jobs], 2, folder)
    alone(config, "fsdp, then one")
    return folder


def rows(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == "train"]


def contents(run: Path) -> dict[str, torch.Tensor]:
    folder = layout.checkpoint_folder(run, NUM_STEPS)
    return {f"{p.name}/{key}": value for p in folder.glob("*.safetensors") for key, value in load_file(p).items()}


OTHERS = ("ddp", "fsdp", "one, then ddp", "ddp, then fsdp", "fsdp, then one")
PARTS = ("in parts, ddp", "in parts, fsdp")


@pytest.mark.parametrize(("name", "like"), [*((n, "one") for n in OTHERS), *((n, "plain") for n in PARTS)])
def test_losses_and_weights_equal_those_of_one_process(name, like, runs):
    mine, yours = rows(runs / name), rows(runs / like)
    assert [row["step"] for row in mine] == [row["step"] for row in yours] == list(range(1, NUM_STEPS + 1))
    for a, b in zip(mine, yours, strict=True):
        for key in ("loss", "denoising"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)
        assert a["alignment"] == pytest.approx(b["alignment"], abs=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
    probed, wanted = ([r["probe"] for r in read_metrics(runs / n) if r["kind"] == "eval"] for n in (name, like))
    assert len(wanted) == 2
    assert min(wanted) > 0.001
    assert probed == pytest.approx(wanted, rel=1e-3)
    a, b = contents(runs / name), contents(runs / like)
    assert a.keys() == b.keys()
    assert {"ema-0.5.safetensors/pos_embed", "optimizer.safetensors/model.x_embedder.proj.bias/exp_avg_sq"} <= a.keys()
    for key, value in a.items():
        assert value.shape == b[key].shape
        torch.testing.assert_close(value, b[key], atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_ddt_under_fsdp_equals_one_process(tiny_config, data_folder, tmp_path):
    """FSDP2 gathers the blocks of encoder and head, and the encoder's output modulates the head."""
    model = {"backbone": "ddt:head_depth=1,head_dim=24,head_heads=3", "hidden_dim": 32, "depth": 3, "num_heads": 2}
    config = tiny_config.override(model=model, num_steps=4, save_every=4, optimizer={"learning_rate": 1e-3})
    train(config, open_data(data_folder), tmp_path / "one", device=torch.device("cpu"), say=lambda text: None)
    run_all([(config.override(parallel="fsdp"), data_folder, tmp_path / "two")], 2, tmp_path)
    mine, yours = ([(row["loss"], row["grad_norm"]) for row in rows(tmp_path / n)] for n in ("two", "one"))
    assert len(mine) == 4
    for a, b in zip(mine, yours, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert yours[-1][0] < yours[0][0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_steps_of_two_processes_equal_those_of_one(parallel, recompute, config, data_folder, tmp_path):
    """DDP compiles each block, or the whole step, split at DDP's buckets; FSDP2 compiles each block."""
    config = config.override(num_steps=4, save_every=4, compile_scope="step" if recompute else "blocks")
    train(config, open_data(data_folder), tmp_path / "one", device=torch.device("cpu"), say=lambda text: None)
    compiled = config.override(parallel=parallel, compile=True, checkpoint_activations=recompute)
    run_all([(compiled, data_folder, tmp_path / "two")], 2, tmp_path, limit=600)
    mine, yours = ([(row["loss"], row["grad_norm"]) for row in rows(tmp_path / n)] for n in ("two", "one"))
    assert len(mine) == 4
    for a, b in zip(mine, yours, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_processes_on_two_machines_train_like_one(config, data_folder, tmp_path):
    """HSDP shards within a machine and sums gradients between the two; ten steps, then ten more from a checkpoint."""
    train(config, open_data(data_folder), tmp_path / "one", device=torch.device("cpu"), say=lambda text: None)
    shared = config.override(parallel="fsdp")
    jobs = [(c, data_folder, tmp_path / "four") for c in (shared.override(num_steps=HALF), shared)]
    run_all(jobs, 4, tmp_path, limit=500, local=2)
    mine, yours = ([(row["loss"], row["grad_norm"]) for row in rows(tmp_path / n)] for n in ("four", "one"))
    assert len(mine) == NUM_STEPS
    for a, b in zip(mine, yours, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = contents(tmp_path / "four"), contents(tmp_path / "one")
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_the_mesh_follows_the_machines():
    assert mesh_sides(8, 8) == (8,)
    assert mesh_sides(64, 8) == (8, 8)
    assert mesh_sides(4, 1) == (4,)  # machines with one process cannot shard
    assert mesh_sides(12, 8) == (12,)  # machines of unequal size


def test_the_compared_runs_learned_and_contrasted(runs):
    """Otherwise the comparisons would be meaningless."""
    first, *_, last = rows(runs / "one")
    assert last["loss"] < first["loss"] - 0.2
    # an NT-Xent of 8 images; with 4 the chance level would be log 4
    assert rows(runs / "one")[-1]["alignment"]["tiny@2"] > 0
    assert first["alignment"]["tiny@2"] > 1.6


def test_a_batch_that_cannot_be_divided_is_refused():
    require_equal_parts(24, 3, 4)
    with pytest.raises(UserError, match="8 images cannot be split into 6 equal parts.*multiple of 6"):
        require_equal_parts(8, 2, 3)
