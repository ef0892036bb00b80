"""Released checkpoints of REPA, SiT and DiT as state dicts of `DiT`, and the other way round.

The names of our modules are those of the released files, so what is left to map are the conventions: REPA's projectors
and its older block names, and SiT's reversed time and opposite velocity, which fold exactly into the weights: the first layer of the
timestep embedding is linear in [cos f t, sin f t], and what is linear in these features goes into its weight (D, 2F).
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
MOST_STEPS = 10**12  # of a network that was trained
FIRST_TIME_LAYER = "t_embedder.mlp.0.weight"
# Tensors by which a state dict shows what the network was built with.
SWIGLU, FUSION = "blocks.0.mlp.w3.weight", "router.fuse.weight"
STREAM, HEAD = re.compile(r"streams\.(\w+)\.linear\.bias"), re.compile(r"heads\.(\d+)\.linear\.bias")


class Published(NamedTuple):
    """All that is used of a released checkpoint, as state dicts of `DiT` and of its projectors (see load_published)."""

    ema: StateDict
    projectors: StateDict  # of the EMA weights; "0.2.weight" is layer 2 of projector 0
    model: StateDict  # the raw weights; empty when the file has one set only
    steps: int | None  # steps of training, where the file tells
    settings: dict[str, Any]  # how it was trained, as its own code named it; empty when the file does not tell
    taken: str  # which weights of the file these are, as a sentence


def load_published(path_or_state_dict: str | Path | Mapping[str, Any], kind: str, weights: str = "") -> Published:
    """A released checkpoint; projectors are those of a REPA.

    Args:
        path_or_state_dict: a .pt or .safetensors file, or what it holds: a bare state dict, or a training checkpoint
            {"ema": ..., "model": ..., "args": ...}.
        kind: "repa" (sihyun-yu/REPA), "sit" (willisma/SiT) or "dit" (facebookresearch/DiT). A SiT is turned into our
            convention, t = 1 is noise and velocity = noise - data, and loses the variance channels that it never uses;
            a DiT keeps them.
        weights: the set to take where the file holds several averages; empty: its average, else its only one.

    Raises:
        UserError: a missing or damaged file, or one that is not a checkpoint of this kind.
    """
    _check_kind(kind)
    given = path_or_state_dict
    content, where = (given, "The state dict") if isinstance(given, Mapping) else (read_weights(given), str(given))
    chosen, raw, taken = choose_weights(content, where, kind, weights)
    ema, projectors = _translate(chosen.tensors, where, kind)
    model = _translate(raw.tensors, where, kind)[0] if raw else {}
    arguments = content.get("args")
    settings = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return Published(
        ema, projectors, model, _steps(content), dict(settings) if isinstance(settings, Mapping) else {}, taken
    )


def to_published(state: Mapping[str, Tensor], projectors: Mapping[str, Tensor], kind: str) -> StateDict:
    """A bare state dict as the code of REPA, SiT or DiT loads it: what load_published undoes.

    A SiT gets its own time and sign back, for velocity networks, and variance channels that are zero: its code builds
    and then discards them. Only a REPA has projectors; the others are written without.

    Raises:
        UserError: variance channels where the kind has none ("repa", "sit"), or none where it needs them ("dit").
    """
    _check_kind(kind)
    arguments = constructor_arguments(state, num_heads=1)
    if other := not_plain(arguments, state):
        raise UserError(
            f"The code of REPA, SiT and DiT cannot hold this network, whose {other}: use `repa export` instead."
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
    """v(x, t) = -v_SiT(x, 1 - t), by weights alone (SiT: t = 1 is data and velocity = data - noise)."""
    # SiT answers the variance in the last channels of each patch and never uses it: the first half is the velocity.
    return _reversed(state, lambda rows, channels: rows[:, :channels])


def to_sit(state: StateDict) -> StateDict:
    """The inverse of from_sit (reversing time twice is the identity), with variance channels that are zero."""
    return _reversed(state, lambda rows, channels: torch.cat([rows, torch.zeros_like(rows)], dim=1))


def _reversed(state: StateDict, answers: Callable[[Tensor, int], Tensor]) -> StateDict:
    """The other way in time, with the other sign; `answers` chooses the last layer's rows (p * p, channels of a patch, ...)."""
    channels, patch_size = state["x_embedder.proj.weight"].shape[1:3]
    last = {
        name: answers(-state[name].unflatten(0, (patch_size**2, -1)), channels).flatten(0, 1)
        for name in ("final_layer.linear.weight", "final_layer.linear.bias")
    }
    return {**state, **last, FIRST_TIME_LAYER: reverse_time(state[FIRST_TIME_LAYER])}


def reverse_time(weight: Tensor) -> Tensor:
    """The W' with W' [cos ft, sin ft] = W [cos f(1-t), sin f(1-t)], by the addition theorems in float64."""
    # In float64: rounded sines would otherwise end up in the weights.
    on_cos, on_sin = weight.double().chunk(2, dim=1)
    f = timestep_frequencies(weight.shape[1]).double()
    reversed_ = torch.cat([on_cos * f.cos() + on_sin * f.sin(), on_cos * f.sin() - on_sin * f.cos()], dim=1)
    return reversed_.to(weight.dtype)


