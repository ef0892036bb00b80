"""Small random networks of diffusers, with one forward pass each."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

NUM, TEXT, WORDS = 2, 12, 5  # samples, width of text, text tokens


class Case(NamedTuple):
    net: nn.Module
    run: Callable[[], Tensor]
    block: str
    image: Callable[[object], Tensor]
    """Output of the block -> tokens (N, T, D) of the image."""
    grid: tuple[int, ...]


def _latents(*shape: int) -> Tensor:
    return torch.randn(NUM, *shape)


def dit() -> Case:
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    x = _latents(4, 8, 8)
    run = lambda: net(x, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([1, 2])).sample  # noqa: E731
    return Case(net, run, "transformer_blocks.1", lambda out: out, (4, 4))


def pixart() -> Case:
    from diffusers import PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        cross_attention_dim=16, caption_channels=TEXT, use_additional_conditions=False,
    )  # fmt: skip
    x, text = _latents(4, 8, 12), _latents(WORDS, TEXT)
    run = lambda: net(x, encoder_hidden_states=text, timestep=torch.tensor([1, 2])).sample  # noqa: E731
    return Case(net, run, "transformer_blocks.0", lambda out: out, (4, 6))


def sd3() -> Case:
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
    )  # fmt: skip
    x, text, pooled = _latents(4, 8, 12), _latents(WORDS, TEXT), _latents(8)

    def run() -> Tensor:
        return net(
            encoder_hidden_states=text, hidden_states=x, pooled_projections=pooled, timestep=torch.tensor([1, 2])
        ).sample

    return Case(net, run, "transformer_blocks.0", lambda out: out[1], (4, 6))


def _flux(block: str, image: Callable) -> Case:
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    x, text, pooled = _latents(16, 16), _latents(WORDS, TEXT), _latents(8)
    places = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)

    def run() -> Tensor:
        return net(
            hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.tensor([0.1, 0.2]),
            img_ids=places.flatten(0, 2), txt_ids=torch.zeros(WORDS, 3),
        ).sample  # fmt: skip

    return Case(net, run, block, image, (4, 4))


def flux() -> Case:
    return _flux("transformer_blocks.0", lambda out: out[1])


def flux_single() -> Case:
    return _flux("single_transformer_blocks.0", lambda out: out[1] if isinstance(out, tuple) else out[:, WORDS:])


def wan() -> Case:
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=TEXT,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    x, text = _latents(4, 3, 8, 12), _latents(WORDS, TEXT)
    run = lambda: net(hidden_states=x, timestep=torch.tensor([1, 2]), encoder_hidden_states=text).sample  # noqa: E731
    return Case(net, run, "blocks.0", lambda out: out, (3, 4, 6))


def _unet(block: str, image: Callable, grid: tuple[int, ...], **settings: object) -> Case:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT, attention_head_dim=4, norm_num_groups=4, **settings,
    )  # fmt: skip
    x, text = _latents(4, 8, 12), _latents(WORDS, TEXT)
    extra = {"text_embeds": _latents(TEXT), "time_ids": _latents(6)} if settings else None
    run = lambda: net(x, torch.tensor([1, 2]), text, added_cond_kwargs=extra).sample  # noqa: E731
    return Case(net, run, block, image, grid)


def _map(out: Tensor) -> Tensor:
    return out.flatten(2).transpose(1, 2)


def sd15_mid() -> Case:
    return _unet("mid_block", _map, (4, 6))


def sd15_down() -> Case:
    return _unet("down_blocks.0", lambda out: _map(out[0]), (4, 6))


def sd15_tokens() -> Case:
    return _unet("up_blocks.1.attentions.0.transformer_blocks.0", lambda out: out, (8, 12))


def sdxl_up() -> Case:
    return _unet(
        "up_blocks.0", _map, (8, 12), addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=TEXT + 6 * 4,
    )  # fmt: skip


CASES = {f.__name__: f for f in (dit, pixart, sd3, flux, flux_single, wan, sd15_mid, sd15_down, sd15_tokens, sdxl_up)}
