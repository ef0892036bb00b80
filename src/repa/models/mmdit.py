"""MMDiT, the text-to-image network of REPA (arXiv 2410.06940, appendix; the block is of arXiv 2403.03206).

N batch, C channels, T tokens of the grid, S text tokens, E their width, D width, h heads. Text and image have
separate weights and a joint attention over [text, image].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.models.config import ModelConfig
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times
from repa.models.layers import (
    MLP,
    FinalLayer,
    PatchEmbedding,
    TimestepEmbedding,
    adaln_zero,
    attend,
    by_head,
    modulate,
    modulation,
    modulations,
    normal_matrices,
    sincos_positions,
    token_norm,
    unpatchify,
    xavier_layers,
    xavier_patches,
)

CLIP_L = (77, 768)  # number and width of text tokens


class MMDiT(Backbone):
    """A network with 24 blocks of width 768 and 24 heads by default, as in the paper. Reads `Condition.text`, ignores labels.

    Args:
        latent_size: side of the latent, or (height, width); multiples of patch_size.
        text_shape: (S, E) of the text.
        patch_overlap: overlap of patches on each side, in latent pixels; predictions are summed.
        reference_init: PyTorch's default initialisation, as in the released code; otherwise adaLN-Zero, as in DiT.

    Attributes:
        null_text: (S, E) null text; zeros until the encoded empty text is copied into it.
        null_mask: (S,) bool, mask of null_text.

    Hidden taps are the image tokens, (N, T, D); attention taps are of the grid only, (N, h, T, T).

    Raises:
        UserError: incompatible sizes.
    """

    pos_embed: Tensor
    null_text: Tensor
    null_mask: Tensor

    def __init__(
        self,
        *,
        latent_size: int | Sequence[int],
        latent_channels: int = 4,
        patch_size: int = 2,
        hidden_dim: int = 768,
        depth: int = 24,
        num_heads: int = 24,
        text_shape: tuple[int, int] = CLIP_L,
        patch_overlap: int = 0,
        reference_init: bool = False,
    ):
        super().__init__()
        self.take_sizes(latent_size, latent_channels, patch_size, hidden_dim, depth, num_heads)
        self.text_shape, self.patch_overlap = tuple(text_shape), patch_overlap
        self.num_classes = self.null_label = 0  # labels are ignored

        self.register_buffer("pos_embed", sincos_positions(hidden_dim, self.grid), persistent=False)  # (1, T, D)
        # Stored in checkpoints, so that guidance by the empty text needs no text encoder in sampling.
        self.register_buffer("null_text", torch.zeros(text_shape))
        self.register_buffer("null_mask", torch.ones(text_shape[0], dtype=torch.bool))
        self.x_embedder = PatchEmbedding(latent_channels, hidden_dim, patch_size, patch_overlap)
        self.t_embedder = TimestepEmbedding(hidden_dim)
        self.context_embedder = nn.Linear(text_shape[1], hidden_dim)
        self.blocks = nn.ModuleList(JointBlock(hidden_dim, num_heads, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(hidden_dim, (patch_size + 2 * patch_overlap) ** 2 * latent_channels)
        if not reference_init:
            self.initialise()

    def initialise(self) -> None:
        """Blocks start as the identity and the prediction as zero (adaLN-Zero)."""
        xavier_layers(self, nn.Linear)
        xavier_patches(self.x_embedder.proj)
        normal_matrices(self.t_embedder)
        adaln_zero(self)

    def null(self, like: Condition) -> Condition:
        num = len(like.labels)
        # No mask if the text has none, because both are concatenated in one batch.
        needed = like.text is None or like.text_mask is not None
        mask = self.null_mask.expand(num, -1) if needed else None
        return like._replace(text=self.null_text.expand(num, -1, -1), text_mask=mask)

    def completed(self, condition: Condition) -> Condition:
        return self.null(condition) if condition.text is None else condition

    def take_empty_text(self, tokens: Tensor, mask: Tensor | None) -> None:
        self.null_text.copy_(tokens)
        if mask is not None:
            self.null_mask.copy_(mask)

    def forward(
        self, state: State, t: Times, condition: Condition, taps: tuple[Tap, ...] = (), keep: Tensor | None = None
    ) -> Output:
        """Predict from the noised state; see `Backbone.forward`. t is in [0, 1] and not scaled.

        Raises:
            UserError: other shapes, no text, a tap is not a block, or a time per token or tokens to keep are given.
        """
        self.check(state, taps)
        t = self.one_time(t, keep)
        if condition.text is None or tuple(condition.text.shape[1:]) != self.text_shape:
            found = "none" if condition.text is None else tuple(condition.text.shape)
            raise UserError(
                f"MMDiT needs text of shape (N, {self.text_shape[0]}, {self.text_shape[1]}), but got {found}."
            )
        image = self.x_embedder(state["x"]) + self.pos_embed  # (N, T, D)
        text = self.context_embedder(condition.text)  # (N, S, D)
        silu_c = F.silu(self.t_embedder(t))
        mask = None
        # Padding is masked only as keys: the results of its queries are never read.
        if condition.text_mask is not None:
            mask = F.pad(condition.text_mask, (0, image.shape[1]), value=True)[:, None]  # (N, 1, S + T)
        seen: dict[Tap, Tensor] = {}
        for depth in range(1, self.depth + 1):
            text, image = self.run(depth, text, image, silu_c, mask, taps=taps, seen=seen)
        tokens = self.final_layer(image, silu_c)  # (N, T, p * p * C), wider for overlapping patches
        return Output({"x": unpatchify(tokens, self.grid, self.patch_size, self.patch_overlap)}, seen, {})


def mmdit(config: ModelConfig, *, reference_init: bool = False) -> MMDiT:
    """The backbone `mmdit` with the sizes of the configuration; an unknown text size is CLIP-L's."""
    config.refuse_dit_options(allowed=("patch_overlap",))
    text_shape = config.text_shape if any(config.text_shape) else CLIP_L
    return MMDiT(
        **config.sizes(), text_shape=text_shape, patch_overlap=config.patch_overlap, reference_init=reference_init
    )


