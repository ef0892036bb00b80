"""Layer 2: representation alignment (Eqs. 8, 9): project a hidden state, compare it with a frozen encoder's patches."""

from repa.base.lazy import exports
from repa.base.registry import Registry

# f(projected (N, T, F), target (N, T, F), **settings) -> (N,) loss, lower is better
SIMILARITIES = Registry(
    "similarity",
    {"cosine": "repa.alignment.similarities:cosine", "nt_xent": "repa.alignment.similarities:nt_xent"},
)
# f(hidden_dim, feature_dim, **settings) -> nn.Module, (N, T, D) -> (N, T, F)
PROJECTORS = Registry(
    "projector",
    {
        "mlp": "repa.alignment.projectors:mlp",
        "linear": "repa.alignment.projectors:linear",
        "conv": "repa.alignment.projectors:conv",
    },
)
# f(tokens (N, T, F), **settings) -> (N, T, F)
TOKEN_NORMS = Registry(
    "token normalisation", {"none": "repa.alignment.targets:identity", "zscore": "repa.alignment.targets:zscore"}
)
# f(step, **settings) -> multiplier of the weight at that step
SCHEDULES = Registry(
    "weight schedule",
    {
        "constant": "repa.alignment.schedules:constant",
        "stop": "repa.alignment.schedules:stop",
        "linear": "repa.alignment.schedules:linear",
        "cosine": "repa.alignment.schedules:cosine",
    },
)

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Alignment": "alignment",
        "AlignmentConfig": "config",
        "resize_tokens": "targets",
    },
    local=("PROJECTORS", "SCHEDULES", "SIMILARITIES", "TOKEN_NORMS"),
)
