"""SIGKILL at random times: the next run produces the same bytes and repeats at most one shard."""

import mmap
import os
import random
import signal
import struct
import time
import traceback

import pytest

from repa.data import PrepareConfig, prepare
from repa.data.pipeline import ENCODED
from tests.data.conftest import content

CONFIG = PrepareConfig(
    resolution=8, shard_size=3, batch_size=1, num_workers=0, autoencoder="kl", features=("tiny",), flip=True
)
IN_A_SHARD, IN_ALL = 3, 22
PACKED = CONFIG.override(feature_forms={"": "pca2-int8"}, num_workers=1)


def killed(folder, out, config, encoder, after: float) -> tuple[int, bool]:
    """Prepare in a child that is killed after `seconds`; returns its encoder calls, and whether it finished in time."""
    shared = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:  # the child must not return into the test
        count = type(encoder).__call__

        def counting(self, *args):
            shared[:] = struct.pack("q", struct.unpack("q", shared[:])[0] + 1)
            return count(self, *args)

        type(encoder).__call__ = counting
        prepare(folder, out, config)
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return struct.unpack("q", shared[:])[0], os.WIFEXITED(status)


@pytest.mark.parametrize("processes", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_concurrent_equal_commands_make_one_data_set(folder, tmp_path, fakes, processes):
    """They coordinate only by locking shards, and one of them writes the manifest."""
    encoder = fakes[1]
    prepare(folder, tmp_path / "whole", PACKED.override(num_workers=0))
    shared = mmap.mmap(-1, 8 * processes)
    children = []
    for number in range(processes):
        if (child := os.fork()) == 0:
            try:
                encoder.calls = 0
                manifest = prepare(folder, tmp_path / "out", PACKED.override(num_workers=0))
                shared[8 * number : 8 * number + 8] = struct.pack("ii", encoder.calls, manifest is not None)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    calls, finished = zip(*struct.iter_unpack("ii", shared[:]), strict=True)
    assert any(finished)
    # every image once for the tokens, in any process, and once for the directions, in the first
    assert 2 * IN_ALL <= sum(calls) <= 2 * IN_ALL + processes * (IN_A_SHARD + ENCODED)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("tries", "config"),
    [
        (5, CONFIG),
        (2, PACKED),
        pytest.param(70, CONFIG, marks=pytest.mark.slow),
        pytest.param(30, PACKED, marks=pytest.mark.slow),
    ],
)
def test_kills_at_random_times_lose_at_most_a_shard(folder, tmp_path, fakes, tries, config):
    """Each folder is killed twice; a kill loses the shard being written and batches encoded ahead for the next."""
    encoder = fakes[1]
    prepare(folder, tmp_path / "warm", config)
    encoder.calls, begin = 0, time.perf_counter()
    prepare(folder, tmp_path / "whole", config)
    seconds, calls = time.perf_counter() - begin, encoder.calls
    whole, stream, cut_short = content(tmp_path / "whole"), random.Random(tries), 0
    for number in range(tries):
        out, spent = tmp_path / f"out{number}", 0
        for _ in range(2):
            made, finished = killed(folder, out, config, encoder, stream.uniform(0.1, 1) * seconds)
            spent, cut_short = spent + made, cut_short + (not finished)
        encoder.calls = 0
        prepare(folder, out, config)
        assert content(out) == whole
        if config is CONFIG:
            assert calls == IN_ALL <= spent + encoder.calls <= IN_ALL + 2 * (IN_A_SHARD + ENCODED + 1)
    assert cut_short  # some kills interrupted work; how many depends on the machine's load
