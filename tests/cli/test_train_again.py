"""A stopped run prints the command that continues it, also under torchrun."""

import shlex

import pytest

from repa.base import trust
from repa.cli.train import _again, _trusted
from repa.training.config import TrainConfig

ARGV = ["sit-b2", "--data", "my data", "--out", "r"]
ALONE = "sit-b2 --data 'my data' --out r"


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, f"repa train {ALONE}"),
        ({"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}, f"repa train {ALONE}"),
        (
            {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 8},
            f"torchrun --standalone --nproc-per-node=8 -m repa train {ALONE}",
        ),
        (
            {"WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8},  # the user must give the rendezvous address
            f"torchrun --nnodes=2 ... --nproc-per-node=8 -m repa train {ALONE}",
        ),
    ],
)
def test_the_printed_command_is_the_one_that_started_the_run(environment, wanted, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    again = _again(ARGV)
    assert again == wanted
    assert shlex.split(again)[-len(ARGV) :] == ARGV


def test_private_code_that_only_files_name_needs_its_option_again():
    """A run folder as the recipe: its names are not on the command line."""
    found = {
        "model": {"backbone": "hooked:net=mylab.nets.unet,blocks=down.*"},
        "alignments": [{"target": "tiny", "loss": "other.losses.huber:delta=1"}],
    }
    assert trust.flags(found) == ["--trust", "mylab", "--trust", "other"]
    assert trust.flags(found, ["--alignments.0.loss", "other.losses.huber:delta=2"]) == ["--trust", "mylab"]
    assert trust.flags({"target": "dinov2-b", "widths": [0.05], "out": "runs/a.b"}) == []


def test_files_of_weights_are_no_modules():
    config = TrainConfig(init="last.pt", feature_weights={"dinov2-b": "dino.pth"}, autoencoder_weights="vae.pt")
    assert _trusted(config, []) == []
