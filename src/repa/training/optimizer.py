"""AdamW, or Muon for the hidden matrices and AdamW for the rest; learning rates; steps that may be skipped on the device."""

import math

import torch
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.training.config import OptimizerConfig, TrainConfig


def build_optimizer(objective: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of network and projectors.

    Muon takes the matrices that the network names, those of attention and MLP. The adaLN projections, which start at zero
    as gates, the embeddings, the final layer, the projectors and all vectors stay with AdamW.
    """
    settings = config.optimizer
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    if settings.name == "adamw":
        return _adamw([p for _, p in named], settings)
    hidden = {id(p) for p in objective.model.matrices()}
    matrices, others = ([p for _, p in named if (id(p) in hidden) == wanted] for wanted in (True, False))
    if not matrices:
        raise UserError("The optimizer muon has nothing to train: this network names no matrices for it. Choose adamw.")
    return MuonAdamW(matrices, others, settings)


def _adamw(parameters: list[nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,  # also what makes `found_inf` skip a step without a wait
    )


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and AdamW as one optimizer with one state.

    Muon's updates are scaled to the root mean square of AdamW's ("match_rms_adamw"), so that one learning rate serves both.
    Where `found_inf` is 1, a step changes nothing, as in the fused AdamW.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], settings: OptimizerConfig):
        muon = torch.optim.Muon(
            matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.parts = (muon, _adamw(others, settings))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # anew, as load_state_dict puts others in their place
        muon, adamw = self.parts
        skip: Tensor | None = getattr(self, "found_inf", None)
        adamw.found_inf = skip
        adamw.step()
        if skip is None:
            muon.step()
        else:
            self._muon_unless(skip > 0)

    def _muon_unless(self, skip: Tensor) -> None:
        """A step of Muon that is undone on the device where `skip`; a momentum stays what it is when it is its own gradient."""
        muon, matrices = self.parts[0], [p for p in self.param_groups[0]["params"] if p.grad is not None]
        before = [p.detach().clone() for p in matrices]
        for p in matrices:
            momentum = self.state[p].get("momentum_buffer", torch.zeros_like(p.grad))
            p.grad = torch.where(skip, momentum, p.grad)
        muon.step()
        for p, old in zip(matrices, before, strict=True):
            p.copy_(torch.where(skip, old, p))


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer, or none where `skip` (a float on the device) is 1: decided there, nothing waits.

    Gradients are divided by the attribute `grad_scale`, where there is one; it serves one step.
    """
    optimizer.found_inf = skip  # the protocol of torch.amp.GradScaler with fused optimizers
    optimizer.step()
    for name in ("found_inf", "grad_scale"):  # no part of its state
        vars(optimizer).pop(name, None)


def learning_rate(settings: OptimizerConfig, num_steps: int, step: int) -> float:
    """Of the step that follows `step` finished ones: a straight rise over warmup_steps, then the schedule to 0 at num_steps."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)  # in [0, 1)
    left = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.learning_rate * left


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
