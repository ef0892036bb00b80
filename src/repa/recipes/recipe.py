"""What a recipe is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from repa.sampling.config import SampleConfig
from repa.training.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """A complete training configuration, made when the recipe is called, and what it promises."""

    make: Callable[[], TrainConfig]
    about: str
    """One line for `repa list recipes`."""
    promise: str
    """What it reproduces, with which commands, on what, and what is to be expected."""
    samplings: Mapping[str, SampleConfig] = field(default_factory=dict)
    """By name: the ways in which the figures were sampled that it is compared with."""
    group: str = "Small runs"
    """Under which heading `repa list recipes` shows it."""

    def __call__(self) -> TrainConfig:
        return self.make()

    @classmethod
    def of(cls, make: Callable[[], TrainConfig]) -> "Recipe":
        """From a function whose docstring says everything."""
        about = " ".join((make.__doc__ or "").split())
        return cls(make, about, about)
