"""A network's named predictions for guidances: each is computed once, and those of one network share a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.diffusion import Layout
from repa.diffusion.chain import HEAD
from repa.diffusion.guidance import CONDITIONAL, NULL
from repa.models import DDT, Backbone, Condition, Output, State, Tap
from repa.models.ddt import Encoded


class Guide(NamedTuple):
    """The loss of representation guidance, computed from the network's taps."""

    taps: tuple[Tap, ...]
    loss: Callable[[Output, Tensor, Condition], Tensor]  # (output, times (N,), condition) -> loss (N,)
    sha256: str  # of the guiding image


class Sharing:
    """Evaluations of a sampler that run the encoder of a DDT; the others reuse its last output (arXiv 2504.05741).

    Evaluations are counted from 0. None: all, and `self_conditions` stores the encoder's outputs for the conditional samples.
    """

    def __init__(self, evaluations: frozenset[int] | None = None):
        self.evaluations = evaluations
        self.self_conditions: list[Tensor] = []
        self.calls = 0
        self._kept: Encoded | None = None

    @property
    def chosen(self) -> list[int]:
        """The evaluations, for the record of samples."""
        return sorted(self.evaluations or ())

    def fresh(self) -> "Sharing":
        """A new instance for another sampling; an instance that only collects `self_conditions` returns itself."""
        return Sharing(self.evaluations) if self.evaluations is not None else self

    def __call__(self, model: DDT, state: State, t: Tensor, condition: Condition, num: int) -> Output:
        """Run the network; the first `num` samples are the conditional ones. A changed batch discards the stored output."""
        call, kept = self.calls, self._kept
        self.calls += 1
        if self.evaluations is None or call in self.evaluations or kept is None or len(kept.self_condition) != len(t):
            self._kept = kept = model.encode(state, t, condition)
        if self.evaluations is None:
            self.self_conditions.append(kept.self_condition[:num])
        return model.decode(state, kept)


