"""Conversion of released checkpoints of REPA, SiT and DiT to state dicts of `DiT`, and back.

Our modules have the names of the released files, so only conventions are converted: REPA's projectors and older block names,
and SiT's reversed time and velocity, which are folded exactly into the weights: the first layer of the timestep embedding is
linear in [cos f t, sin f t], so linear maps of these features can be merged into its weight (D, 2F).
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repa.base.errors import UserError, choices
from repa.base.weights import read_weights
from repa.models.checkpoint_weights import StateDict, choose_weights
from repa.models.config import SIZES
from repa.models.dit import DiT
from repa.models.layers import timestep_frequencies

KINDS = ("repa", "sit", "dit")
CODES = {"repa": ("linear", "cosine"), "sit": ("Linear", "GVP", "VP")}  # the paths as each code spells them
MOST_STEPS = 10**12  # largest plausible number of training steps
FIRST_TIME_LAYER = "t_embedder.mlp.0.weight"
# Tensors that show the options of a network.
SWIGLU, FUSION = "blocks.0.mlp.w3.weight", "router.fuse.weight"
STREAM, HEAD = re.compile(r"streams\.(\w+)\.linear\.bias"), re.compile(r"heads\.(\d+)\.linear\.bias")


class Published(NamedTuple):
    """The contents of a released checkpoint, as state dicts of `DiT` and of its projectors (see load_published)."""

    ema: StateDict
    projectors: StateDict  # of the EMA weights; "0.2.weight" is layer 2 of projector 0
    model: StateDict  # the raw weights; empty if the file has only one set
    steps: int | None  # training steps; None if the file does not give them
    settings: dict[str, Any]  # training settings, named as in its own code; empty if the file does not give them
    taken: str  # a sentence that names the file's weights in use


def load_published(path_or_state_dict: str | Path | Mapping[str, Any], kind: str, weights: str = "") -> Published:
    """Load a released checkpoint; only a REPA has projectors.

    Args:
        path_or_state_dict: a .pt or .safetensors file, or its contents: a state dict, or a training checkpoint
            {"ema": ..., "model": ..., "args": ...}.
        kind: "repa" (sihyun-yu/REPA), "sit" (willisma/SiT) or "dit" (facebookresearch/DiT). A SiT is converted to our
            convention, t = 1 is noise and velocity = noise - data, and loses its unused variance channels; a DiT keeps
            them.
        weights: the set to use if the file has several averages; empty: its average, otherwise its only weights.

    Raises:
        UserError: a missing or damaged file, or one that is not a checkpoint of this kind.
    """
    _check_kind(kind)
    given = path_or_state_dict
    content, where = (given, "The state dict") if isinstance(given, Mapping) else (read_weights(given), str(given))
    arguments = content.get("args") if isinstance(content, Mapping) else None
    settings = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    settings = dict(settings) if isinstance(settings, Mapping) else {}
    _require_code(settings, kind, where)
    chosen, raw, taken = choose_weights(content, where, kind, weights)
    ema, projectors = _translate(chosen.tensors, where, kind)
    model = _translate(raw.tensors, where, kind)[0] if raw else {}
    return Published(ema, projectors, model, _steps(content), settings, taken)


def to_published(state: Mapping[str, Tensor], projectors: Mapping[str, Tensor], kind: str) -> StateDict:
    """A state dict for the code of REPA, SiT or DiT, the inverse of load_published.

    A SiT gets its own time and sign, for velocity networks, and variance channels of zero, which its code builds and
    discards. Projectors are written only for a REPA.

    Raises:
        UserError: variance channels for a kind without them ("repa", "sit"), or none for a kind with them ("dit").
    """
    _check_kind(kind)
    arguments = constructor_arguments(state, num_heads=1)
    if other := not_plain(arguments, state):
        raise UserError(
            f"The code of REPA, SiT and DiT does not support this network ({other}): use `repa export` instead."
        )
    learn_sigma = arguments["learn_sigma"]
    if learn_sigma != (kind == "dit"):
        does, choice = ("predicts", "dit") if learn_sigma else ("does not predict", "repa or sit")
        raise UserError(f"This network {does} a variance, so it cannot be written as kind {kind!r}: choose {choice}.")
    state = dict(state)
    if kind == "sit":
        return to_sit(state)
    return state | ({f"projectors.{key}": value for key, value in projectors.items()} if kind == "repa" else {})


def from_sit(state: StateDict) -> StateDict:
    """v(x, t) = -v_SiT(x, 1 - t), by changing the weights (SiT: t = 1 is data and velocity = data - noise)."""
    # SiT predicts an unused variance in the last channels of each patch; the first half is the velocity.
    return _reversed(state, lambda rows, channels: rows[:, :channels])


def to_sit(state: StateDict) -> StateDict:
    """The inverse of from_sit (reversing time twice is the identity), with variance channels of zero."""
    return _reversed(state, lambda rows, channels: torch.cat([rows, torch.zeros_like(rows)], dim=1))


def _reversed(state: StateDict, answers: Callable[[Tensor, int], Tensor]) -> StateDict:
    """Reverse time and sign; `answers` selects the last layer's rows (p * p, channels of a patch, ...)."""
    channels, patch_size = state["x_embedder.proj.weight"].shape[1:3]
    last = {
        name: answers(-state[name].unflatten(0, (patch_size**2, -1)), channels).flatten(0, 1)
        for name in ("final_layer.linear.weight", "final_layer.linear.bias")
    }
    return {**state, **last, FIRST_TIME_LAYER: reverse_time(state[FIRST_TIME_LAYER])}


