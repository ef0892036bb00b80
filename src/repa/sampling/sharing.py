"""Choice of the sampler's evaluations at which a DDT's encoder runs; the others reuse its last output (arXiv 2504.05741)."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from repa.base import dist
from repa.base.errors import UserError
from repa.base.registry import parse_spec
from repa.models import DDT
from repa.runs import LoadedRun
from repa.runs.predictions import Sharing
from repa.sampling.config import SampleConfig

PROBES = 4  # images that are sampled for the choice


def shared_evaluations(errors: np.ndarray, count: int) -> list[int]:
    """The `count` evaluations, including 0, that minimise the sum of errors if each output is reused until the next one.

    Args:
        errors: (K, K) error at evaluation j of reusing the output of evaluation i <= j.

    By dynamic programming: best[c, j] is the lowest error of the first j evaluations with c encoder runs.
    """
    num = len(errors)
    # Infinite for j <= i: an output serves at least its own evaluation, so these combinations are never chosen.
    serves = np.full((num + 1, num + 1), np.inf)  # [i, j]: the output of i is used for i ... j - 1
    for i in range(num):
        serves[i, i + 1 :] = np.cumsum(errors[i, i:])
    best, before = serves[0], []
    for _ in range(count - 1):
        costs = best[:, None] + serves  # the last one is i, and those before it end there
        before.append(costs.argmin(0))
        best = costs.min(0)
    # Backtrack from the end.
    chosen, end = [], num
    for places in reversed(before):
        end = int(places[end])
        chosen.append(end)
    return sorted({0, *chosen})


def differences(features: list[Tensor]) -> np.ndarray:
    """(K, K) one minus the cosine of the encoder's tokens (N, T, D) at two evaluations, over all of them."""
    num, tokens, _ = features[0].shape
    cosines = torch.zeros(len(features), len(features), dtype=torch.float64, device=features[0].device)
    # one image at a time, in float64: neighbouring evaluations differ in the last digits of float32
    for n in range(num):
        units = torch.stack([F.normalize(each[n].double(), dim=-1).flatten() for each in features])  # (K, T D)
        cosines = cosines + units @ units.T / (num * tokens)
    return (1 - cosines).cpu().numpy()


def with_shared_encoder(run: LoadedRun, config: SampleConfig, draw: Callable[..., object]) -> LoadedRun:
    """The run with the chosen evaluations of its encoder, from sampling a few images with the encoder at every evaluation.

    Args:
        draw: the function of `sampling/samples.py`.

    Raises:
        UserError: the network is not a DDT, or the sampler or the guidance is not supported.
    """
    if not isinstance(run.model, DDT):
        raise UserError(
            f"encoder_steps shares the encoder of a DDT, but {run.folder or 'this run'} has a {type(run.model).__name__}: leave it out."
        )
    names = {parse_spec(spec)[0] for spec in config.guidance}
    if parse_spec(config.sampler)[0] == "dopri5" or "internal" in names:
        head, steps = "internal guidance, whose head is in the encoder", "dopri5, whose steps are not known in advance"
        raise UserError(
            f"encoder_steps does not work with {head if 'internal' in names else steps}: leave one of them out."
        )
    recording = Sharing()  # records the encoder's tokens of every evaluation
    draw(replace(run, sharing=recording), config, range(PROBES))
    errors = differences(recording.self_conditions)
    if config.encoder_steps > len(errors):
        raise UserError(
            f"encoder_steps is {config.encoder_steps}, but the sampler makes only {len(errors)} evaluations: choose fewer."
        )
    chosen = shared_evaluations(errors, config.encoder_steps)
    chosen = dist.gather_objects(chosen)[0]  # of rank 0, because the last digits may differ between processes
    return replace(run, sharing=Sharing(frozenset(chosen)))
