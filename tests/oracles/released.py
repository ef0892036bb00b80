"""Checkpoint files in each project's format with random weights, and sampling in each project's convention."""

import argparse
import math

import torch

from repa.models import DiT
from tests.oracles import ddpm, dit
from tests.oracles.published import legacy_repa, sit_velocity

SIZES = {"latent_size": 16, "latent_channels": 3, "patch_size": 4, "hidden_dim": 32, "depth": 2, "num_heads": 2}
PROJECTOR = {
    "0.weight": (16, 32),
    "0.bias": (16,),
    "2.weight": (16, 16),
    "2.bias": (16,),
    "4.weight": (32, 16),
    "4.bias": (32,),
}


def random_state(seed=0, **arguments):
    """A DiT's state dict without zero parameters; positions keep their fixed values."""
    model = DiT(**{**SIZES, "num_classes": 2, **arguments})
    stream = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream) * 0.15
    return model.state_dict()


def projectors(seed=7, number=1, features=32):
    stream = torch.Generator().manual_seed(seed)
    shapes = {**PROJECTOR, "4.weight": (features, 16), "4.bias": (features,)}
    return {
        f"projectors.{index}.{name}": torch.randn(shape, generator=stream) * 0.1
        for index in range(number)
        for name, shape in shapes.items()
    }


def repa_training(state, **settings):
    """The content saved by REPA's train.py: EMA, raw weights, optimizer, arguments as a Namespace, steps."""
    live = {key: value + 0.01 for key, value in state.items()}
    arguments = argparse.Namespace(**{"model": "SiT-B/2", "path_type": "linear", "prediction": "v", **settings})
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    return {"model": live, "ema": state, "opt": optimizer, "args": arguments, "steps": 30}


def sit_training(state, **settings):
    """The content saved by SiT's train.py; steps are only in the file's name."""
    settings = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", **settings}
    return dit_training(state, **settings)


def dit_training(state, **settings):
    """The content saved by DiT's train.py."""
    live = {key: value + 0.01 for key, value in state.items()}
    arguments = argparse.Namespace(**{"model": "DiT-XL/2", **settings})
    return {"model": live, "ema": state, "opt": {"state": {}, "param_groups": []}, "args": arguments}


def repa_euler(state, noise, labels, num_steps, num_heads=2):
    """REPA's own ODE: from t = 1, noise, to t = 0, data."""
    x = noise.double()
    for i in range(num_steps):
        t = torch.full((len(x),), 1 - i / num_steps)
        x = x - dit.forward(state, x.float(), t, labels, num_heads)[0] / num_steps
    return x


def sit_euler(state, noise, labels, num_steps, num_heads=2):
    """SiT's own ODE: from t = 0, noise, to t = 1, data."""
    x = noise.double()
    for i in range(num_steps):
        x = x + sit_velocity(state, x.float(), torch.full((len(x),), i / num_steps), labels, num_heads) / num_steps
    return x


def dit_ddim(state, noise, labels, num_steps, num_heads=2):
    """DiT's DDIM on timesteps 0, 1000 / n, ...; the network receives integer timesteps."""
    bars, x = ddpm.alpha_bars(ddpm.BETAS), noise.double()
    timesteps = [k * (1000 // num_steps) for k in range(num_steps)]
    for place in reversed(range(num_steps)):
        k = timesteps[place]
        before = bars[timesteps[place - 1]] if place else 1.0
        output = dit.forward(state, x.float(), torch.full((len(x),), float(k)), labels, num_heads)[0]
        eps = output[:, : x.shape[1]]
        data = (x - math.sqrt(1 - bars[k]) * eps) / math.sqrt(bars[k])
        x = math.sqrt(before) * data + math.sqrt(1 - before) * eps
    return x


def legacy(content, depth):
    """The same training dictionary with the block names of REPA's older code."""
    return {**content, "model": legacy_repa(content["model"], depth), "ema": legacy_repa(content["ema"], depth)}
