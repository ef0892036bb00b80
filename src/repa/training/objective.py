"""Eq. 9: the denoising loss plus weighted alignments. The one module that is wrapped and optimised.

N images of this process, T tokens, A alignments. State and draws are keyed as in models/contract.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repa.alignment import SCHEDULES, Alignment
from repa.alignment.targets import Need, Seen, merged_needs
from repa.base import dist
from repa.base.device import at_least_float32
from repa.base.errors import UserError
from repa.base.rng import generator
from repa.diffusion import build_process
from repa.diffusion.config import DiffusionConfig
from repa.diffusion.flow import Flow
from repa.encoders.contract import Features
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times, TwoTimes
from repa.models.routing import draw_route
from repa.training.config import StreamConfig


class Losses(NamedTuple):
    """Per-sample losses: `total` (N,) with gradient, `terms` name -> (N,) without."""

    total: Tensor
    terms: dict[str, Tensor]


class Draws(NamedTuple):
    """The random numbers of one step for this process's samples."""

    t: Times  # (N,), or two an image
    noise: State
    dropped: Tensor  # (N,) bool: images with the null condition
    t_averaged: Times | None = None  # times of the averaged network's input; None: no term reads it
    keep: Tensor | None = None  # (N, K) ids of the tokens that are not routed around the middle blocks
    visible: State | None = None  # term -> (N, T) bool: tokens that its projector sees, where it masks some
    # velocities of the images before these in the global batch, for contrastive flow matching
    other: State | None = None
    path_dropped: Tensor | None = None  # (N,) bool: images that skip the routed blocks; None: no image


