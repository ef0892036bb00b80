"""Vision transformers of the library transformers, as REPA uses them; families.py has the differences between them.

N batch, G grid side, M native grid side, D width, P prefix tokens (class token and registers).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repa.base.errors import UserError
from repa.encoders.checkpoints import locate_weights, read
from repa.encoders.contract import Features, VisionEncoder, resize
from repa.encoders.families import Colours, Family, family_of


class ViTEncoder(VisionEncoder):
    """Patch tokens of the last block; pooled is the class token, or the mean token if there is none. Supports any grid."""

    net: Any  # a model of transformers; its settings are untyped
    native_positions: Tensor | None

    def __init__(self, net: Any, family: Family, name: str, weights_file: Path):
        super().__init__(
            net,
            name=name,
            dim=net.config.hidden_size,
            patch_size=net.config.patch_size,
            preprocessing="; ".join([preprocessing(family, positions_of(net)), *unusual_settings(family, net.config)]),
            weights_file=weights_file,
        )
        self.family = family
        # Most configurations have no num_register_tokens.
        self.prefix = int(family.class_token) + getattr(net.config, "num_register_tokens", 0)
        # REPA's code uses MAE's tokens before the final norm, which transformers always applies.
        if not family.final_norm:
            net.layernorm = nn.Identity()
        table = positions_of(net)
        self.register_buffer("native_positions", None if table is None else table.detach().clone(), persistent=False)

    def prepare(self, pixels: Tensor, side: int) -> Tensor:
        if self.family.resize_first:
            return normalise(resize(pixels, side, antialias=False), self.family.colours)
        # In this order and without antialiasing, as in the reference code: REPA's results use these features.
        return resize(normalise(pixels, self.family.colours), side, antialias=False)

    def extract(self, pixels: Tensor, grid: int) -> Features:
        return self._features(self._run(pixels, grid).last_hidden_state)

    def extract_attention(self, pixels: Tensor, grid: int, layers: tuple[int, ...]) -> Features:
        """The logits are log probabilities; their softmax over patches is the attention among patches only."""
        if max(layers) > self.net.config.num_hidden_layers or min(layers) < 1:
            raise UserError(
                f"The encoder {self.name} has blocks 1 to {self.net.config.num_hidden_layers}, but attention of {layers} was "
                "requested: choose blocks in that range."
            )
        # Fused kernels return no probabilities. They are restored afterwards, because features must not depend on earlier
        # calls, for example when an attention term ends during training.
        fused = self.net.config._attn_implementation
        self.net.set_attn_implementation("eager")
        try:
            output = self._run(pixels, grid, output_attentions=True)
        finally:
            self.net.set_attn_implementation(fused)
        attention = {}
        for layer in layers:
            patches = output.attentions[layer - 1][:, :, self.prefix :, self.prefix :].float()  # (N, h, G*G, G*G)
            # A probability may be rounded to 0; its logarithm, minus infinity, would turn the loss into NaN.
            attention[layer] = patches.clamp_min(torch.finfo(torch.float32).tiny).log()
        return self._features(output.last_hidden_state)._replace(attention=attention)

    def _run(self, pixels: Tensor, grid: int, **arguments: Any) -> Any:
        self.place(grid)
        arguments |= self.family.call
        # transformers sorts the patches by this noise and masks none; ascending noise preserves their order.
        if self.family.masks:
            arguments["noise"] = torch.arange(grid * grid, device=pixels.device).float().expand(len(pixels), -1)
        return self.net(pixels, **arguments)

    def _features(self, tokens: Tensor) -> Features:
        """(N, P + G*G, D) -> patches and the pooled vector."""
        patches = tokens[:, self.prefix :]
        return Features(patches, tokens[:, 0] if self.family.class_token else patches.mean(1))

    def place(self, grid: int) -> None:
        """Resample the network's position table to this grid, as the reference code does at loading.

        transformers would resample in each forward pass and without antialiasing; it does not change a table of the right size.
        """
        class_rows = int(self.family.class_token)
        native, table = self.native_positions, positions_of(self.net)
        if native is not None and table is not None and table.shape[1] != class_rows + grid * grid:
            # A tensor made in inference mode cannot be used outside it, but later calls use this table.
            with torch.inference_mode(False):
                place_positions(self.net, resample_positions(native, grid, class_rows))


def load_vit(name: str, weights: Path | None) -> ViTEncoder:
    """Load FAMILY-SIZE from `weights`: a folder in the hub's format, the original project's file, or None for cache or hub.

    Raises:
        UserError: a file is missing, damaged or of another model, or the hub is not reachable and there is no cached copy.
    """
    family, size = family_of(name)
    net, file = read(name, family, size, locate_weights(name, family, size, weights))
    return ViTEncoder(net, family, name, file)


def normalise(pixels: Tensor, colours: Colours) -> Tensor:
    """Normalise per channel; without buffers, which .to(bfloat16) would round."""
    channels = zip(pixels.unbind(1), colours.mean, colours.std, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def preprocessing(family: Family, positions: Tensor | None) -> str:
    """Description of the preprocessing, for the manifest of cached features."""
    steps = [f"{family.colours.name} mean and std", "bicubic to grid * patch_size, no antialias"]
    if family.resize_first:
        steps.reverse()
    tables = "rotary positions" if positions is None else "positions resampled bicubic with antialias"
    return "; ".join(["pixels / 255", *steps, tables])


def unusual_settings(family: Family, config: Any) -> list[str]:
    """Settings of a config.json that change the features but no weight, if they differ from those of the family."""
    usual = vars(type(config)()) | dict(family.settings)
    given = vars(config)
    names = [name for name in ("hidden_act", "layer_norm_eps") if name in given]
    return [f"{name} {given[name]}" for name in names if given[name] != usual[name]]


def positions_of(net: nn.Module) -> Tensor | None:
    """The network's position table (1, [1 +] M*M, D); None for rotary positions (DINOv3)."""
    embeddings = embeddings_of(net)
    rows = getattr(embeddings, "position_embedding", None)
    if isinstance(rows, nn.Embedding):  # CLIP and SigLIP use an embedding
        return rows.weight[None]
    return getattr(embeddings, "position_embeddings", None)


def place_positions(net: nn.Module, table: Tensor) -> None:
    """Replace the position table by a frozen one."""
    embeddings = embeddings_of(net)
    rows = getattr(embeddings, "position_embedding", None)
    if isinstance(rows, nn.Embedding):
        rows.weight = nn.Parameter(table[0], requires_grad=False)
        embeddings.position_ids = torch.arange(table.shape[1], device=table.device)[None]
    else:
        embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)


def embeddings_of(net: nn.Module) -> nn.Module:
    # In transformers 4 the embeddings of CLIP and SigLIP are nested.
    return getattr(net, "vision_model", net).get_submodule("embeddings")


def resample_positions(table: Tensor, grid: int, class_rows: int = 1) -> Tensor:
    """Positions (1, class_rows + M*M, D) -> (1, class_rows + G*G, D): bicubic with antialiasing; class rows are unchanged."""
    native = round((table.shape[1] - class_rows) ** 0.5)
    if native == grid:
        return table
    image = table[:, class_rows:].float().unflatten(1, (native, native)).permute(0, 3, 1, 2)  # (1, D, M, M)
    image = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:, :class_rows], image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