class TokenStream(nn.Module):
    """The weights of text or image in a block; the text's in the last block have only keys and values."""

    def __init__(self, dim: int, only_keys: bool):
        super().__init__()
        self.norm = token_norm("layer", dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.chunks = 2 if only_keys else 6
        if not only_keys:
            self.proj = nn.Linear(dim, dim)
            self.mlp = MLP(dim, 4 * dim)
        self.adaLN_modulation = modulation(dim, self.chunks)

    def before(self, x: Tensor, silu_c: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(queries, keys and values (N, T, 3 D); modulations and gates for `after`)."""
        shift, scale, *rest = modulations(self.adaLN_modulation, silu_c, x, self.chunks)
        return self.qkv(modulate(self.norm(x), shift, scale)), tuple(rest)

    def after(self, x: Tensor, attention: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """x (N, T, D) and the output of attention (N, T, D) -> (N, T, D)."""
        gate_attn, shift, scale, gate_mlp = rest
        x = torch.addcmul(x, gate_attn, self.proj(attention))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm(x), shift, scale)))


class JointBlock(nn.Module):
    """A block with separate weights and joint attention over [text, image]; the `last` block does not update the text."""

    def __init__(self, dim: int, num_heads: int, last: bool):
        super().__init__()
        self.num_heads = num_heads
        self.text = TokenStream(dim, only_keys=last)
        self.image = TokenStream(dim, only_keys=False)
        self.last = last

    def forward(
        self, text: Tensor, image: Tensor, silu_c: Tensor, mask: Tensor | None = None, tapped: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """text (N, S, D), image (N, T, D), silu_c (N, D), mask (N, 1, S + T) -> (text, image, logits (N, h, T, T) if `tapped`)."""
        of_text, rest_text = self.text.before(text, silu_c)
        of_image, rest_image = self.image.before(image, silu_c)
        q, k, v = by_head(torch.cat([of_text, of_image], dim=1), self.num_heads)  # each (N, h, S + T, D/h)
        num = text.shape[1]
        # Only among image tokens, before the joint softmax, because the target has no text.
        logits = (q[:, :, num:] * q.shape[-1] ** -0.5) @ k[:, :, num:].transpose(-1, -2) if tapped else None
        attention = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (N, S + T, D)
        image = self.image.after(image, attention[:, num:], rest_image)
        if not self.last:
            text = self.text.after(text, attention[:, :num], rest_text)
        return text, image, logits