@dataclass(frozen=True)
class Predictions:
    """(x_t, t, names) -> the named predictions; see `repa.diffusion.guided`.

    Args:
        network_time: t (N,) -> the network's time input.
        condition: condition of the N samples.
        layout: layout of x_t.
        weak: predictions of the weaker network, for autoguidance.
        guide: loss of representation guidance.
        null: null condition of the N samples; None: the network's own.
        sharing: evaluations that run the encoder of a DDT; None: all.
        most: largest batch of a forward pass; None: unlimited. If the conditional and unconditional samples together exceed it,
            each has its own pass. A DDT with shared encoder output always has one pass, because it stores that output.
    """

    model: Backbone
    network_time: Callable[[Tensor], Tensor]
    condition: Condition
    layout: Layout
    weak: "Predictions | None" = None
    guide: Guide | None = None
    null: Condition | None = None
    sharing: Sharing | None = None
    most: int | None = None

    def __call__(self, x_t: Tensor, t: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
        if len(self.condition.labels) != len(x_t):
            raise UserError(f"Got {len(x_t)} samples but {len(self.condition.labels)} labels: give one per sample.")
        found: dict[str, Tensor] = {}
        passes = {pass_of(name) for name in names}
        branches = [name for name in (CONDITIONAL, NULL) if name in passes]
        fits = self.most is None or self.sharing is not None or len(branches) * len(x_t) <= self.most
        for together in [branches] if branches and fits else [[branch] for branch in branches]:
            for branch, output in zip(together, self._run(x_t, t, together), strict=True):
                found |= {name: self._named(name, output) for name in names if pass_of(name) == branch}
        if "weak" in passes:
            if self.weak is None:
                raise UserError("The guidance autoguidance needs a weaker network: give its run folder as --weak RUN.")
            found["weak"] = self.weak(x_t, t, frozenset((CONDITIONAL,)))[CONDITIONAL]
        if "routed" in passes:
            found["routed"] = self._packed(self._routed(x_t, t))
        if "gradient" in passes:
            found["gradient"] = self._gradient(x_t, t)
        if unknown := names - found.keys():
            raise UserError(
                f"A guidance needs the unknown prediction {min(unknown)!r}: use conditional, null, head@BLOCK, weak, routed or "
                "gradient."
            )
        return found

    def _run(self, x_t: Tensor, t: Tensor, branches: list[str]) -> list[Output]:
        """The network's output for each branch, from one forward pass."""
        conditions = [self.condition if branch == CONDITIONAL else self._null() for branch in branches]
        num = len(branches)
        # One doubled batch instead of two passes: on a GPU a small batch takes as long as one of twice its size.
        state = self.layout.unpack(torch.cat([x_t] * num) if num > 1 else x_t)
        times = self.network_time(torch.cat([t] * num) if num > 1 else t)
        condition = conditions[0] if num == 1 else conditions[0].cat(conditions[1])
        if self.sharing is None:
            output = self.model(state, times, condition)
        else:
            assert isinstance(self.model, DDT)  # see `with_shared_encoder`
            output = self.sharing(self.model, state, times, condition, len(x_t))
        rows = [slice(i * len(x_t), (i + 1) * len(x_t)) for i in range(num)]
        return [
            Output(
                {k: v[part] for k, v in output.prediction.items()}, {}, {k: v[part] for k, v in output.heads.items()}
            )
            for part in rows
        ]

    def _routed(self, x_t: Tensor, t: Tensor) -> Output:
        """The unconditional prediction with no tokens in the routed blocks."""
        if not self.model.route:
            raise UserError(
                "The guidance path_drop needs a network that was trained with token routing, but this one was not: choose another "
                "guidance."
            )
        nobody = torch.empty(len(x_t), 0, dtype=torch.long, device=x_t.device)
        return self.model(self.layout.unpack(x_t), self.network_time(t), self._null(), keep=nobody)

    def _gradient(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of the guide's loss by x_t, in a conditional forward and backward pass."""
        if self.guide is None:
            raise UserError("The guidance representation needs an image: give its file as --guide-image FILE.")
        # Autograd can store only tensors that were made outside inference mode, so x_t is copied.
        with torch.inference_mode(False), torch.enable_grad():
            x_t, t = x_t.clone().requires_grad_(), t.clone()
            condition = self.condition.map(torch.clone)
            state, times = self.layout.unpack(x_t), self.network_time(t)
            output = self.model(state, times, condition, self.guide.taps)
            (gradient,) = torch.autograd.grad(self.guide.loss(output, t, condition).sum(), x_t)
        return gradient

    def _null(self) -> Condition:
        return self.null or self.model.null(self.condition)

    def _named(self, name: str, output: Output) -> Tensor:
        """The final prediction; for a head, its prediction of the latents with the final one of the streams, which have no heads."""
        _, is_head, depth = name.partition(HEAD)
        if not is_head:
            return self._packed(output)
        if int(depth) not in output.heads:
            has = f"has heads at {', '.join(map(str, output.heads))}" if output.heads else "has no heads"
            raise UserError(
                f"The guidance internal needs a head at block {depth}, but this network {has}: choose another with head=BLOCK, "
                "or train with --model.heads."
            )
        return self._packed(output._replace(prediction={**output.prediction, "x": output.heads[int(depth)]}))

    def _packed(self, output: Output) -> Tensor:
        prediction = output.prediction
        if len(self.layout.shapes) == 1:
            return prediction["x"]  # with the learned variance, if the network predicts one
        channels = self.layout.shapes["x"][0]
        return self.layout.pack({**prediction, "x": prediction["x"][:, :channels]})


def pass_of(name: str) -> str:
    """The branch of a prediction: "null/head@8" -> "null"."""
    branch, has_branch, _ = name.partition("/")
    if has_branch:
        return branch
    return CONDITIONAL if name.startswith(HEAD) else name