def constructor_arguments(
    state: Mapping[str, Tensor], num_heads: int | None = None, patch_overlap: int = 0
) -> dict[str, Any]:
    """Arguments with which DiT loads this state dict, read from the shapes of its tensors.

    The number of heads leaves no trace there: it is that of the named size with this width and depth, unless given. Nor does
    the overlap of patches, which released checkpoints do not have.

    Raises:
        UserError: no named size has this width and depth, and the number of heads was not given.
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
    """What of these arguments, and of their weights, DiT and SiT have no place for, as "norm is rms"; empty when they have all."""
    plain = {"norm": "layer", "mlp": "gelu", "bias": True, "rotary": False, "streams": {}}
    found = [f"{name} is {arguments[name]}" for name, value in plain.items() if arguments[name] != value]
    return found[0] if found else "merge is fuse" if FUSION in state else ""


def _mlp_width(state: Mapping[str, Tensor]) -> int:
    """Hidden width of the MLPs; SwiGLU's matrices have two thirds of it, rounded down."""
    if SWIGLU in state:
        # Upwards: `SwiGLU` rounds down, so this width gives the same matrices again.
        return math.ceil(state[SWIGLU].shape[1] * 3 / 2)
    return state["blocks.0.mlp.fc1.weight"].shape[0]


def _qk_norm(state: Mapping[str, Tensor]) -> str:
    if "blocks.0.attn.q_norm.weight" not in state:
        return "none"
    return "layer" if "blocks.0.attn.q_norm.bias" in state else "rms"


def heads_of_named(hidden_dim: int, depth: int) -> int | None:
    """Attention heads of the named size with this width and depth; None when no name has them."""
    return next((heads for *size, heads in SIZES.values() if size == [hidden_dim, depth]), None)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"Unknown kind of checkpoint {kind!r}{choices(kind, KINDS)}")


def _translate(weights: Mapping[str, Tensor], where: str, kind: str) -> tuple[StateDict, StateDict]:
    """State dicts of DiT and of the projectors from one set of weights of a checkpoint; `where` names it in errors."""
    state, projectors = dict(weights), {}
    if kind == "repa":
        state = _modern_block_names(state)
        names = [key for key in state if key.startswith("projectors.")]
        projectors = {name.removeprefix("projectors."): state.pop(name) for name in names}
    check_keys(state, where, kind)
    check_values({**state, **projectors}, where)
    return (from_sit(state) if kind == "sit" else state), projectors


def _steps(content: Mapping[str, Any]) -> int | None:
    """Steps of training, by the names that training scripts give them."""
    counts = (content.get(name) for name in ("steps", "step", "global_step", "train_steps", "iteration"))
    return next((n for n in counts if isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_STEPS), None)


def _modern_block_names(state: StateDict) -> StateDict:
    """Older REPA checkpoints start counting again after the alignment depth, as decoder_blocks."""
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}

    def modern(key: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + len(blocks)}.", key)

    return {modern(key): value for key, value in state.items()}


def check_keys(state: StateDict, where: str, kind: str) -> None:
    """UserError unless there is every tensor of a DiT with these sizes, with its shape, and no other."""
    try:
        arguments = constructor_arguments(state, num_heads=1)
        # Only the norms of queries and keys have a shape that depends on the number of heads.
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
    """What keeps DiT with these arguments from loading this state dict, as "it has no 'pos_embed'"; empty when nothing does."""
    # Before a network is built of as many blocks as a name in the file claims, or with as many places.
    if arguments["depth"] > len(state):
        return f"{arguments['depth']} blocks in {len(state)} tensors"
    sides = arguments["latent_size"]
    height, width = (sides, sides) if isinstance(sides, int) else sides
    patch = arguments["patch_size"]
    if (tokens := (height // patch) * (width // patch)) != state["pos_embed"].shape[1]:
        return f"'pos_embed' has {state['pos_embed'].shape[1]} places where {tokens} belong"
    with torch.device("meta"):
        expected = {key: value.shape for key, value in DiT(**arguments).state_dict().items()}
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing:
        return f"it has no {min(missing)!r} ({len(missing)} tensors are missing)"
    if unknown:
        return f"it has an unknown tensor {min(unknown)!r} ({len(unknown)} are unknown)"
    wrong = min((key for key in expected if expected[key] != state[key].shape), default="")
    return wrong and f"{wrong!r} has shape {tuple(state[wrong].shape)} where {tuple(expected[wrong])} belongs"


def check_values(state: StateDict, where: str) -> None:
    """UserError unless all are numbers that a network can compute with."""
    for key, value in state.items():
        problem = ""
        if not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
            kind = f"{value.dtype}".removeprefix("torch.")
            problem = f"is of type {kind} ({value.device.type}, {value.layout}), where floating-point numbers belong"
        elif not value.float().isfinite().all():
            problem = "holds numbers that are not finite in float32"
        if problem:
            raise UserError(
                f"{where} cannot be used: its tensor {key!r} {problem}. Take another checkpoint of this training."
            )
