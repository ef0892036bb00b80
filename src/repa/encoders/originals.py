"""State dicts of the original projects (timm's names) in the names of the hub's vision transformers."""

from pathlib import Path
from typing import Any

from torch import Tensor

from repa.base.errors import UserError
from repa.encoders.families import Original

MISSPELT = {"norm13": "norm1", "fc13": "fc1", "norm14": "norm2", "fc14": "fc2"}  # in RCG's MoCo v3 files
NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
PARTS = ("query", "key", "value")  # the order of the rows of attn.qkv


def state_dict_of(checkpoint: Any, original: Original, name: str, file: Path) -> dict[str, Tensor]:
    """The encoder's own tensors in a checkpoint file, in timm's names; raises UserError in another project's file."""
    inside = checkpoint
    if original.container is not None:
        inside = checkpoint.get(original.container) if isinstance(checkpoint, dict) else None
    found = inside if isinstance(inside, dict) else {}
    tensors = {
        key.removeprefix(original.prefix): value for key, value in found.items() if key.startswith(original.prefix)
    }
    tensors = {key: value for key, value in tensors.items() if not key.startswith(original.unused)}
    absent = {"pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} - tensors.keys()
    if absent:
        where = f" in {original.container!r}" if original.container else ""
        raise UserError(
            f"{file} is no checkpoint for the encoder {name}: it has no {original.prefix}{min(absent)}{where}; give the "
            f"checkpoint of {original.project}."
        )
    return tensors


def convert(tensors: dict[str, Tensor], original: Original) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """timm's names -> (settings of the network, read off the shapes; tensors in the hub's names, q, k and v apart)."""
    converted = {}
    for key, value in tensors.items():
        for wrong, right in MISSPELT.items():
            key = key.replace(f".{wrong}.", f".{right}.")
        stem, dot, kind = key.rpartition(".")  # kind is weight or bias; cls_token and pos_embed have none
        if not key.startswith("blocks."):
            stem, dot, kind = (stem, dot, kind) if stem else (key, "", "")
            converted[NAMES.get(stem, stem) + dot + kind] = value
            continue
        _, index, part = stem.split(".", 2)
        layer = f"encoder.layer.{index}."
        if part == "attn.qkv":
            for third, rows in zip(PARTS, value.chunk(3), strict=True):  # (3D, ...) -> 3 x (D, ...)
                converted[f"{layer}attention.attention.{third}.{kind}"] = rows
        else:
            converted[f"{layer}{BLOCK_NAMES.get(part, part)}.{kind}"] = value
    return settings_of(tensors, original), converted


def settings_of(tensors: dict[str, Tensor], original: Original) -> dict[str, Any]:
    """Width, depth, heads, patch and native image size of a state dict in timm's names."""
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    grid = int((tensors["pos_embed"].shape[1]) ** 0.5)  # M also of 1 + M*M positions
    return {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        "num_attention_heads": width // original.head_dim,
        "intermediate_size": next(v.shape[0] for k, v in tensors.items() if k.startswith("blocks.0.mlp.fc1")),
        "patch_size": patch,
        "image_size": grid * patch,
    }