def reverse_time(weight: Tensor) -> Tensor:
    """The W' with W' [cos ft, sin ft] = W [cos f(1-t), sin f(1-t)], by the addition theorems in float64."""
    # In float64, to keep rounding errors of the sines out of the weights.
    on_cos, on_sin = weight.double().chunk(2, dim=1)
    f = timestep_frequencies(weight.shape[1]).double()
    reversed_ = torch.cat([on_cos * f.cos() + on_sin * f.sin(), on_cos * f.sin() - on_sin * f.cos()], dim=1)
    return reversed_.to(weight.dtype)


def constructor_arguments(
    state: Mapping[str, Tensor], num_heads: int | None = None, patch_overlap: int = 0
) -> dict[str, Any]:
    """Arguments of the DiT that loads this state dict, from the shapes of its tensors.

    The shapes do not determine the number of heads, which is that of the named size with this width and depth unless given,
    and the overlap of patches, which released checkpoints do not have.
    """
    hidden_dim, latent_channels, kernel, _ = state["x_embedder.proj.weight"].shape
    patch_size = kernel - 2 * patch_overlap
    blocks = filter(None, (re.match(r"blocks\.(\d+)\.", key) for key in state))
    depth = 1 + max((int(block[1]) for block in blocks), default=0)
    if num_heads is None:
        num_heads = heads_of_named(hidden_dim, depth)
        if num_heads is None:
            raise UserError(
                f"No named model has width {hidden_dim} and depth {depth}: give the number of heads, "
                f"which a checkpoint does not record."
            )
    return {
        "latent_size": round(state["pos_embed"].shape[1] ** 0.5) * patch_size,
        "latent_channels": latent_channels,
        "patch_size": patch_size,
        "hidden_dim": hidden_dim,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "mlp_ratio": _mlp_width(state) / hidden_dim,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * latent_channels * kernel**2,
        "patch_overlap": patch_overlap,
        "norm": "rms" if "blocks.0.norm1.weight" in state else "layer",
        "mlp": "swiglu" if SWIGLU in state else "gelu",
        "qk_norm": _qk_norm(state),
        "bias": "blocks.0.attn.qkv.bias" in state,
        "rotary": "rotation.cos" in state,
        "streams": {m[1]: len(value) for key, value in state.items() if (m := STREAM.fullmatch(key))},
        "heads": tuple(sorted(int(m[1]) for key in state if (m := HEAD.fullmatch(key)))),
    }


def not_plain(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """An argument that DiT and SiT do not support, such as "norm is rms"; empty if they support all."""
    plain = {"norm": "layer", "mlp": "gelu", "bias": True, "rotary": False, "streams": {}}
    found = [f"{name} is {arguments[name]}" for name, value in plain.items() if arguments[name] != value]
    return found[0] if found else "merge is fuse" if FUSION in state else ""


def _mlp_width(state: Mapping[str, Tensor]) -> int:
    """Hidden width of the MLPs; SwiGLU's matrices have two thirds of it, rounded down."""
    if SWIGLU in state:
        # Rounded up, because `SwiGLU` rounds down; this width gives the same matrices.
        return math.ceil(state[SWIGLU].shape[1] * 3 / 2)
    return state["blocks.0.mlp.fc1.weight"].shape[0]


def _qk_norm(state: Mapping[str, Tensor]) -> str:
    if "blocks.0.attn.q_norm.weight" not in state:
        return "none"
    return "layer" if "blocks.0.attn.q_norm.bias" in state else "rms"


def heads_of_named(hidden_dim: int, depth: int) -> int | None:
    """Number of attention heads of the named size with this width and depth; None if there is none."""
    return next((heads for *size, heads in SIZES.values() if size == [hidden_dim, depth]), None)


def _require_code(settings: Mapping[Any, Any], kind: str, where: str) -> None:
    """Raises UserError if a checkpoint's settings are those of another code.

    The tensors alone do not tell: time runs backwards in SiT, and a DiT predicts noise.
    """
    path, model = (settings.get(name) for name in ("path_type", "model"))
    if isinstance(path, str):
        found = next((code for code, paths in CODES.items() if path in paths), kind)
    else:
        found = "dit" if isinstance(model, str) and model.startswith("DiT") else kind
    if found != kind:
        shown = f"path_type {path!r}" if isinstance(path, str) else f"model {model!r:.40}"
        raise UserError(
            f"{where} was saved by the code of kind {found!r}, as its settings show ({shown}), not {kind!r}: give --kind {found}. "
            "If that is wrong, save the weights without the settings."
        )


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"Unknown kind of checkpoint {kind!r}{choices(kind, KINDS)}")


