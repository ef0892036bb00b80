"""Released checkpoints of REPA, SiT and DiT as state dicts of `DiT`, and the other way round.

The names of our modules are those of the released files, so what is left to map are the conventions: REPA's projectors
and its older block names, and SiT's reversed time and opposite velocity, which fold exactly into the weights.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repa.base.errors import UserError, nearest
from repa.models.config import SIZES
from repa.models.conventions import State, from_sit, to_sit
from repa.models.dit import DiT

KINDS = ("repa", "sit", "dit")
STREAM, HEAD = re.compile(r"streams\.(\w+)\.linear\.bias"), re.compile(r"heads\.(\d+)\.linear\.bias")


class Published(NamedTuple):
    """All that is used of a released checkpoint, as state dicts of `DiT` and of its projectors (see load_published)."""

    ema: State
    projectors: State  # of the EMA weights
    model: State  # the raw weights; empty when the file has one set only
    steps: int | None  # steps of training, where the file tells
    settings: dict[str, Any]  # how it was trained, as its own code named it; empty when the file does not tell


def load_published(path_or_state_dict: str | Path | Mapping[str, Any], kind: str) -> tuple[State, State]:
    """State dicts of DiT and of the projectors from a released checkpoint; the second is empty for SiT and DiT.

    Args:
        path_or_state_dict: a .pt or .safetensors file, or what it holds: a bare state dict, or a training checkpoint
            {"ema": ..., "model": ..., "args": ...}, of which the EMA weights are taken.
        kind: "repa" (sihyun-yu/REPA), "sit" (willisma/SiT) or "dit" (facebookresearch/DiT). A SiT is turned into our
            convention, t = 1 is noise and velocity = noise - data, and loses the variance channels that it never uses;
            a DiT keeps them.

    Returns:
        The projectors' keys are those of the file without "projectors.": "0.2.weight" is layer 2 of projector 0.

    Raises:
        UserError: a missing or damaged file, or one that is not a checkpoint of this kind.
    """
    _check_kind(kind)
    if isinstance(path_or_state_dict, Mapping):
        return _translate(_weights(path_or_state_dict), "The state dict", kind)
    return _translate(_weights(_read(Path(path_or_state_dict))), str(path_or_state_dict), kind)


def read_published(path: str | Path, kind: str) -> Published:
    """A released checkpoint with its raw weights, steps and settings where it has them; errors as in load_published."""
    _check_kind(kind)
    content = _read(Path(path))
    ema, projectors = _translate(_weights(content), str(path), kind)
    model, steps, settings = {}, None, {}
    if isinstance(content, Mapping):
        if "ema" in content and "model" in content:
            model, _ = _translate(_weights({"model": content["model"]}), str(path), kind)
        steps = content["steps"] if isinstance(content.get("steps"), int) else None
        arguments = content.get("args")
        settings = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return Published(ema, projectors, model, steps, settings)


def to_published(state: Mapping[str, Tensor], projectors: Mapping[str, Tensor], kind: str) -> State:
    """A bare state dict as the code of REPA, SiT or DiT loads it: what load_published undoes.

    A SiT gets its own time and sign back, for velocity networks, and variance channels that are zero: its code builds
    and then discards them. Only a REPA has projectors; the others are written without.

    Raises:
        UserError: variance channels where the kind has none ("repa", "sit"), or none where it needs them ("dit").
    """
    _check_kind(kind)
    learn_sigma = constructor_arguments(state, num_heads=1)["learn_sigma"]
    if learn_sigma != (kind == "dit"):
        does, choice = ("predicts", "dit") if learn_sigma else ("does not predict", "repa or sit")
        raise UserError(f"This network {does} a variance, so it cannot be written as kind {kind!r}: choose {choice}.")
    state = dict(state)
    if kind == "sit":
        return to_sit(state)
    return state | ({f"projectors.{key}": value for key, value in projectors.items()} if kind == "repa" else {})


def constructor_arguments(state: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """Arguments with which DiT loads this state dict, read from the shapes of its tensors.

    The number of heads leaves no trace there: it is that of the named size with this width and depth, unless given.

    Raises:
        UserError: no named size has this width and depth, and the number of heads was not given.
    """
    hidden_dim, latent_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    blocks = filter(None, (re.match(r"blocks\.(\d+)\.", key) for key in state))
    depth = 1 + max((int(block[1]) for block in blocks), default=0)
    if num_heads is None:
        num_heads = heads_of_named(hidden_dim, depth)
        if num_heads is None:
            raise UserError(
                f"No named model has width {hidden_dim} and depth {depth}: give the number of heads, "
                f"which a checkpoint does not tell."
            )
    return {
        "latent_size": round(state["pos_embed"].shape[1] ** 0.5) * patch_size,
        "latent_channels": latent_channels,
        "patch_size": patch_size,
        "hidden_dim": hidden_dim,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_dim,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * latent_channels * patch_size**2,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "streams": {m[1]: len(value) for key, value in state.items() if (m := STREAM.fullmatch(key))},
        "heads": tuple(sorted(int(m[1]) for key in state if (m := HEAD.fullmatch(key)))),
    }


def heads_of_named(hidden_dim: int, depth: int) -> int | None:
    """Attention heads of the named size with this width and depth; None when no name has them."""
    return next((heads for *size, heads in SIZES.values() if size == [hidden_dim, depth]), None)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        allowed = ", ".join(KINDS)
        raise UserError(f"Unknown kind of checkpoint {kind!r}: allowed are {allowed}.{nearest(str(kind), KINDS)}")


def _translate(weights: Mapping[str, Tensor], where: str, kind: str) -> tuple[State, State]:
    """State dicts of DiT and of the projectors from one set of weights of a checkpoint; `where` names it in errors."""
    state = {key.removeprefix("module."): value for key, value in weights.items()}
    projectors = {}
    if kind == "repa":
        state = _modern_block_names(state)
        names = [key for key in state if key.startswith("projectors.")]
        projectors = {name.removeprefix("projectors."): state.pop(name) for name in names}
    _check_keys(state, where, kind)
    return (from_sit(state) if kind == "sit" else state), projectors


def _read(path: Path) -> Any:
    """The content of a checkpoint file; nothing but tensors, plain containers and argparse.Namespace is unpickled."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read: it is damaged, or not a checkpoint of tensors ({reason}).") from error


