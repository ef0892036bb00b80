"""Which of the weights in a training checkpoint to take: the average, wherever a training script keeps it, and the raw ones beside it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from repa.base.errors import UserError

StateDict = dict[str, Tensor]
ANCHOR = "x_embedder.proj.weight"  # every network of these kinds has it, and nothing else
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")
AVERAGE = {"ema", "shadow", "average", "averaged", "avg", "swa", "polyak"}  # words in the names of averages
RAW = {"online", "raw", "live"}  # words that say the opposite, as in ema.online_model
OPTIMIZER = {"opt", "optim", "optimizer", "exp"}  # exp_avg
COUNTER = "n_averaged"  # next to the weights of torch's AveragedModel
DEEPEST = 6  # dictionaries within each other, in which weights are looked for


class Weights(NamedTuple):
    """One set of weights of a network in a checkpoint."""

    name: str  # its place there, without wrappers: "ema", "state_dict.model"; empty for the file itself
    tensors: Mapping[str, Tensor]
    averaged: bool


def choose_weights(content: Any, where: str, kind: str, wanted: str = "") -> tuple[Weights, Weights | None, str]:
    """The average of a checkpoint, else its only weights; the raw weights next to an average; and a sentence about both."""
    found = list(_weights_in(content))
    if not found:
        if not (isinstance(content, Mapping) and any(_holds_tensors(value) for value in [content, *content.values()])):
            raise UserError(f"{where} holds no state dict: there are no tensors by name in it.")
        raise UserError(f"{where} is not a checkpoint of kind {kind!r}: it has no {ANCHOR!r}.")
    averages, others = [w for w in found if w.averaged], [w for w in found if not w.averaged]
    raw = others[0] if len(others) == 1 else next((w for w in others if w.name == "model"), None)
    if wanted:
        averages = [w for w in found if w.name == wanted]
        if not averages:
            names = ", ".join(repr(w.name) for w in found)
            raise UserError(f"{where} holds no weights {wanted!r}: give --weights with one of {names}.")
    if len(averages) > 1 or (not averages and raw is None):
        names = ", ".join(repr(w.name) for w in averages or others)
        raise UserError(f"{where} holds several networks, {names}: give --weights with the one to take.")
    if averages:
        beside = raw if raw is not None and raw.name != averages[0].name else None
        also = f", next to the raw weights {beside.name or 'of the file'!r}" if beside else ""
        return averages[0], beside, f"{averages[0].name or 'the average of the file'!r} was taken{also}"
    assert raw is not None  # without averages, it was asked for above
    # A file may name an average and hold none of it (ema: None): without a word the raw weights would pass for it.
    empty = next(
        (key for key in content if isinstance(key, str) and _words(key) & AVERAGE and not _is_number(content[key])),
        None,
    )
    reason = (
        f"{empty!r} holds no tensors by name, so the raw weights were taken" if empty else "one set, taken as it is"
    )
    return raw, None, reason


def _weights_in(content: Any, above: tuple[str, ...] = (), ancestors: tuple[int, ...] = ()) -> Iterator[Weights]:
    """Every set of weights: where the anchor is, in nested dictionaries, or in one with prefixes, as averages are kept."""
    # What anyone may have written can hold itself, or be nested without end.
    if not isinstance(content, Mapping) or id(content) in ancestors or len(above) > DEEPEST:
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {WRAPPERS.sub("", key): value for key, value in named.items() if isinstance(value, Tensor)}
    counted = tensors.pop(COUNTER, None) is not None
    prefixes = {key.removesuffix(ANCHOR) for key in tensors if f".{key}".endswith(f".{ANCHOR}")}
    found: list[tuple[str, Weights]] = []
    # The longest first: "model." also begins the names of "model.ema.", which must have taken its tensors by then.
    for prefix in sorted(prefixes, key=len, reverse=True):
        own = {key: tensors.pop(key) for key in [*tensors] if key.startswith(prefix)}
        name = ".".join(filter(None, [*above, prefix.removesuffix(".")]))
        words = _words(name)
        if not words & OPTIMIZER:
            averaged = counted or bool(words & AVERAGE and not words & RAW)
            found.append(
                (prefix, Weights(name, {key.removeprefix(prefix): value for key, value in own.items()}, averaged))
            )
    for prefix, weights in found:
        yield weights
        if not weights.averaged:
            yield from _without_dots(tensors, prefix, weights.tensors, above)
    for key, value in named.items():
        inner = WRAPPERS.sub("", key)
        yield from _weights_in(value, (*above, inner), (*ancestors, id(content)))


def _without_dots(rest: StateDict, prefix: str, raw: Mapping[str, Tensor], above: tuple[str, ...]) -> Iterator[Weights]:
    """The average of latent-diffusion's LitEma: buffers model_ema.NAME, the dots of NAME left out; frozen tensors have none."""
    heads = {key.partition(".")[0] for key in rest}
    for head in sorted(head for head in heads if _words(head) & AVERAGE):
        found = {key.removeprefix(f"{head}."): value for key, value in rest.items() if key.startswith(f"{head}.")}
        # It averages the network, or a module around it: then names begin further out.
        for cut in range(prefix.count(".") + 1):
            inner = prefix.split(".", cut)[-1]
            names = {(inner + key).replace(".", ""): key for key in raw}
            if (inner + ANCHOR).replace(".", "") in found:
                average = {key: found[name] for name, key in names.items() if name in found}
                yield Weights(".".join([*above, head]), {**raw, **average}, averaged=True)
                break


def _words(name: str) -> set[str]:
    """modelEma, model_ema.0 -> model, ema."""
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())


def _is_number(value: Any) -> bool:
    """A setting such as ema_decay, which is not an average."""
    return isinstance(value, bool | int | float | str)
