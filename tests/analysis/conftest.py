import pytest

from repa.autoencoders import load_autoencoder
from repa.data import open_data
from repa.diffusion.config import DiffusionConfig
from repa.runs import LoadedRun
from tests.analysis.stand_ins import Knowing


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run() -> LoadedRun:
    return LoadedRun(Knowing(), DiffusionConfig(), load_autoencoder("pixels"), step=0, weights="ema")


@pytest.fixture
def data(data_folder):
    return open_data(data_folder)