def _translate(weights: Mapping[str, Tensor], where: str, kind: str) -> tuple[StateDict, StateDict]:
    """State dicts of DiT and of the projectors from one set of weights of a checkpoint; `where` is its name in errors."""
    state, projectors = dict(weights), {}
    if kind == "repa":
        state = _modern_block_names(state)
        names = [key for key in state if key.startswith("projectors.")]
        projectors = {name.removeprefix("projectors."): state.pop(name) for name in names}
    check_keys(state, where, kind)
    check_values({**state, **projectors}, where)
    return (from_sit(state) if kind == "sit" else state), projectors


def _steps(content: Mapping[str, Any]) -> int | None:
    """The number of training steps, by the keys that training scripts use."""
    counts = (content.get(name) for name in ("steps", "step", "global_step", "train_steps", "iteration"))
    return next((n for n in counts if isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_STEPS), None)


def _modern_block_names(state: StateDict) -> StateDict:
    """Rename decoder_blocks of older REPA checkpoints, which number the blocks after the alignment depth from 0."""
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}

    def modern(key: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + len(blocks)}.", key)

    return {modern(key): value for key, value in state.items()}


def check_keys(state: StateDict, where: str, kind: str) -> None:
    """Raises UserError unless the state dict has exactly the tensors of a DiT of these sizes, with their shapes."""
    try:
        arguments = constructor_arguments(state, num_heads=1)
        # Only norms of queries and keys have a shape that depends on the number of heads.
        if arguments["qk_norm"] != "none":
            arguments["num_heads"] = arguments["hidden_dim"] // state["blocks.0.attn.q_norm.weight"].shape[0]
        problem = misfit(state, arguments)
    except KeyError as error:
        problem = f"it has no {error.args[0]!r}"
    except (ValueError, IndexError, ZeroDivisionError) as error:
        problem = f"the shapes of its tensors do not fit together ({error})"
    if problem:
        raise UserError(f"{where} is not a checkpoint of kind {kind!r}: {problem}.")


def misfit(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> str:
    """Why a DiT with these arguments cannot load this state dict, such as "it has no 'pos_embed'"; empty if it can."""
    # Checked before a network with the file's number of blocks and positions is built.
    if arguments["depth"] > len(state):
        return f"it has {arguments['depth']} blocks but only {len(state)} tensors"
    sides = arguments["latent_size"]
    height, width = (sides, sides) if isinstance(sides, int) else sides
    patch = arguments["patch_size"]
    if (tokens := (height // patch) * (width // patch)) != state["pos_embed"].shape[1]:
        return f"'pos_embed' has {state['pos_embed'].shape[1]} positions, not {tokens}"
    with torch.device("meta"):
        expected = {key: value.shape for key, value in DiT(**arguments).state_dict().items()}
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing:
        return f"it has no {min(missing)!r} ({len(missing)} tensors are missing)"
    if unknown:
        return f"it has an unknown tensor {min(unknown)!r} ({len(unknown)} are unknown)"
    wrong = min((key for key in expected if expected[key] != state[key].shape), default="")
    return wrong and f"{wrong!r} has the shape {tuple(state[wrong].shape)}, not {tuple(expected[wrong])}"


def check_values(state: StateDict, where: str) -> None:
    """Raises UserError unless all tensors are finite floating-point numbers."""
    for key, value in state.items():
        problem = ""
        if (
            not value.is_floating_point()
            or value.element_size() < 2
            or value.layout != torch.strided
            or value.device.type != "cpu"
        ):
            kind = f"{value.dtype}".removeprefix("torch.")
            problem = f"has the type {kind} ({value.device.type}, {value.layout}) and not floating-point numbers of at least 16 bits"
        elif not value.float().isfinite().all():
            problem = "has numbers that are not finite in float32"
        if problem:
            raise UserError(
                f"{where} cannot be used: its tensor {key!r} {problem}. Use another checkpoint of this training."
            )
