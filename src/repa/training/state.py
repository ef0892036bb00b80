"""What a training run is made of, how it is built from a configuration, and what of it goes into a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from repa.alignment import Alignment
from repa.base.rng import fold
from repa.models import DiT, build
from repa.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from repa.training.config import TrainConfig
from repa.training.ema import EMA
from repa.training.objective import Objective
from repa.training.starting import start_from


@dataclass
class TrainState:
    """The network, its average, the projectors and the optimizer, after `step` steps."""

    config: TrainConfig
    objective: Objective
    ema: EMA
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0  # spent in training steps, previews and checkpoints not counted
    metrics: dict[str, float] = field(default_factory=dict)  # of the last logged step

    @property
    def model(self) -> DiT:
        return self.objective.model

    def save(self, run: Path, keep: int) -> Path:
        return save_checkpoint(
            run,
            Checkpoint(
                self.step,
                self.model.state_dict(),
                self.ema.model.state_dict(),
                self.objective.alignments.state_dict(),
                self.optimizer.state_dict(),
                {"seconds": self.seconds},
            ),
            keep,
        )

    def resume(self, run: Path) -> None:
        """Continue from the newest checkpoint, when there is one."""
        checkpoint = load_checkpoint(run)
        if checkpoint is None:
            return
        self.model.load_state_dict(checkpoint.model)
        self.ema.model.load_state_dict(checkpoint.ema)
        self.objective.alignments.load_state_dict(checkpoint.projectors)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.step, self.seconds = checkpoint.step, checkpoint.counters["seconds"]


def build_state(
    config: TrainConfig, feature_dims: dict[str, int], device: torch.device, *, begins: bool = True
) -> TrainState:
    """A state at step 0. `config` is resolved (no field left to the data); feature_dims: target -> width of its tokens.

    `config.init` is read when the run `begins`; later a checkpoint takes its place, and it need not exist any more.

    Network and projectors are initialised from streams of their own: a run with another alignment, or none, starts from
    the same network.
    """
    with seeded(config.seed, "model"):
        model = build(config.model)
    alignments = []
    for alignment in config.alignments:
        with seeded(config.seed, "projector", alignment.name):
            alignments.append(Alignment(alignment, model.hidden_dim, feature_dims[alignment.target]))
    objective = Objective(model, alignments, config.diffusion, label_dropout=config.label_dropout, seed=config.seed).to(
        device
    )
    if config.init and begins:
        start_from(config.init, objective, config.model.dims().num_heads)
    ema = EMA(objective.model, config.ema_decay)
    return TrainState(config, objective, ema, build_optimizer(objective, config, device))


def build_optimizer(objective: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    settings = config.optimizer
    return torch.optim.AdamW(
        [p for p in objective.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


class seeded:
    """Draw module initialisations from the stream (seed, *keys) and leave the global generator as it was."""

    def __init__(self, seed: int, *keys: int | str):
        self.seed = fold(seed, *keys)

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_) -> None:
        torch.set_rng_state(self.before)
