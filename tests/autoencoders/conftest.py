import pytest
import torch

from tests.autoencoders.folders import save_dc, save_kl, save_tiny


@pytest.fixture(scope="session")
def kl_folder(tmp_path_factory):
    """A tiny random AutoencoderKL with an unusual scale and shift."""
    return save_kl(tmp_path_factory.mktemp("kl"), scaling_factor=0.3611, shift_factor=0.1159)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random AutoencoderTiny."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), scaling_factor=1.5)


@pytest.fixture(scope="session")
def dc_folder(tmp_path_factory):
    """A tiny random AutoencoderDC."""
    return save_dc(tmp_path_factory.mktemp("dc"), scaling_factor=0.3189)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
