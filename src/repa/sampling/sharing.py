"""On which evaluations of a sampler the encoder of a DDT runs (arXiv 2504.05741): those whose output serves the following ones best."""

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

PROBES = 4  # images from whose sampling the evaluations are chosen


def shared_evaluations(errors: np.ndarray, count: int) -> list[int]:
    """The `count` evaluations, 0 among them, of which each serves itself and those up to the next at the smallest sum of errors.

    Args:
        errors: (K, K) what it costs to use at evaluation j what was found at i <= j.

    By dynamic programming: best[c, j], the least cost of the first j evaluations served by c of them.
    """
    num = len(errors)
    # Infinite where j <= i: an evaluation serves at least itself, so those combinations are never the least.
    serves = np.full((num + 1, num + 1), np.inf)  # [i, j]: i serves i ... j - 1
    for i in range(num):
        serves[i, i + 1 :] = np.cumsum(errors[i, i:])
    best, before = serves[0], []
    for _ in range(count - 1):
        costs = best[:, None] + serves  # the last one is i, and those before it end there
        before.append(costs.argmin(0))
        best = costs.min(0)
    # Backwards from the end: the last of the chosen ones first.
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
    """The run with the evaluations on which its encoder runs, chosen by sampling a few images with the encoder always on.

    Args:
        draw: of `sampling/samples.py`.

    Raises:
        UserError: the network is no DDT, or sampler or guidance do not fit.
    """
    if not isinstance(run.model, DDT):
        raise UserError(
            f"encoder_steps shares the encoder of a DDT, but {run.folder or 'this run'} has a {type(run.model).__name__}: leave it out."
        )
    names = {parse_spec(spec)[0] for spec in config.guidance}
    if parse_spec(config.sampler)[0] == "dopri5" or "internal" in names:
        head, steps = "internal guidance, whose head is in the encoder", "dopri5, whose steps are not known in advance"
        raise UserError(
            f"encoder_steps does not go with {head if 'internal' in names else steps}: leave one of them out."
        )
    recording = Sharing()  # which keeps the encoder's tokens of every evaluation
    draw(replace(run, sharing=recording), config, range(PROBES))
    errors = differences(recording.self_conditions)
    if config.encoder_steps > len(errors):
        raise UserError(
            f"encoder_steps is {config.encoder_steps}, but the sampler evaluates the network {len(errors)} times: choose fewer."
        )
    chosen = shared_evaluations(errors, config.encoder_steps)
    chosen = dist.gather_objects(chosen)[0]  # of rank 0, whose arithmetic may differ in the last digits
    return replace(run, sharing=Sharing(frozenset(chosen)))
