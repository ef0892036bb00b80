"""Two processes that share the images give the same figures as one."""

import json

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from repa.base import dist
from repa.data import open_data
from repa.evaluation import evaluate
from repa.evaluation.images import DataImages, open_images
from repa.evaluation.measure import measure
from repa.evaluation.reference import compute_reference
from repa.metrics import RunningScore, manifold
from tests.evaluation.inceptions import small_inception

ALL = ("fid", "sfid", "inception_score", "kid", "precision", "recall")


def figures(data, samples):
    manifold.BLOCK = 7  # gives each process several blocks
    RunningScore.__init__.__defaults__ = (10,)
    extractor = small_inception()
    reference = compute_reference(DataImages(open_data(data)), extractor, batch_size=7)
    images = open_images(samples)
    found = [measure(images.batches(4), extractor, reference, ALL)]
    everything = [images.rows(np.arange(30))] if dist.is_main() else []  # the other process has none
    found.append(evaluate(everything, extractor, reference, ("fid", "sfid", "precision", "recall")))
    return [*found, {"count": reference.statistics.count, "subset": reference.subset.double().sum().item()}]


def on(rank, folder, data, samples):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(figures(data, samples), file)
    dist.teardown()


def test_two_processes_give_the_figures_of_one(data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", 7)
    monkeypatch.setattr(RunningScore.__init__, "__defaults__", (10,))
    pixels = DataImages(open_data(data_folder)).rows(np.arange(30)).permute(0, 2, 3, 1).numpy()
    noise = np.random.default_rng(0).normal(0, 25, pixels.shape)
    np.savez(tmp_path / "s.npz", arr_0=np.clip(pixels + noise, 0, 255).astype(np.uint8))
    arguments = (str(data_folder), str(tmp_path / "s.npz"))
    mp.start_processes(on, args=(str(tmp_path), *arguments), nprocs=2, start_method="fork")  # saves imports
    alone = figures(*arguments)
    for rank in (0, 1):
        together = json.loads((tmp_path / f"{rank}.json").read_text())
        for ours, theirs in zip(together, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