def _weights(content: Any) -> Mapping[str, Tensor]:
    """The EMA weights of a training checkpoint, else its weights, else the whole."""
    if isinstance(content, Mapping):
        content = content.get("ema", content.get("model", content))
    named = isinstance(content, Mapping) and all(isinstance(key, str) for key in content)
    if not (named and content and all(isinstance(value, Tensor) for value in content.values())):
        raise UserError("The checkpoint holds no state dict: neither 'ema', nor 'model', nor tensors by name.")
    return content


def _modern_block_names(state: State) -> State:
    """Older REPA checkpoints count the blocks after the alignment depth anew, as decoder_blocks."""
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}

    def modern(key: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + len(blocks)}.", key)

    return {modern(key): value for key, value in state.items()}


def _check_keys(state: State, where: str, kind: str) -> None:
    """Every tensor of a DiT with these sizes, with its shape, and no other."""
    problem = ""
    try:
        arguments = constructor_arguments(state, num_heads=1)
        if arguments["qk_norm"]:
            arguments["num_heads"] = arguments["hidden_dim"] // state["blocks.0.attn.q_norm.weight"].shape[0]
        with torch.device("meta"):
            expected = {key: value.shape for key, value in DiT(**arguments).state_dict().items()}
    except KeyError as error:
        problem = f"it has no {error.args[0]!r}"
    except (ValueError, IndexError, ZeroDivisionError) as error:
        problem = f"the shapes of its tensors do not fit together ({error})"
    else:
        missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
        wrong = [key for key in expected.keys() & state.keys() if expected[key] != state[key].shape]
        if missing:
            problem = f"it has no {min(missing)!r} ({len(missing)} tensors are missing)"
        elif unknown:
            problem = f"it has an unknown tensor {min(unknown)!r} ({len(unknown)} are unknown)"
        elif wrong:
            key = min(wrong)
            problem = f"{key!r} has shape {tuple(state[key].shape)} where {tuple(expected[key])} belongs"
    if problem:
        raise UserError(f"{where} is not a checkpoint of kind {kind!r}: {problem}.")
