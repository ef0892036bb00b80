"""Checkpoints written in a thread are complete and in order, and errors are raised."""

import threading

import pytest
import torch

from repa.base.errors import UserError
from repa.runs import Checkpoint, Writer, layout, load_checkpoint, writer


def make(step: int) -> Checkpoint:
    weights = {"weight": torch.full((3,), float(step))}
    optimizer = {"weight/step": torch.tensor(float(step))}
    files = {layout.MODEL_FILE: weights, layout.EMA_FILE: weights, layout.OPTIMIZER_FILE: optimizer}
    return Checkpoint(step, {"seconds": 0.0}, files)


@pytest.fixture
def gate(monkeypatch):
    """save_checkpoint waits for this event."""
    opened, write = threading.Event(), writer.save_checkpoint

    def slow(*arguments):
        assert opened.wait(20)
        return write(*arguments)

    monkeypatch.setattr(writer, "save_checkpoint", slow)
    yield opened
    opened.set()


def test_a_thread_writes_while_the_caller_goes_on(gate, tmp_path):
    with Writer(tmp_path, background=True) as background:
        background.write(make(1))
        assert layout.checkpoint_steps(tmp_path) == []
        assert background.busy
        assert not background.failed
        gate.set()
        background.wait()
        assert not background.busy
        assert layout.checkpoint_steps(tmp_path) == [1]


def test_leaving_the_writer_waits_for_the_last_checkpoint(gate, tmp_path):
    threading.Timer(0.1, gate.set).start()
    with Writer(tmp_path, keep=2, background=True) as background:
        for step in (1, 2, 3):
            background.write(make(step))
    assert layout.checkpoint_steps(tmp_path) == [2, 3]
    assert torch.equal(load_checkpoint(tmp_path).model["weight"], torch.full((3,), 3.0))


@pytest.mark.parametrize("where", ["begin", "write", "wait", "end"])
def test_an_error_in_the_thread_is_raised(where, tmp_path, monkeypatch):
    def full(*arguments):
        raise UserError("The disk is full")

    monkeypatch.setattr(writer, "save_checkpoint", full)
    with pytest.raises(UserError, match="disk is full"), Writer(tmp_path, background=True) as background:
        background.write(make(1))
        if where != "end":
            while not background.failed:
                pass
            calls = {
                "begin": lambda: background.begin(2),
                "write": lambda: background.write(make(2)),
                "wait": background.wait,
            }
            calls[where]()
            pytest.fail("the error was lost")


def test_an_error_in_the_with_block_takes_precedence(gate, tmp_path):
    gate.set()
    with pytest.raises(KeyError), Writer(tmp_path, background=True) as background:
        background.write(make(1))
        raise KeyError
    assert layout.checkpoint_steps(tmp_path) == [1]  # the checkpoint being written is complete


def test_without_a_thread_the_checkpoint_is_written_at_once(tmp_path):
    with Writer(tmp_path, keep=1, keep_every=2) as foreground:
        for step in (1, 2, 3):
            foreground.write(make(step))
            assert layout.checkpoint_steps(tmp_path)[-1] == step
    assert layout.checkpoint_steps(tmp_path) == [2, 3]
