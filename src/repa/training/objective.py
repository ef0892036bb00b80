"""Eq. 9: the denoising loss plus weighted alignments. The one module that is wrapped and optimised."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repa.alignment import Alignment
from repa.base import dist
from repa.base.rng import generator
from repa.diffusion import build_process
from repa.diffusion.config import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import DiT


class Losses(NamedTuple):
    """Per-sample losses: `total` (N,) with gradient, `terms` name -> (N,) without."""

    total: Tensor
    terms: dict[str, Tensor]


class Draws(NamedTuple):
    """The random numbers of one step for this process's rows."""

    t: Tensor  # (N,)
    noise: Tensor  # (N, C, H, W)
    dropped: Tensor  # (N,) bool: label replaced by the null label

    def rows(self, part: slice) -> "Draws":
        """Those of some rows: a micro-batch's."""
        return Draws(self.t[part], self.noise[part], self.dropped[part])


class Objective(nn.Module):
    """Network and projectors.

    Every draw is made for the global batch from (seed, step) and each process takes its rows, so the numbers do not
    depend on how many processes share the work.
    """

    def __init__(
        self,
        model: DiT,
        alignments: Sequence[Alignment],
        diffusion: DiffusionConfig,
        *,
        label_dropout: float,
        seed: int,
    ):
        super().__init__()
        self.model = model
        self.alignments = nn.ModuleList(alignments)
        self.process = build_process(diffusion)
        self.label_dropout = label_dropout
        self.seed = seed
        self.taps = tuple(sorted({a.config.depth for a in alignments}))

    def draw(self, x: Tensor, step: int) -> Draws:
        """The draws of this process's rows (N) out of the global batch of `step`."""
        rows = slice(dist.rank() * len(x), (dist.rank() + 1) * len(x))
        num = dist.world() * len(x)
        stream = generator(self.seed, "objective", step, device=x.device)
        t = self.process.draw_times(num, stream, x.device)
        noise = torch.randn((num, *x.shape[1:]), generator=stream, device=x.device)
        dropped = torch.rand(num, generator=stream, device=x.device) < self.label_dropout
        return Draws(t[rows], noise[rows], dropped[rows])

    def weights(self, step: int, device: torch.device) -> Tensor:
        """(A,) lambda of Eq. 9 of each alignment; filled in on the device, which nobody waits for."""
        lambdas = [torch.full((), a.weight(step), device=device) for a in self.alignments]
        return torch.stack(lambdas) if lambdas else torch.empty(0, device=device)

    def forward(
        self, x: Tensor, labels: Tensor, features: Mapping[str, Features], draws: Draws, weights: Tensor
    ) -> Losses:
        """Per-sample losses: a function of its arguments, with neither a generator nor a step in it (for torch.compile).

        Args:
            x: clean latents (N, C, H, W).
            labels: (N,) int64.
            features: target tokens by encoder name; an alignment whose encoder is not among them is left out.
            draws: of these N rows, from `draw`.
            weights: (A,), from `weights`.
        """
        x_t = self.process.noised(x, draws.noise, draws.t)  # Eq. 1
        y = torch.where(draws.dropped, self.model.null_label, labels)
        output = self.model(x_t, self.process.network_time(draws.t), y, self.taps)

        denoising = self.process.losses(output.prediction, x, draws.noise, draws.t)  # Eq. 4, or Eq. 10 for DDPM
        total = torch.stack(list(denoising.values())).sum(0)  # (N,)
        terms = {name: loss.detach() for name, loss in denoising.items()}
        for alignment, weight in zip(self.alignments, weights.unbind(), strict=True):
            if alignment.config.target not in features:  # its weight is 0 at this step, so nobody asked the encoder
                total = total + _untouched(alignment)
                continue
            hidden = output.hidden[alignment.config.depth]
            if alignment.config.measure_only:
                hidden = hidden.detach()
            loss = alignment(hidden, features[alignment.config.target].patches)  # (N,), Eq. 8
            total = total + weight * loss  # Eq. 9
            terms[f"alignment/{alignment.config.name}"] = loss.detach()
        return Losses(total, terms)

    def targets(self, step: int) -> tuple[str, ...]:
        """Encoders whose tokens this step needs: those with a weight that is not 0."""
        return tuple(dict.fromkeys(a.config.target for a in self.alignments if a.weight(step) != 0))

    def trained_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients are clipped together.

        A projector that only measures is its own group: its gradient must not change the scale of the network's.
        """
        measuring = [p for a in self.alignments if a.config.measure_only for p in a.parameters()]
        rest = [p for a in self.alignments if not a.config.measure_only for p in a.parameters()]
        network = [p for p in self.model.parameters() if p.requires_grad]
        return [group for group in (network + rest, measuring) if group]


def _untouched(module: nn.Module) -> Tensor:
    """Zero, with every parameter in the graph: DDP waits for the gradient of each."""
    return 0.0 * torch.stack([p.sum() for p in module.parameters()]).sum()
