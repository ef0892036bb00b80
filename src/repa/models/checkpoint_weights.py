"""Selection of weights in a training checkpoint: the average, wherever a training script stores it, and the raw weights."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repa.base.errors import UserError

StateDict = dict[str, Tensor]
ANCHOR = "x_embedder.proj.weight"  # only networks of these kinds have it
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")
AVERAGE = {"ema", "shadow", "average", "averaged", "avg", "swa", "polyak"}  # words in the names of averages
RAW = {"online", "raw", "live"}  # words in the names of raw weights, as in ema.online_model
OPTIMIZER = {"opt", "optim", "optimizer", "exp"}  # exp_avg
COUNTER = "n_averaged"  # stored with the weights of torch's AveragedModel
DEEPEST = 6  # largest depth of nested dictionaries in the search for weights


class Weights(NamedTuple):
    """One set of weights of a network in a checkpoint."""

    name: str  # its place in the checkpoint, without wrappers: "ema", "state_dict.model"; empty: the file itself
    tensors: Mapping[str, Tensor]
    averaged: bool


def choose_weights(content: Any, where: str, kind: str, wanted: str = "") -> tuple[Weights, Weights | None, str]:
    """The average of a checkpoint, else its only weights; the raw weights if there is an average; and a sentence about both."""
    sets = list(_weights_in(content))
    if not sets:
        if not (isinstance(content, Mapping) and any(_holds_tensors(value) for value in [content, *content.values()])):
            raise UserError(f"{where} contains no state dict, that is, no named tensors: give a checkpoint file.")
        raise UserError(f"{where} is not a checkpoint of kind {kind!r}: it has no {ANCHOR!r}.")
    others = [w for w in sets if not w.averaged]
    raw = others[0] if len(others) == 1 else next((w for w in others if w.name == "model"), None)
    candidates = [w for w in sets if (w.name == wanted if wanted else w.averaged)]
    if wanted and not candidates:
        names = ", ".join(repr(w.name) for w in sets)
        raise UserError(f"{where} has no weights {wanted!r}: give one of {names} as --weights.")
    if len(candidates) == 1:
        (chosen,) = candidates
        beside = raw if raw is not None and raw.name != chosen.name else None
        also = f", and the raw weights {beside.name or 'of the file'!r}" if beside else ""
        return chosen, beside, f"{chosen.name or 'the average of the file'!r} is used{also}"
    if candidates or len(others) != 1 or raw is None:
        names = ", ".join(repr(w.name) for w in candidates or others)
        raise UserError(f"{where} contains several networks, {names}: give one of them as --weights.")
    return raw, None, _why_raw(content, where, raw)


def _why_raw(content: Any, where: str, raw: Weights) -> str:
    """Why the raw weights are used. A file may name an average but lack it (ema: None), or hold only a part of one."""
    averages = [key for key in content if isinstance(key, str) and _words(key) & AVERAGE]
    named = next((key for key in averages if not _is_number(content[key])), None)
    if named is None:
        return "the only ones in the file"
    if _holds_tensors(content[named]):
        raise UserError(
            f"{where} holds an average {named!r} that is no whole network: it has no {ANCHOR!r}. Give --weights "
            f"{raw.name or 'NAME'} for the raw weights."
        )
    return f"{named!r} has no named tensors, so the raw weights are used"


def _weights_in(content: Any, above: tuple[str, ...] = (), ancestors: tuple[int, ...] = ()) -> Iterator[Weights]:
    """All sets of weights, found by the anchor, in nested dictionaries or by prefixes of names."""
    # An untrusted file can contain itself or be nested without end.
    if not isinstance(content, Mapping) or id(content) in ancestors or len(above) > DEEPEST:
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors: StateDict = {}
    for key, value in named.items():
        if isinstance(value, Tensor):
            first = tensors.setdefault(plain := WRAPPERS.sub("", key), value)
            if first is not value and not torch.equal(first, value):
                raise UserError(
                    f"The checkpoint holds {plain!r} twice with different values, once as {key!r}: save it once."
                )
    counted = tensors.pop(COUNTER, None) is not None
    prefixes = {key.removesuffix(ANCHOR) for key in tensors if f".{key}".endswith(f".{ANCHOR}")}
    networks: list[tuple[str, Weights]] = []
    # Longest first: "model." is also a prefix of "model.ema.", so the tensors of the latter must be removed before.
    for prefix in sorted(prefixes, key=len, reverse=True):
        own = {key: tensors.pop(key) for key in [*tensors] if key.startswith(prefix)}
        name = ".".join(filter(None, [*above, prefix.removesuffix(".")]))
        words = _words(name)
        if not words & OPTIMIZER:
            averaged = counted or bool(words & AVERAGE and not words & RAW)
            networks.append(
                (prefix, Weights(name, {key.removeprefix(prefix): value for key, value in own.items()}, averaged))
            )
    for prefix, weights in networks:
        yield weights
        if not weights.averaged:
            yield from _without_dots(tensors, prefix, weights.tensors, above)
    for key, value in named.items():
        inner = WRAPPERS.sub("", key)
        yield from _weights_in(value, (*above, inner), (*ancestors, id(content)))


def _without_dots(rest: StateDict, prefix: str, raw: Mapping[str, Tensor], above: tuple[str, ...]) -> Iterator[Weights]:
    """The average of latent-diffusion's LitEma: buffers model_ema.NAME, where NAME has no dots; none for frozen tensors."""
    heads = {key.partition(".")[0] for key in rest}
    for head in sorted(head for head in heads if _words(head) & AVERAGE):
        averages = {key.removeprefix(f"{head}."): value for key, value in rest.items() if key.startswith(f"{head}.")}
        # It averages the network or a module that contains it; in that case names have a longer prefix.
        for cut in range(prefix.count(".") + 1):
            inner = prefix.split(".", cut)[-1]
            names = {(inner + key).replace(".", ""): key for key in raw}
            if (inner + ANCHOR).replace(".", "") in averages:
                average = {key: averages[name] for name, key in names.items() if name in averages}
                yield Weights(".".join([*above, head]), {**raw, **average}, averaged=True)
                break


def _words(name: str) -> set[str]:
    """Words of a name: modelEma, model_ema.0 -> model, ema."""
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())


def _is_number(value: Any) -> bool:
    """Whether the value is a setting such as ema_decay instead of an average."""
    return isinstance(value, bool | int | float | str)
