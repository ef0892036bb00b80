"""Released checkpoints of REPA, SiT and DiT as state dicts of `DiT`.

The names of our modules are those of the released files, so what is left to map are the conventions: REPA's projectors
and its older block names, and SiT's reversed time and opposite velocity, which fold exactly into the weights.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repa.base.errors import UserError, nearest
from repa.models.config import SIZES
from repa.models.dit import DiT
from repa.models.layers import timestep_frequencies

State = dict[str, Tensor]
KINDS = ("repa", "sit", "dit")


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
    if kind not in KINDS:
        allowed = ", ".join(KINDS)
        raise UserError(f"Unknown kind of checkpoint {kind!r}: allowed are {allowed}.{nearest(str(kind), KINDS)}")
    if isinstance(path_or_state_dict, Mapping):
        where, content = "The state dict", path_or_state_dict
    else:
        where, content = str(path_or_state_dict), _read(Path(path_or_state_dict))
    state = {key.removeprefix("module."): value for key, value in _weights(content).items()}
    projectors = {}
    if kind == "repa":
        state = _modern_block_names(state)
        names = [key for key in state if key.startswith("projectors.")]
        projectors = {name.removeprefix("projectors."): state.pop(name) for name in names}
    _check_keys(state, where, kind)
    if kind == "sit":
        state = _from_sit(state)
    return state, projectors


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
        num_heads = next((heads for *size, heads in SIZES.values() if size == [hidden_dim, depth]), None)
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
    }


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


def _from_sit(state: State) -> State:
    """v(x, t) = -v_SiT(x, 1 - t), by weights alone (SiT: t = 1 is data and velocity = data - noise)."""
    state = dict(state)
    channels, patch_size = state["x_embedder.proj.weight"].shape[1:3]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (patch_size**2, -1))[:, :channels]  # the variance channels come last, and go
        state[name] = -rows.flatten(0, 1)
    name = "t_embedder.mlp.0.weight"
    state[name] = _reverse_time(state[name])
    return state


def _reverse_time(weight: Tensor) -> Tensor:
    """The W' with W' [cos ft, sin ft] = W [cos f(1-t), sin f(1-t)], by the addition theorems in float64."""
    on_cos, on_sin = weight.double().chunk(2, dim=1)
    f = timestep_frequencies(weight.shape[1]).double()
    reversed_ = torch.cat([on_cos * f.cos() + on_sin * f.sin(), on_cos * f.sin() - on_sin * f.cos()], dim=1)
    return reversed_.to(weight.dtype)
