"""Several guidances in order. The network evaluates each prediction that they need once, and nothing else.

The first guidance reads the network's predictions; each later one reads the previous result as "conditional". A guidance
that reads a single pass (the conditional prediction and its heads) is applied to the null pass too, if a later one needs
it: internal guidance of each branch, then classifier-free guidance between them, as in the code of arXiv 2512.24176.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from repa.base.device import at_least_float32
from repa.diffusion.denoiser import Layout, per_sample
from repa.diffusion.guidance import CONDITIONAL, NULL, Guidance

HEAD = "head@"  # of the conditional pass; those of the null pass are "null/head@..."
Evaluate = Callable[[Tensor, Tensor, frozenset[str]], dict[str, Tensor]]


class Chain:
    """A sequence of guidances, as a single guidance."""

    def __init__(self, guidances: Sequence[Guidance]):
        self.guidances = tuple(guidances)

    def needs(self, t: float) -> frozenset[str]:
        return self._wanted(t)[0]

    def mix(self, predictions: dict[str, Tensor], t: float) -> Tensor:
        for guidance, names in zip(self.guidances, self._wanted(t)[1:], strict=True):
            predictions = {name: _made(guidance, name, predictions, t) for name in names}
        return predictions[CONDITIONAL]

    def _wanted(self, t: float) -> list[frozenset[str]]:
        """The predictions needed from the network, then those read by each guidance in turn."""
        wanted = [frozenset((CONDITIONAL,))]
        # Backwards: what the last guidance reads determines what the earlier ones must produce.
        for guidance in reversed(self.guidances):
            wanted.append(frozenset().union(*(_sources(guidance, name, t).values() for name in wanted[-1])))
        return wanted[::-1]


def guided(
    evaluate: Evaluate, guidances: Sequence[Guidance], layout: Layout | None = None
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """(x_t, t) -> output, for `Denoiser.predict`: the guidances closed over.

    Args:
        evaluate: (x_t (N, ...), t (N,), names) -> the named predictions, each (N, ...); a second half of the channels (a
            learned variance) is allowed and stays the conditional one.
        guidances: in the order of application; without any, the result is the conditional prediction.
        layout: layout of x_t, whose parts are guided separately; None: x_t is the latents alone.

    Returns:
        A function for `Denoiser.predict`. With a Python float t, as samplers pass, choosing the evaluations needs no device
        synchronisation. With a tensor, each sample is guided by its own time, which synchronises with the device.
    """
    chain = Chain(guidances)

    def output(x_t: Tensor, t: float | Tensor) -> Tensor:
        moments = sorted(set(t.flatten().tolist())) if isinstance(t, Tensor) else [t]
        names = frozenset().union(*(chain.needs(moment) for moment in moments))
        predictions = evaluate(x_t, per_sample(t, x_t), names)
        if names == {CONDITIONAL}:
            return predictions[CONDITIONAL]
        # the difference of two close outputs, times a scale, needs more than half precision
        predictions = {name: at_least_float32(p) for name, p in predictions.items()}
        if len(moments) == 1:
            return _mixed(chain, layout, predictions, x_t.shape[1], moments[0])
        # Guidance may be on for some samples and off for others: each group of equal times is mixed separately.
        made = torch.empty_like(predictions[CONDITIONAL])
        of_sample = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        for moment in moments:
            rows = of_sample == moment  # (N,)
            made[rows] = _mixed(chain, layout, {n: p[rows] for n, p in predictions.items()}, x_t.shape[1], moment)
        return made

    output.takes_float_time = True  # type: ignore[attr-defined]  # functions may have attributes
    return output


def _mixed(chain: Chain, layout: Layout | None, predictions: dict[str, Tensor], channels: int, t: float) -> Tensor:
    """The chain on each part of the first `channels` of axis 1; a learned variance after them stays conditional."""
    variance = predictions[CONDITIONAL][:, channels:]
    guided_ones = {name: p[:, :channels] for name, p in predictions.items()}
    if layout is None or len(layout.shapes) == 1:
        mixed = chain.mix(guided_ones, t)
    else:
        # Separate parts: REG guides the class vector with another scale than the latents.
        parts = {name: layout.unpack(p) for name, p in guided_ones.items()}
        mixed = layout.pack({part: chain.mix({name: parts[name][part] for name in parts}, t) for part in layout.shapes})
    return torch.cat([mixed, variance], dim=1)


def _sources(guidance: Guidance, made: str, t: float) -> dict[str, str]:
    """For the prediction `made` by a guidance: name that the guidance reads -> name of the prediction before it."""
    needs = guidance.needs(t)
    if made == CONDITIONAL:
        return {name: name for name in needs}
    # Internal guidance reads a single pass, so it also applies to the null pass; guidance between passes does not.
    one_pass = all(name == CONDITIONAL or name.startswith(HEAD) for name in needs)
    if made == NULL and one_pass:
        return {name: NULL if name == CONDITIONAL else f"{NULL}/{name}" for name in needs}
    return {CONDITIONAL: made}


def _made(guidance: Guidance, made: str, before: dict[str, Tensor], t: float) -> Tensor:
    sources = _sources(guidance, made, t)
    if sources.keys() != set(guidance.needs(t)):  # the guidance does not change this prediction
        return before[made]
    return guidance.mix({name: before[source] for name, source in sources.items()}, t)
