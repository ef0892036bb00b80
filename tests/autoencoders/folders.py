"""Tiny random autoencoders in the format of diffusers; all settings can be overridden."""

import torch


def save_kl(folder, seed=0, **settings):
    """An AutoencoderKL with 5 channels at a quarter of the size."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    shape = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 5}
    AutoencoderKL(**{**blocks, **shape, **settings}).save_pretrained(folder)
    return folder


def save_tiny(folder, seed=0, **settings):
    """An AutoencoderTiny with 4 channels at a quarter of the size."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    AutoencoderTiny(**{**blocks, **channels, **settings}).save_pretrained(folder)
    return folder


def save_dc(folder, seed=0, **settings):
    """An AutoencoderDC with 8 channels at a quarter of the size, with the blocks of the published ones."""
    from diffusers import AutoencoderDC

    torch.manual_seed(seed)
    both = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8, 16),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), (5,)),
    }
    blocks = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in both.items()}
    AutoencoderDC(**{"latent_channels": 8, "attention_head_dim": 4, **blocks, **settings}).save_pretrained(folder)
    return folder


def save_rae(folder, seed=0, **settings):
    """An AutoencoderRAE for 32 pixels: 64 channels at an eighth of the size, normalised per channel and position."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(seed)
    encoder = {
        "encoder_hidden_size": 64,
        "encoder_num_hidden_layers": 1,
        "encoder_patch_size": 14,
        "encoder_input_size": 56,
    }
    decoder = {
        f"decoder_{key}": value
        for key, value in (("hidden_size", 16), ("num_hidden_layers", 1), ("num_attention_heads", 2))
    }
    statistics = {"latents_mean": torch.randn(64, 4, 4), "latents_std": 1 + torch.rand(64, 4, 4)}
    shape = {"patch_size": 8, "decoder_intermediate_size": 32}
    AutoencoderRAE(**{**encoder, **decoder, **shape, **statistics, **settings}).save_pretrained(folder)
    return folder
