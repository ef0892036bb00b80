"""`repa sample --compile`."""

import numpy as np
import pytest
import torch

from repa.cli.main import run


@pytest.mark.slow
def test_compiled_samples_are_the_same_but_for_rounding(random_run, tmp_path):
    """11 images in batches of 4, guided inside an interval only: batches of 8, 6, 4 and 3 rows go through the network."""
    settings = ("--num-images", "11", "--batch-size", "4", "--steps", "6", "--guidance", "cfg:scale=2,low=0.2,high=0.7")
    settings += ("--precision", "fp32")
    images = []
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        torch._dynamo.reset()
        assert run(["sample", str(random_run), "--out", str(tmp_path / f"{name}.npz"), *settings, *more]) == 0
        images.append(np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int))
    assert images[0].std() > 10
    assert np.abs(images[0] - images[1]).max() <= 1
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
