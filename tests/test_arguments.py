"""Wrong arguments in Python: one sentence at the entrance instead of an AttributeError deep inside."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import repa
from repa.analysis import linear_probes, principal_colours
from repa.base.errors import UserError
from repa.conditions import load_text_encoder
from repa.data import Loader, PrepareConfig, prepare
from repa.diffusion import SAMPLERS
from repa.evaluation import evaluate, load_extractor, reference_of
from repa.metrics import Statistics, kernel_distance
from repa.models import Condition, build
from repa.recipes import load_recipe
from repa.sampling import SampleConfig, generate, write_samples
from repa.training import train

NET = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
CPU = torch.device("cpu")
ROWS, IMAGES = torch.randn(20, 4), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)


def attached(**settings):
    return repa.attach(NET, "0", **{"features": 6, "loss": "cosine", "hidden_dim": 8, **settings})


def encoder():
    return repa.load_encoder("tiny")


CALLS = {
    "a number for a block": (lambda: repa.attach(NET, 3), "A block is given by its name, .*, but got 3"),
    "a module for a block": (lambda: repa.attach(NET, NET[1]), "A block is given by its name"),
    "swapped": (lambda: repa.attach("0", NET), "The network must be a torch.nn.Module, but got '0'"),
    "a class": (lambda: repa.attach(nn.Linear, "0"), "The network must be a torch.nn.Module"),
    "an encoder for a width": (lambda: attached(features=encoder()), "such as encoder.dim, but got an object of type Tiny"),
    "a text for a width": (lambda: attached(hidden_dim="8"), "hidden_dim is the width .*, but got '8'"),
    "a number for a grid": (lambda: attached(grid=16), r"A grid must be \(rows, columns\) or .*, but got \(16,\)"),
    "a function for a loss": (lambda: attached(loss=nn.functional.mse_loss), "A name is a text such as 'cosine'"),
    "a module for an encoder": (lambda: repa.load_encoder(NET), "An encoder is named by a text"),
    "None for an autoencoder": (lambda: repa.load_autoencoder(None), "A name is a text .*, but got None"),
    "a number for a sampler": (lambda: SAMPLERS.build(3), "A name is a text .*, but got 3"),
    "an unknown device": (lambda: repa.load_encoder("tiny", device="gpu"), "no device 'gpu'. Choose cpu, cuda"),
    "a path for images": (lambda: encoder()("cat.png", grid=4), "needs a tensor of uint8 images .*, but got 'cat.png'"),
    "an array for images": (lambda: encoder()(IMAGES.numpy(), grid=4), "but got an object of type ndarray"),
    "two sides for a grid": (lambda: encoder()(IMAGES, grid=(4, 4)), r"is its side, .*, but got \(4, 4\)"),
    "one text for many": (lambda: load_text_encoder("tiny-text")("a cat"), "takes a list of texts, but got 'a cat'"),
    "arrays to compare": (lambda: repa.cka(ROWS.numpy(), ROWS.numpy()), r"are tensors \(n, D\), but got an object of type nd"),
    "lists to measure": (lambda: kernel_distance([[0.0]], [[1.0]]), r"must be a tensor \(N, D\), but got \[\[0.0\]\]"),
    "an array to count": (lambda: Statistics().update(np.zeros((4, 2))), "Statistics need a tensor of features"),
    "labels as a list": (
        lambda: linear_probes(ROWS, [0] * 20, ROWS, [0] * 20), r"needs a tensor of train labels \(N,\), but got \[0, 0"
    ),
    "tokens of one image": (lambda: principal_colours(ROWS), r"Colours need .*, but got \(20, 4\)"),
    "a name for a network": (lambda: build("SiT-S/2"), "built from a ModelConfig .*, but got 'SiT-S/2'"),
    "a tensor for a state": (
        lambda: repa.DiT(latent_size=8, hidden_dim=32, depth=1, num_heads=4, num_classes=3)(
            torch.zeros(2, 4, 8, 8), torch.zeros(2), Condition(torch.zeros(2, dtype=torch.long))
        ),
        "takes its state as a dictionary .*, but got a Tensor",
    ),
    "a dictionary for settings": (
        lambda: prepare("photographs", "nowhere", {"resolution": 32}), "are a PrepareConfig.*, but got {'resolution': 32}"
    ),
    "a wrong device of data": (
        lambda: prepare("photographs:num=20", "nowhere", PrepareConfig(resolution=16), device="gpu"), "no device 'gpu'"
    ),
    "a folder for data": (lambda: Loader("data", batch_size=4, seed=0), "repa.open_data opened, but got 'data'"),
    "a name for a recipe": (lambda: train("cifar10", None, Path("run"), device=CPU), "are a TrainConfig, .*'cifar10'"),
    "a folder to train on": (
        lambda: train(load_recipe("cifar10"), "data", Path("run"), device=CPU), "repa.open_data opened, but got 'data'"
    ),
    "a folder to measure": (lambda: reference_of("data", None, "tiny"), "repa.open_data opened, but got 'data'"),
    "a folder to sample": (lambda: generate("run", SampleConfig(), [0]), "repa.load_run loaded, but got 'run'"),
    "a folder to write": (lambda: write_samples("run", SampleConfig(), 1, Path("s.npz")), "loaded, but got 'run'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CALLS)
def test_a_wrong_argument_gives_one_sentence(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, sentence = CALLS[mistake]
    with pytest.raises(UserError, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_other_mistakes_in_batches_and_samples_give_one_sentence(data_folder, random_run):
    data, run = repa.open_data(data_folder), repa.load_run(random_run)
    for size in (0, 2.0):
        with pytest.raises(UserError, match=f"batch.*{size}"):
            Loader(data, batch_size=size, seed=0)
    with pytest.raises(UserError, match="are a SampleConfig, but got {'steps': 1}"):
        generate(run, {"steps": 1}, [0])
    with pytest.raises(UserError, match=r"numbers of images such as range\(64\), but got 4"):
        generate(run, SampleConfig(), 4)
    with pytest.raises(UserError, match="load it with load_extractor..tiny"):
        evaluate([IMAGES], "tiny", reference_of(data, load_extractor("tiny-classifier"), "tiny-classifier"))
    with pytest.raises(UserError, match="The number of samples is a whole number, but got '2'"):
        write_samples(run, SampleConfig(), "2", Path("s.npz"))


def test_the_features_of_a_cache_must_be_a_tensor(tmp_path):
    cache = repa.FeatureCache.open(tmp_path / "cache", "any")
    with pytest.raises(
        UserError, match="compute must return a tensor of features .*, but got an object of type Features"
    ):
        cache.fill(["a"], lambda missing: encoder()(IMAGES[missing], grid=4))