class Objective(nn.Module):
    """Network and projectors.

    Every draw is made for the global batch from (seed, step) and each process takes its part, so the numbers do not
    depend on how many processes share the work.

    Args:
        streams: vectors that are noised with the latents.
        head_weight: of the denoising loss of each of the network's heads.
        denoising_schedule: multiplier of all denoising losses over training.
    """

    def __init__(
        self,
        model: Backbone,
        alignments: Sequence[Alignment],
        diffusion: DiffusionConfig,
        *,
        label_dropout: float,
        seed: int,
        streams: Sequence[StreamConfig] = (),
        head_weight: float = 0.5,
        denoising_schedule: str = "constant",
    ):
        super().__init__()
        self.model = model
        self.denoising_schedule = SCHEDULES.build(denoising_schedule)
        # Such a schedule stops a term permanently, and a run without a denoising loss does not train.
        if hasattr(self.denoising_schedule, "watches"):
            raise UserError(f"The denoising schedule {denoising_schedule!r} needs an alignment term: choose warmup.")
        terms = {a.key: a for a in alignments}
        for term in alignments:
            if term.config.projector_of:
                term.share_projector_of(terms[term.config.projector_of])
        self.alignments = nn.ModuleDict({a.config.module: a for a in alignments})
        self.watching_schedules = {a.key: a.schedule for a in alignments if hasattr(a.schedule, "watches")}
        self.process = build_process(diffusion)
        self.token_times = diffusion.token_times
        self.streams, self.head_weight = tuple(streams), head_weight
        self.label_dropout, self.seed = label_dropout, seed
        self.taps: tuple[Tap, ...] = tuple(sorted({tap for a in alignments for tap in a.taps}))
        self.averaged_taps: tuple[Tap, ...] = tuple(sorted({tap for a in alignments for tap in a.target.averaged}))
        looking = [a.config for a in alignments if a.sees_condition]
        if looking and diffusion.token_times:
            raise UserError(
                f"The projector {looking[0].projector!r} of the alignment {looking[0].key!r} needs one time per image, but "
                "--diffusion.token-times gives two: leave it out, or choose the projector mlp."
            )
        self.averaging = [a.target for a in alignments if a.target.averaged]  # with equal settings: see TrainConfig

    def terms(self) -> list[Alignment]:
        """The alignments, in order."""
        return [term for term in self.alignments.values() if isinstance(term, Alignment)]

    def clean(self, x: Tensor, features: Mapping[str, Features]) -> State:
        """The clean state: the latents x (N, C, H, W), and for each stream the encoder's image vector (N, F)."""
        state = {"x": x}
        for stream in self.streams:
            vector = features[stream.source].pooled
            if vector is None:
                raise UserError(
                    f"The stream {stream.name} needs an image vector, but the encoder {stream.source} has none: choose "
                    "another source."
                )
            state[stream.name] = at_least_float32(vector)
        return state

    def draw(self, clean: State, step: int) -> Draws:
        """The draws of this process's N samples out of the global batch of `step`."""
        x = clean["x"]
        own = slice(dist.rank() * len(x), (dist.rank() + 1) * len(x))
        num = dist.world() * len(x)
        # One generator, so the order of sampling is part of the meaning of a seed: new random numbers come last.
        stream = generator(self.seed, "objective", step, device=x.device)
        drawn = self.process.draw_times(num, stream, x.device)
        noise = {"x": torch.randn((num, *x.shape[1:]), generator=stream, device=x.device)}
        dropped = torch.rand(num, generator=stream, device=x.device) < self.label_dropout
        for name in (s.name for s in self.streams):
            noise[name] = torch.randn((num, *clean[name].shape[1:]), generator=stream, device=x.device)
        t = self._two_times(drawn, stream)
        averaged, visible = self._times_of_average(t, stream), self._draw_visible(num, step, x.device)
        keep, path = None, None
        if self.model.route:
            # From a separate stream, so that runs with and without a route have the same times and noise.
            route = generator(self.seed, "route", step, device=x.device)
            keep, path = draw_route(self.model.route, num, self.model.grid, route)
        draws = select_samples(Draws(t, noise, dropped, averaged, keep, visible, path_dropped=path), own)
        if not self.process.contrastive:
            return draws
        return draws._replace(
            other={name: self._previous_velocities(part, noise[name], t, own) for name, part in clean.items()}
        )

    def _draw_visible(self, num: int, step: int, device: torch.device) -> State:
        """Tokens that masking projectors see, each term from its own stream."""
        visible = {}
        for term in self.terms():
            if term.masked is not None:
                stream = generator(self.seed, "visible", term.key, step, device=device)
                scores = torch.rand((num, self.model.grid[0] * self.model.grid[1]), generator=stream, device=device)
                visible[term.key] = scores >= term.masked
        return visible

    def _previous_velocities(self, part: Tensor, noise: Tensor, t: Times, own: slice) -> Tensor:
        """Velocity of the previous image for each image (N, ...); the first one's is on the previous process, in a ring."""
        before = torch.cat([dist.gather(part[-1:])[dist.rank() - 1][None], part[:-1]])
        times = self._times_of(t, part).roll(1, 0)[own]
        assert isinstance(self.process, Flow)  # because it is contrastive
        return self.process.velocity(before, noise.roll(1, 0)[own], times)

    def _two_times(self, t: Tensor, stream: torch.Generator) -> Times:
        """Two times per image (arXiv 2607.02508): a random share `token_times` of its tokens has the first, the rest the second.

        Without token_times, the times (N,) unchanged.
        """
        if not self.token_times:
            return t
        rows, columns = self.model.grid
        second = self.process.draw_times(len(t), stream, t.device)
        # Ranks of random numbers: exactly the same share of every image, in one call.
        scores = torch.rand((len(t), rows * columns), generator=stream, device=t.device)
        first = scores.argsort(1).argsort(1) < round(self.token_times * rows * columns)  # (N, T)
        return TwoTimes(torch.stack([t, second], 1), ~first)

    def _times_of_average(self, t: Times, stream: torch.Generator) -> Times | None:
        """The averaged network's times: earlier by u * `earlier`, u ~ U(0, 1) for each time of an image, or its cleanest time."""
        if not self.averaging:
            return None
        target = self.averaging[0]
        if target.cleanest:
            return t.values.amin(1) if isinstance(t, TwoTimes) else t  # (N,)
        values = t.values if isinstance(t, TwoTimes) else t[:, None]
        u = torch.rand((len(values), 2), generator=stream, device=values.device)[:, : values.shape[1]]
        values = (values - target.earlier * u).clamp(0, 1)
        return t._replace(values=values) if isinstance(t, TwoTimes) else values[:, 0]

    def weights(self, step: int, device: torch.device) -> Tensor:
        """(1 + A,): weight of the denoising losses, and lambda of Eq. 9 of each alignment; set on the device without synchronisation."""
        # A tensor, not floats: otherwise torch.compile would recompile the objective for every new weight of a schedule.
        weights = [self.denoising_schedule(step), *(a.weight(step) for a in self.terms())]
        return torch.stack([torch.full((), weight, device=device) for weight in weights])

    @torch.no_grad()
    def averaged(self, network: Backbone, clean: State, condition: Condition, draws: Draws) -> Output:
        """Outputs of the averaged or frozen network for the same images and noise, computed outside of DDP and torch.compile."""
        assert draws.t_averaged is not None  # a term reads it
        state, time = self._noised(clean, draws.noise, draws.t_averaged), self._network_time(draws.t_averaged)
        target, taps = self.averaging[0], self.averaged_taps
        # The average has the same dropped labels as the network; another run's network receives all labels.
        if not target.run:
            return network(state, time, self._condition(condition, draws), taps)
        output = network(state, time, condition, taps)
        if target.scale != 1:
            null = network(state, time, network.null(condition), taps).taps
            output = output._replace(
                taps={
                    tap: torch.lerp(at_least_float32(null[tap]), at_least_float32(seen), target.scale)
                    for tap, seen in output.taps.items()
                }
            )
        return output

    def forward(
        self,
        clean: State,
        condition: Condition,
        features: Mapping[str, Features],
        draws: Draws,
        weights: Tensor,
        averaged: Output | None = None,
    ) -> Losses:
        """Per-sample losses: a pure function of its arguments, without a generator or a step (for torch.compile).

        Args:
            clean: latents and vectors of N images, from `clean`.
            condition: of these images.
            features: features of the clean images by encoder name; an alignment without features is left out.
            draws: of these N samples, from `draw`.
            weights: (1 + A,), from `weights`.
            averaged: from `averaged`.
        """
        state = self._noised(clean, draws.noise, draws.t)  # Eq. 1
        time = self._network_time(draws.t)
        given, condition = condition, self._condition(condition, draws)
        # Passed only if there is one: networks without a route, including private ones, do not accept it.
        path = {} if draws.path_dropped is None else {"path_dropped": draws.path_dropped}
        output = self.model(state, time, condition, self.taps, draws.keep, **path)

        denoising = self._denoising(output.prediction["x"], clean, draws)  # Eq. 4, or Eq. 10 for DDPM
        total = torch.stack(list(denoising.values())).sum(0)  # (N,)
        terms = {name: loss.detach() for name, loss in denoising.items()}
        for name, weight, loss in self._head_and_stream_losses(output, clean, draws):
            total = total + weight * loss
            terms[name] = loss.detach()
        of_denoising, *lambdas = weights.unbind()
        total = of_denoising * total
        seen = Seen(output, features, averaged, clean, draws.t, condition, given, draws.visible or {})
        for alignment, scale in zip(self.terms(), lambdas, strict=True):
            # Its weight is 0 at this step, so its encoder did not run.
            if not alignment.target.ready(seen):
                total = total + alignment.zero_loss()
                continue
            loss = alignment(seen)  # (N,), Eq. 8
            total = total + scale * loss  # Eq. 9
            terms[f"alignment/{alignment.key}"] = loss.detach()
        return Losses(total, terms)

    def observe(self, step: int, losses: Losses) -> None:
        """Pass schedules the losses that they observe after `step` steps; synchronises only on those steps."""
        for key, schedule in self.watching_schedules.items():
            loss = losses.terms.get(f"alignment/{key}")
            if schedule.watches(step) and loss is not None:
                schedule.observe(step, float(dist.mean_over(loss.mean())))

    def schedule_states(self) -> dict[str, dict[str, float]]:
        """State of these schedules, by the key of the term."""
        return {key: schedule.state() for key, schedule in self.watching_schedules.items()}

    def load_schedule_states(self, states: Mapping[str, Mapping[str, float]]) -> None:
        """Restore the state from a checkpoint."""
        for key, schedule in self.watching_schedules.items():
            schedule.load(states[key])

    def averages(self, step: int) -> bool:
        """Whether a term of this step reads the averaged network."""
        return any(a.target.averaged and a.weight(step) != 0 for a in self.terms())

    def needs(self, step: int) -> tuple[Need, ...]:
        """Encoder features that this step needs: for streams, and for terms with a nonzero weight."""
        terms = [a.target.need for a in self.terms() if a.target.need and a.weight(step) != 0]
        return merged_needs([*terms, *(Need(s.source, pooled=True) for s in self.streams)])

    def clipping_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients are clipped together.

        A projector that only measures is a separate group: its gradient must not change the scale of the network's.
        """
        alignments = self.terms()
        measuring = [p for a in alignments if a.config.measure_only for p in a.parameters()]
        rest = [p for a in alignments if not a.config.measure_only for p in a.parameters()]
        network = [p for p in self.model.parameters() if p.requires_grad]
        return [group for group in (network + rest, measuring) if group]

    def _condition(self, condition: Condition, draws: Draws) -> Condition:
        return self.model.null(condition).where(draws.dropped, condition)

    def _network_time(self, t: Times) -> Times:
        if isinstance(t, TwoTimes):
            return t._replace(values=self.process.network_time(t.values))
        return self.process.network_time(t)

    def _noised(self, clean: State, noise: State, t: Times) -> State:
        return {name: self.process.noised(part, noise[name], self._times_of(t, part)) for name, part in clean.items()}

    def _denoising(self, prediction: Tensor, clean: State, draws: Draws) -> dict[str, Tensor]:
        x = clean["x"]
        other = None if draws.other is None else draws.other["x"]
        return self.process.losses(prediction, x, draws.noise["x"], self._times_of(draws.t, x), other)

    def _head_and_stream_losses(self, output: Output, clean: State, draws: Draws) -> list[tuple[str, float, Tensor]]:
        """(name, weight, loss (N,)) of the network's heads (internal guidance) and of the streams (REG)."""
        terms = []
        for depth, prediction in output.heads.items():
            losses = self._denoising(prediction, clean, draws)
            terms.append((f"head/{depth}", self.head_weight, torch.stack(list(losses.values())).sum(0)))
        for stream in self.streams:
            answer, vector, noise = (
                _as_one_pixel(part[stream.name]) for part in (output.prediction, clean, draws.noise)
            )
            other = None if draws.other is None else _as_one_pixel(draws.other[stream.name])
            losses = self.process.losses(answer, vector, noise, self._times_of(draws.t, vector), other)
            loss = losses["denoising"] + losses["contrastive"] if draws.other else losses["denoising"]
            terms.append((f"stream/{stream.name}", stream.weight, loss))
        return terms

    def _times_of(self, t: Times, part: Tensor) -> Tensor:
        """Times for a process: (N,) unchanged; times of tokens repeated over their pixels, (N, 1, H, W)."""
        if not isinstance(t, TwoTimes):
            return t
        rows, columns = self.model.grid
        grid = t.of_tokens().unflatten(1, (1, rows, columns))
        return grid.repeat_interleave(part.shape[2] // rows, 2).repeat_interleave(part.shape[3] // columns, 3)


def _as_one_pixel(vector: Tensor) -> Tensor:
    """A vector (N, F) as an image of one pixel, for the process."""
    return vector[:, :, None, None]


def select_samples(values: Any, part: slice) -> Any:
    """Some of the samples of every tensor in a dictionary or a NamedTuple, which may hold further ones; None stays None."""
    if values is None or isinstance(values, Tensor):
        return None if values is None else values[part]
    if isinstance(values, dict):
        return {name: select_samples(value, part) for name, value in values.items()}
    return type(values)._make(select_samples(value, part) for value in values)
