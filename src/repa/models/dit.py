"""DiT: the one backbone of DiT and SiT, a function of (x_t, t, labels) that also returns the hidden states asked for.

N batch, C channels, T tokens, D width. No label dropout, loss, time sampling or guidance: train() and eval() agree.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repa.base.errors import UserError
from repa.models.config import FAMILIES, ModelConfig, check_dimensions, dimensions
from repa.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedding,
    PatchEmbedding,
    TimestepEmbedding,
    sincos_positions,
    unpatchify,
)

INIT_STD = 0.02  # of the label table and of the timestep MLP


class Output(NamedTuple):
    """prediction (N, C, H, W), 2C with learn_sigma; hidden: depth -> residual stream after that block (N, T, D)."""

    prediction: Tensor
    hidden: dict[int, Tensor]


class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero (arXiv 2212.09748; SiT, arXiv 2401.08740, is the same network).

    Args:
        latent_size: side of the square latent, a multiple of patch_size.
        latent_channels: C.
        num_classes: K; labels 0 ... K-1 are classes, `null_label` = K is "no label". 0 for unlabelled data.
        learn_sigma: 2C output channels, [prediction, variance].
        qk_norm: LayerNorm of queries and keys per head.

    Attributes:
        checkpoint_activations: keep only what goes into each block, and compute the block again in the backward pass:
            less memory for about a third more work, and the same gradients. Off until it is set.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        latent_size: int,
        latent_channels: int = 4,
        patch_size: int = 2,
        hidden_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__()
        if latent_size < 1 or latent_channels < 1 or num_classes < 0:
            raise UserError(
                f"A model needs latent_size and latent_channels of at least 1 and num_classes of at least 0, "
                f"but got {latent_size}, {latent_channels} and {num_classes}."
            )
        check_dimensions(hidden_dim, depth, num_heads, patch_size, latent_size)
        self.latent_size, self.latent_channels, self.patch_size = latent_size, latent_channels, patch_size
        self.hidden_dim, self.depth, self.num_classes = hidden_dim, depth, num_classes
        self.null_label = num_classes
        self.checkpoint_activations = False
        self.grid = latent_size // patch_size
        out_channels = latent_channels * (2 if learn_sigma else 1)

        self.register_buffer("pos_embed", sincos_positions(hidden_dim, self.grid))  # (1, T, D)
        self.x_embedder = PatchEmbedding(latent_channels, hidden_dim, patch_size)
        self.t_embedder = TimestepEmbedding(hidden_dim)
        self.y_embedder = LabelEmbedding(num_classes, hidden_dim)
        self.blocks = nn.ModuleList(Block(hidden_dim, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_dim, patch_size**2 * out_channels)
        self.initialise()

    def initialise(self) -> None:
        """Blocks start as the identity and the prediction as zero (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.flatten(1))  # as the linear layer that it is; a view, so in place
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=INIT_STD)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=INIT_STD)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=INIT_STD)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def check_taps(self, taps: tuple[int, ...]) -> None:
        """Raises UserError unless every tap is a block, counted from 1."""
        for tap in taps:
            if not 1 <= tap <= self.depth:
                raise UserError(f"There is no hidden state at depth {tap}: this model has blocks 1 to {self.depth}.")

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, taps: tuple[int, ...] = ()) -> Output:
        """Predict from the noised latent.

        Args:
            x_t: (N, C, H, W) noised latent.
            t: (N,) time, passed to the sinusoid as it is: t in [0, 1], or the integer timesteps of DDPM as floats.
            labels: (N,) int64 in 0 ... null_label.
            taps: depths (1-based) whose hidden states to return.

        Raises:
            UserError: x_t has another shape, or a tap is no block.
        """
        expected = (self.latent_channels, self.latent_size, self.latent_size)
        if tuple(x_t.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise UserError(f"This model takes latents of shape (N, {shape}), but got {tuple(x_t.shape)}.")
        self.check_taps(taps)
        x = self.x_embedder(x_t) + self.pos_embed  # (N, T, D)
        silu_c = F.silu(self.t_embedder(t) + self.y_embedder(labels))  # (N, D)
        hidden = {}
        for depth, block in enumerate(self.blocks, start=1):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, silu_c, use_reentrant=False, preserve_rng_state=False)  # a block draws nothing
            else:
                x = block(x, silu_c)
            if depth in taps:
                hidden[depth] = x
        return Output(unpatchify(self.final_layer(x, silu_c), self.patch_size), hidden)


def build_model(name: str, **overrides) -> DiT:
    """A DiT by name, "SiT-B/2" or "DiT-XL/2", with any argument of DiT overridden.

    latent_size, and for labelled data num_classes, come from the data and must be among the overrides.

    Raises:
        UserError: an unknown name (the nearest is suggested) or sizes that do not fit together.
    """
    arguments = {**dimensions(name)._asdict(), "learn_sigma": FAMILIES[name.partition("-")[0]], **overrides}
    return DiT(**arguments)


def build(config: ModelConfig) -> DiT:
    """The network that a complete configuration describes: latent size and channels must be filled in from the data."""
    return DiT(**config.kwargs())
