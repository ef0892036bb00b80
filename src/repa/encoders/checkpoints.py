"""Location and loading of an encoder's weights: a folder in the hub's format, or an original project's file.

The state dict of an original project is converted to the names of the hub's vision transformers, through timm's names.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repa.base import faults, files, imports
from repa.base.errors import UserError
from repa.base.pretrained import CONFIG, Repository, found_of
from repa.base.weights import no_larger_than, read_weights, require_all_read
from repa.encoders.families import SIZES, TORCH_HUB, Family, Original

# File names in the hub's format; repositories from before safetensors have pytorch_model.bin.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MISSPELT = {"norm13": "norm1", "fc13": "fc1", "norm14": "norm2", "fc14": "fc2"}  # in RCG's MoCo v3 files
# OpenAI's CLIP: names, or parts of names between dots, that differ from timm's
OPENAI = {"class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1": "patch_embed.proj",
          "ln_pre": "norm_pre", "ln_post": "norm", "ln_1": "norm1", "ln_2": "norm2", "c_fc": "fc1", "c_proj": "fc2",
          "out_proj": "proj", "in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}  # fmt: skip
PARTS = ("query", "key", "value")  # the order of the rows of attn.qkv


def repository_of(name: str, family: Family, size: str) -> Repository:
    """The repository of an encoder on the hub, and the alternatives for its error message."""
    hub, original, ways = family.hub[size], family.original_of(size), []
    if hub:
        ways.append((f"weights=FOLDER with {CONFIG} and {WEIGHTS[0]}", _shelf() / name))
    if original:
        ways.append((f"weights=FILE, the checkpoint of {original.project}", _shelf() / original.file))
    what, places = (" or ".join(map(str, each)) for each in zip(*ways, strict=True))
    by_hand = f"give {what} (--feature-weights {name}=PATH), or put it at {places}"
    return Repository(f"encoder {name}", hub or "", ((CONFIG,), WEIGHTS), by_hand)


def locate_weights(name: str, family: Family, size: str, weights: Path | None) -> Path:
    """The given weights, else those on this machine, else the hub's, which are downloaded."""
    if found := weights or on_this_machine(name, family, size):
        return found
    repository = repository_of(name, family, size)
    if not repository.name:
        raise UserError(f"The weights of the encoder {name} are not on the hub: {repository.by_hand}.")
    return repository.fetched()


def on_this_machine(name: str, family: Family, size: str) -> Path | None:
    """The weights in the cache folder, else in the caches of the hub or of the project's code; without network access."""
    repository, original = repository_of(name, family, size), family.original_of(size)
    for place in (name, *([original.file] if original else [])):
        if (path := _shelf() / place).exists():
            return path
    if repository.name and (folder := repository.cached()):
        return folder
    return file if original and (file := kept(original)).is_file() else None


def _shelf() -> Path:
    """The folder for manually downloaded weights."""
    return files.cache_folder() / "encoders"


def kept(original: Original) -> Path:
    """The path at which the project's own code stores the file."""
    if original.kept == TORCH_HUB:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
    else:
        folder = Path.home() / original.kept if original.kept else _shelf()
    return folder / original.file


def read(name: str, family: Family, size: str, path: Path) -> tuple[nn.Module, Path]:
    """The network of `path` in float32, with every tensor from the file, and that file.

    Raises:
        UserError: the file is damaged, belongs to another model, or lacks tensors.
    """
    from huggingface_hub.errors import StrictDataclassError

    transformers = imports.need("transformers", f"The encoder {name}")

    original, file, model = family.original_of(size), path, getattr(transformers, family.model)
    # A folder in the hub's format always has the hub's tensor names.
    if not (path.is_file() and original):
        repository_of(name, family, size).check(path, family.model_types)
        original, (file,) = None, found_of(WEIGHTS, path)
    try:
        with faults.reading(file, f"weights of the encoder {name}", "Download or copy it again."):
            config, tensors = _contents(name, family, original, file, model.config_class)
        with no_larger_than([file], file if original else file.parent / CONFIG):
            model(config, **family.build)
        net, report = model.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True, **family.build
        )
    except UserError:
        raise
    except (
        StrictDataclassError,
        RuntimeError,
        ValueError,
        TypeError,
        ArithmeticError,
        AttributeError,
        LookupError,
    ) as error:
        fits = f"the encoder {name}" if original else f"its {CONFIG}"
        raise UserError(f"{file} does not fit {fits}: {str(error).partition(chr(10))[0]}") from error
    require_all_read(file, f"the encoder {name}", report, net)
    # A folder of the hub may also hold a text tower or a decoder. The tensors of a project's own file were renamed, so any
    # others belong to another network.
    if original and report["unexpected_keys"]:
        raise UserError(
            f"{file} belongs to another network: the encoder {name} has no {min(report['unexpected_keys'])}. Give the checkpoint "
            f"of {original.project}."
        )
    return net, file


def _contents(
    name: str, family: Family, original: Original | None, file: Path, config_class: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors of a checkpoint, in the hub's names."""
    tensors = read_weights(file)
    if original:  # the file has no configuration: it follows from the shapes
        settings, tensors = convert_original(state_dict_of(tensors, original, name, file), original)
        return config_class(**settings, **family.settings), tensors
    # return_dict, because a config.json may ask for tuples
    config = config_class.from_pretrained(file.parent, local_files_only=True, return_dict=True, **family.settings)
    # A model with several towers: only the vision tower is used.
    return config, {key: value for key, value in tensors.items() if key.startswith(family.subset)} or tensors


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
