"""Conversion of the original projects' state dicts to the names of the hub's vision transformers, through timm's names."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from repa.base.errors import UserError
from repa.encoders.families import SIZES, Original

MISSPELT = {"norm13": "norm1", "fc13": "fc1", "norm14": "norm2", "fc14": "fc2"}  # in RCG's MoCo v3 files
# OpenAI's CLIP: names, or parts of names between dots, that differ from timm's
OPENAI = {"class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1": "patch_embed.proj",
          "ln_pre": "norm_pre", "ln_post": "norm", "ln_1": "norm1", "ln_2": "norm2", "c_fc": "fc1", "c_proj": "fc2",
          "out_proj": "proj", "in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}  # fmt: skip
PARTS = ("query", "key", "value")  # the order of the rows of attn.qkv


class Naming(NamedTuple):
    """Map of timm's names to the hub's; other names are unchanged."""

    top: dict[str, str]
    block: str  # prefix of block {}
    inside: dict[str, str]
    third: str  # name of a third of attn.qkv: {} is query, key or value, and {0[0]} its first letter


VIT_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
}
NAMINGS = {
    "vit": Naming(
        VIT_TOP,
        "encoder.layer.{}.",
        {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        },
        "attention.attention.{}",
    ),
    "dinov2": Naming(
        VIT_TOP,
        "encoder.layer.{}.",
        {
            "attn.proj": "attention.output.dense",
            "ls1.gamma": "layer_scale1.lambda1",
            "ls2.gamma": "layer_scale2.lambda1",
            "mlp.w12": "mlp.weights_in",
            "mlp.w3": "mlp.weights_out",
        },
        "attention.attention.{}",
    ),
    "clip": Naming(
        {
            "cls_token": "vision_model.embeddings.class_embedding",
            "pos_embed": "vision_model.embeddings.position_embedding.weight",
            "patch_embed.proj": "vision_model.embeddings.patch_embedding",
            "norm_pre": "vision_model.pre_layrnorm",
            "norm": "vision_model.post_layernorm",
        },
        "vision_model.encoder.layers.{}.",
        {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"},
        "self_attn.{0[0]}_proj",
    ),
}


def state_dict_of(checkpoint: Any, original: Original, name: str, file: Path) -> dict[str, Tensor]:
    """The encoder's tensors of a checkpoint file, in timm's names; raises UserError for another project's file."""
    inside = checkpoint
    if original.container is not None:
        inside = checkpoint.get(original.container) if isinstance(checkpoint, dict) else None
    found = inside if isinstance(inside, dict) else {}
    tensors = {
        key.removeprefix(original.prefix): value
        for key, value in found.items()
        if isinstance(key, str) and isinstance(value, Tensor) and key.startswith(original.prefix)
    }
    tensors = {key: value for key, value in tensors.items() if not key.startswith(original.unused)}
    if original.naming == "clip":
        tensors = _from_openai(tensors)
    absent = {"pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} - tensors.keys()
    if absent:
        where = f" in {original.container!r}" if original.container else ""
        raise UserError(
            f"{file} is not a checkpoint for the encoder {name}: it has no {original.prefix}{min(absent)}{where}. Give the "
            f"checkpoint of {original.project}."
        )
    width, wanted = len(tensors["patch_embed.proj.weight"]), SIZES[name.rpartition("-")[2]][0]
    # The number of heads follows from the width, so a file of another size would load without an error and pass as the
    # named encoder.
    if width != wanted and any(width == other for other, *_ in SIZES.values()):
        raise UserError(
            f"{file} has the width {width}, but the encoder {name} has {wanted}: give the file of that size."
        )
    return tensors


def convert_original(tensors: dict[str, Tensor], original: Original) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """timm's names -> (settings of the network, from the shapes; tensors in the hub's names, with q, k and v separate)."""
    naming, converted = NAMINGS[original.naming], {}
    # Through timm's names: all these projects except OpenAI use its blocks, so one table per class of the hub is enough.
    for key, value in tensors.items():
        for wrong, right in MISSPELT.items():
            key = key.replace(f".{wrong}.", f".{right}.")
        block = re.match(r"blocks\.(\d+)\.", key)
        rest = key[block.end() :] if block else key
        stem, _, kind = rest.rpartition(".")  # kind is weight or bias; cls_token and layer scales have neither
        names, begin = (naming.inside, naming.block.format(block[1])) if block else (naming.top, "")
        if rest in names:
            converted[begin + names[rest]] = value
        elif stem == "attn.qkv":
            for third, rows in zip(PARTS, value.chunk(3), strict=True):  # (3D, ...) -> 3 x (D, ...)
                converted[f"{begin}{naming.third.format(third)}.{kind}"] = rows
        else:
            converted[f"{begin}{names.get(stem, stem)}.{kind}" if stem else begin + kind] = value
    if original.naming == "clip":
        for name in ("cls_token", "pos_embed"):  # stored without the batch axis
            key = naming.top[name]
            converted[key] = converted[key].reshape(-1, converted[key].shape[-1]).squeeze(0)
    return network_settings(tensors, original), converted


def network_settings(tensors: dict[str, Tensor], original: Original) -> dict[str, Any]:
    """Width, depth, heads, patch and native image size of a state dict in timm's names."""
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    # With a class token there are 1 + M * M positions; rounding down the root gives M in both cases.
    grid = int((tensors["pos_embed"].shape[1]) ** 0.5)
    settings = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        "num_attention_heads": width // original.head_dim,
        "patch_size": patch,
        "image_size": grid * patch,
    }
    hidden = len(tensors.get("blocks.0.mlp.fc1.weight", ()))  # 0 for SwiGLU, as in DINOv2-g
    if original.naming != "dinov2":
        return {**settings, "intermediate_size": hidden}
    registers = tensors.get("register_tokens")  # (1, R, D)
    if registers is not None:
        settings["num_register_tokens"] = registers.shape[1]
    return {**settings, "mlp_ratio": hidden // width or 4, "use_swiglu_ffn": "blocks.0.mlp.w12.weight" in tensors}


def _from_openai(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names of the image tower -> timm's."""
    renamed = {}
    for key, value in tensors.items():
        key = key.replace("transformer.resblocks.", "blocks.")
        key = ".".join(OPENAI.get(part, part) for part in key.split("."))
        renamed[key] = value[None] if key == "pos_embed" else value
    return renamed
