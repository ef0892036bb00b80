"""Eq. 8 as a module (project a tap, match token grids, compare), and the weight of Eq. 9."""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
import torch.nn as nn
from torch import Tensor

from repa.alignment import LOSSES, PROJECTORS, SCHEDULES, TIME_WEIGHTS, TOKEN_NORMS
from repa.alignment.config import AlignmentConfig
from repa.alignment.losses import compares, grid_like, resize_tokens
from repa.alignment.targets import Seen, Target, build_target
from repa.base.device import at_least_float32, no_autocast
from repa.base.errors import UserError
from repa.base.registry import declared, parse_spec
from repa.models.contract import Backbone, Condition, Tap, Times, TwoTimes
from repa.models.layers import TokenConvolution


class ProjectorContext(NamedTuple):
    """Further inputs of a projector that depends on time and condition."""

    t: Times
    """(N,) times of the noise."""
    condition: Condition
    visible: Tensor | None = None
    """(N, T) bool, False for masked tokens; None: no token is masked."""


class Alignment(nn.Module):
    """One term of the loss: a tap of the network against a target.

    In your own loop, call `compare`. The training loop calls `forward` with everything that a step computed.

    Args:
        config: configuration of the term.
        hidden_dim: width D of the transformer.
        feature_dim: width F of the target's tokens; 0 without a target, or if it equals the width of the tap.
        grid: (rows, columns) of the transformer's tokens; None: a square.
        target: target of `forward`; None if only `compare` is used.
        prefix_tokens: tokens in front of the grid in the tap.
        num_classes: number of the network's classes, for projectors that depend on the condition.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        hidden_dim: int,
        feature_dim: int,
        grid: tuple[int, int] | None = None,
        *,
        target: Target | None = None,
        prefix_tokens: int = 0,
        num_classes: int = 0,
    ):
        super().__init__()
        self.config, self.feature_dim, self.grid = config, feature_dim, grid
        self.key = config.key
        self.target, self.prefix_tokens = target or Target(), prefix_tokens
        self.tap = Tap(config.depth, config.tap)
        projector = PROJECTORS.build(config.projector)
        self.sees_condition = bool(declared(projector, "sees_condition"))
        classes = (num_classes,) if self.sees_condition else ()
        self.loss = LOSSES.build(config.loss)
        # Relations between tokens have no width, so a tap without a projector keeps its own.
        self.compares_relations = bool(declared(self.loss, "compares_relations"))
        width = hidden_dim if self.compares_relations and config.projector == "none" else feature_dim or hidden_dim
        made = projector(hidden_dim, width, grid, *classes)
        self.projector = PROJECTORS.instance(config.projector, made, nn.Module)
        # The term that owns a shared projector. A list hides it from nn.Module: as a submodule, its weights would be counted and
        # saved twice.
        self._sharing: list[Alignment] = []
        self.token_norm = TOKEN_NORMS.build(config.token_norm)
        self.schedule = SCHEDULES.build(config.schedule)
        self.time_weight = TIME_WEIGHTS.build(config.time_weight)

    @classmethod
    def of(cls, config: AlignmentConfig, model: Backbone, dims: Mapping[str, int]) -> Self:
        """The term of a run that trains `model`; `dims`: encoder -> width of its patches."""
        target = build_target(config, model, dims)
        tap = model.checked(Tap(config.depth, config.tap))
        if target.prefix and tap.kind == "hidden" and model.prefix_tokens != 1:
            raise UserError(
                f"The target {config.target!r} has a token for the whole image, and the network has {model.prefix_tokens} "
                "tokens before its grid: use exactly one stream, or part=patches."
            )
        term = cls(
            config, model.hidden_dim, target.dim, model.grid, target=target, prefix_tokens=model.prefix_tokens,
            num_classes=model.num_classes,
        )  # fmt: skip
        if target.prefix and (term.sees_condition or isinstance(term.projector, TokenConvolution)):
            raise UserError(
                f"The projector {config.projector!r} accepts only the tokens of the grid, but the target {config.target!r} has another for "
                "the whole image: use part=patches, or the projector mlp."
            )
        if model.route and model.route.keep < 1 and any(model.route.covers(tap.depth) for tap in term.taps):
            term.refuse_what_needs_all_tokens()
        return term

    def refuse_what_needs_all_tokens(self) -> None:
        """Raises UserError if the term cannot be computed from the tokens of a routed block, which differ between images."""
        comparing = compares("images", self.loss)
        needs = {
            "the tap attention": self.tap.kind == "attention",
            f"the projector {self.config.projector}": self.sees_condition
            or parse_spec(self.config.projector)[0] == "conv",
            "resample target": self.config.resample == "target",
            f"the loss {self.config.loss}, which compares places of several images,": comparing,
        }
        if asked := [what for what, needed in needs.items() if needed]:
            raise UserError(
                f"The alignment {self.key!r} taps a block that sees only a share of the tokens, but {asked[0]} needs all tokens: "
                "choose blocks before or after the route, or other settings of the alignment."
            )

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The tap of the network that this term reads."""
        return (self.tap, *self.target.own)

    @property
    def _projector(self) -> nn.Module:
        return self._sharing[0].projector if self._sharing else self.projector

    @property
    def masked(self) -> float | None:
        """Share of the tap's tokens that are masked for its projector in training; None: no masking."""
        return getattr(self._projector, "masked", None) if self.sees_condition else None

    def forward(self, seen: Seen) -> Tensor:
        """Eq. 8, per image, (N,): lower is better. Gradients reach the tap and the projector, never the target."""
        student, target = seen.output.taps[self.tap], self.target(seen)
        if self.tap.kind == "hidden" and not self.target.prefix:
            student = student[:, self.prefix_tokens :]
        # Only the projector learns: the network's weights stay bit-identical to those of a run without the term.
        if self.config.measure_only:
            student = student.detach()
        context = ProjectorContext(seen.t, seen.condition, seen.visible.get(self.key)) if self.sees_condition else None
        loss = self.compare(*self._match_routed(student, target, seen.output.kept), context)
        return self.at_times(loss, seen.t)

    def at_times(self, loss: Tensor, t: Times | None) -> Tensor:
        """The losses (N,), weighted by the images' times t. A term whose weight does not depend on time needs no t."""
        low, high = self.config.times
        if (low, high, self.config.time_weight) == (0.0, 1.0, "constant"):
            return loss
        if t is None:
            raise UserError(
                f"The weight of the term {self.key!r} depends on the time: pass t (N,), as in aligner(features, t=t)."
            )
        # An image has one loss, so the mean of its tokens' times counts.
        t = t.of_tokens().mean(1) if isinstance(t, TwoTimes) else t
        weights = TIME_WEIGHTS.returned(self.config.time_weight, self.time_weight(t), t.shape, "weights")
        return torch.where((t >= low) & (t <= high), weights * loss, 0.0)

    def compare(
        self,
        student: Tensor,
        target: Tensor | None,
        kept: Tensor | None = None,
        context: ProjectorContext | None = None,
        grid: tuple[int, int] | None = None,
        frames: int = 1,
    ) -> Tensor:
        """Eq. 8, per image: student (N, T, D), target (N, M, F) -> (N,); attention logits are (N, h, T, T).

        If M differs from T, the target is resampled to the student's grid, or the student to the target's (`config.resample`).
        `kept` (N, K): ids of the grid's tokens that the student has, if the network routes tokens. `context`: for a projector
        that depends on the condition. `grid`: (rows, columns) of this student's tokens; None: the grid of the constructor.
        `frames`: number of consecutive images that form a video, a single sequence for the loss, which is then (N / frames,).

        Raises:
            UserError: the width of the target does not match the projector, the grids differ and one has no shape, or a private
                loss does not return (N,).
        """
        if self.tap.kind == "attention":
            with no_autocast(student.device):
                return self._losses(
                    at_least_float32(student), None if target is None else at_least_float32(target.detach())
                )
        if student.ndim != 3 or (target is not None and len(target) != len(student)):
            given = f"{tuple(student.shape)}" + ("" if target is None else f" and {tuple(target.shape)}")
            raise UserError(
                f"An alignment compares tokens (N, T, D) with tokens of the same N images, but got {given}: convert a map (N, D, H, W) "
                "with x.flatten(2).transpose(1, 2)."
            )
        grid = grid or self.grid
        if self.config.pool:  # one vector per image
            grid, kept = (1, 1), None
        projected = self.project(student, context, grid)  # (N, T, F)
        # In half precision the norms of a cosine under- or overflow, and the logits of a softmax become equal.
        with no_autocast(student.device):
            projected = at_least_float32(projected)
            if target is None:
                return self._losses(projected, None)
            self._check_width(projected, target)
            # Detached also if the target is a block of this network: the target must not move towards the student.
            projected, matched = self._match(projected, at_least_float32(target.detach()), kept, grid)
            # After resampling, because averaging tokens shrinks the deviation that a norm divides by. Over all tokens of the image,
            # so that the target does not depend on which tokens this step keeps.
            matched = TOKEN_NORMS.returned(self.config.token_norm, self.token_norm(matched), matched.shape, "tokens")
            if kept is not None:
                assert grid is not None  # known for every network that routes tokens
                prefix = matched.shape[1] - grid[0] * grid[1]
                matched = torch.cat([matched[:, :prefix], _select_tokens(matched[:, prefix:], kept)], 1)
            if frames > 1:
                projected, matched = (x.unflatten(0, (-1, frames)).flatten(1, 2) for x in (projected, matched))
            return self._losses(projected, matched)

    def share_projector_of(self, other: "Alignment") -> None:
        """Share another term's projector instead of its own; raises UserError if it does not fit."""
        alike = ("projector", "pool", "measure_only")
        if different := [name for name in alike if getattr(self.config, name) != getattr(other.config, name)]:
            raise UserError(
                f"The alignment {self.key!r} shares the projector of {other.key!r}, but their {different[0]} differs: set "
                "both to the same value."
            )
        if other.feature_dim != self.feature_dim:
            raise UserError(
                f"The alignment {self.key!r} shares the projector of {other.key!r}, but its target has {self.feature_dim} "
                f"channels and the other's {other.feature_dim}: use a separate projector."
            )
        self.projector, self._sharing = nn.Identity(), [other]

    def project(
        self, student: Tensor, context: ProjectorContext | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """The projected tap, as the loss sees it: (N, T, D) -> (N, T, F); `grid` as for `compare`."""
        if self.config.pool:
            student = student.mean(1, keepdim=True)  # (N, 1, D)
        if isinstance(self._projector, TokenConvolution):
            return self._projector(student, grid)
        if not self.sees_condition:
            return self._projector(student)
        if context is None:
            raise UserError(
                f"The projector {self.config.projector!r} needs times and condition: pass compare a ProjectorContext(t, condition)."
            )
        return self._projector(student, *context)

    def weight(self, step: int) -> float:
        """Lambda of Eq. 9 at a training step; at 0 neither the encoder nor the projector needs to run."""
        return self.config.weight * SCHEDULES.returned(self.config.schedule, self.schedule(step), (), "a number")

    def zero_loss(self) -> Tensor:
        """Zero, for a step without this term. Every parameter is in the graph, because DDP waits for the gradient of each."""
        parameters = [p.sum() for p in self.parameters()]
        return 0.0 * torch.stack(parameters).sum() if parameters else torch.zeros(())

    def _match_routed(
        self, student: Tensor, target: Tensor | None, kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Student, target, and the ids of the student's tokens if only the target has all tokens (None: both have the same).

        A tap of a routed block has K tokens; other taps of the pass and other targets have all T.
        """
        if kept is None or self.tap.kind == "attention":
            return student, target, None
        # Tokens before the grid always pass through the route. The number of tokens, K or T, shows whether the tap is routed.
        front = self.prefix_tokens if self.target.prefix else 0
        routed = student.shape[1] == front + kept.shape[1]
        if target is None or not (self.target.own and target.shape[1] == kept.shape[1]):
            return student, target, kept if routed else None
        return (student if routed else _select_tokens(student, kept)), target, None

    def _match(
        self, projected: Tensor, target: Tensor, kept: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Both on one grid, (N, T, F) and (N, T, F), restricted to the tokens that the student has."""
        prefix = 1 if self.target.prefix else 0
        head, target = target[:, :prefix], target[:, prefix:]
        if self.config.resample == "target":
            wanted = target.shape[1]
            tokens = resize_tokens(projected[:, prefix:], wanted, grid and grid_like(wanted, grid), grid)
            return torch.cat([projected[:, :prefix], tokens], 1), torch.cat([head, target], 1)
        num = projected.shape[1] - prefix
        if kept is not None:
            assert grid is not None
            num = grid[0] * grid[1]
        target = resize_tokens(target, num, grid)
        return projected, torch.cat([head, target], 1) if prefix else target

    def _check_width(self, projected: Tensor, target: Tensor) -> None:
        width = self.feature_dim or (0 if self.compares_relations else projected.shape[-1])
        if width and target.shape[-1] != width:
            raise UserError(
                f"The target {self.config.target!r} has {target.shape[-1]} channels, but the projector was built for {width}: pass "
                "features of the encoder that the alignment names; a private Target must set dim."
            )
        if not self.compares_relations:
            PROJECTORS.returned(self.config.projector, projected, (*projected.shape[:-1], width), "tokens")

    def _losses(self, student: Tensor, target: Tensor | None) -> Tensor:
        """(N,), one per image: any other shape would be broadcast against the denoising loss."""
        return LOSSES.returned(self.config.loss, self.loss(student, target), student.shape[:1], "one loss per image,")


def _select_tokens(tokens: Tensor, kept: Tensor) -> Tensor:
    """(N, T, F) -> (N, K, F): the tokens with the ids `kept` (N, K)."""
    return tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
