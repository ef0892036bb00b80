import pytest
import torch


@pytest.fixture(scope="session")
def kl_folder(tmp_path_factory):
    """A tiny random AutoencoderKL as diffusers saves it, with a scale and a shift of its own."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=5,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    folder = tmp_path_factory.mktemp("kl")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random AutoencoderTiny."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    folder = tmp_path_factory.mktemp("tiny")
    AutoencoderTiny(**blocks, **channels, scaling_factor=1.5).save_pretrained(folder)
    return folder


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
