"""The alignment terms of the loss. Each compares a projected tap with a target (Eqs. 8, 9)."""

from typing import TYPE_CHECKING

from repa.base.imports import exports
from repa.base.registry import Registry

# f(student (N, T, F), target (N, T, F) or None, **settings) -> (N,), whose mean is the loss; lower is better
LOSSES = Registry(
    "loss",
    {
        name: f"repa.alignment.losses:{name}"
        for name in ("attention_ce", "cosine", "crepa", "dispersive", "gram", "mse", "nt_xent", "smooth_l1")
    },
    listing="losses",
    takes=("student", "target"),
)
# f(model, tap, **settings) -> Target; every other name is an encoder, e.g. "dinov2-b" or "dinov2-b:part=attention,layer=9"
TARGETS = Registry(
    "target",
    {
        "block": "repa.alignment.targets:block",
        "ema": "repa.alignment.targets:ema",
        "features": "repa.alignment.targets:features",
        "latent": "repa.alignment.targets:latent",
        "run": "repa.alignment.targets:run",
        "text": "repa.alignment.targets:text",
        "none": "repa.alignment.targets:none",
    },
    listing="targets",
    takes=("model", "tap"),
)
# f(hidden_dim, feature_dim, grid, **settings) -> nn.Module, (N, T, D) -> (N, T, F); see `sees_condition` for further inputs
PROJECTORS = Registry(
    "projector",
    {
        "adapter": "repa.alignment.projectors:adapter",
        "mlp": "repa.alignment.projectors:mlp",
        "linear": "repa.alignment.projectors:linear",
        "conv": "repa.alignment.projectors:conv",
        "mlp2": "repa.alignment.projectors:mlp2",
        "none": "repa.alignment.projectors:none",
    },
    listing="projectors",
    takes=("hidden_dim", "feature_dim", "grid"),
)
# f(tokens (N, T, F), **settings) -> (N, T, F)
TOKEN_NORMS = Registry(
    "token normalisation",
    {
        "none": "repa.alignment.losses:identity",
        "zscore": "repa.alignment.losses:zscore",
        "layernorm": "repa.alignment.losses:layernorm",
    },
    listing="token-norms",
    takes=("tokens",),
)
# f(step, **settings) -> multiplier of the weight at that step
SCHEDULES = Registry(
    "weight schedule",
    {
        "constant": "repa.alignment.schedules:constant",
        "warmup": "repa.alignment.schedules:warmup",
        "stop": "repa.alignment.schedules:stop",
        "linear": "repa.alignment.schedules:linear",
        "cosine": "repa.alignment.schedules:cosine",
        "exponential": "repa.alignment.schedules:exponential",
        "plateau": "repa.alignment.schedules:Plateau",
    },
    base="callable",
    listing="schedules",
    takes=("step",),
)
# f(t (N,), **settings) -> (N,) multiplier of an image's loss; t = 0 is data
TIME_WEIGHTS = Registry(
    "weight over times",
    {
        "constant": "repa.alignment.schedules:constant_in_time",
        "cosine": "repa.alignment.schedules:cosine_in_time",
        "linear": "repa.alignment.schedules:linear_in_time",
        "loglinear": "repa.alignment.schedules:loglinear",
        "sigmoid": "repa.alignment.schedules:sigmoid",
    },
    listing="time-weights",
    takes=("t",),
)

if TYPE_CHECKING:
    from repa.alignment.aligner import Aligner as Aligner
    from repa.alignment.aligner import attach as attach
    from repa.alignment.alignment import Alignment as Alignment
    from repa.alignment.alignment import ProjectorContext as ProjectorContext
    from repa.alignment.config import AlignmentConfig as AlignmentConfig
    from repa.alignment.losses import resize_tokens as resize_tokens
    from repa.alignment.targets import Seen as Seen
else:
    __getattr__, __dir__, __all__ = exports(
        __name__, local=("LOSSES", "PROJECTORS", "SCHEDULES", "TARGETS", "TIME_WEIGHTS", "TOKEN_NORMS")
    )
