"""What a recipe is, and what the promises of recipes are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from repa.sampling.config import SampleConfig
from repa.training.config import TrainConfig

EIGHT = "torchrun --nproc-per-node 8 -m repa"  # GPUs of one machine


@dataclass(frozen=True)
class Recipe:
    """A complete training configuration, made when the recipe is called, and what it promises."""

    make: Callable[[], TrainConfig]
    about: str
    """One line for `repa list recipes`."""
    promise: str
    """What it reproduces, with which commands, on what, and what is to be expected."""
    samplings: tuple[SampleConfig, ...] = ()
    """The ways in which the figures were sampled that it is compared with."""
    group: str = "Small runs"
    """Under which heading `repa list recipes` shows it."""
    pixels: int = 0
    """Side of the images that it trains on as they are; 0 for a recipe of latents, or one that names its autoencoder."""

    def __call__(self) -> TrainConfig:
        return self.make()

    @classmethod
    def of(cls, make: Callable[[], TrainConfig], *, pixels: int) -> "Recipe":
        """From a function whose docstring says everything."""
        about = " ".join((make.__doc__ or "").split())
        return cls(make, about, about, pixels=pixels)


def paragraphs(*parts: Sequence[str]) -> str:
    """Lines, with an empty one between the parts."""
    return "\n\n".join("\n".join(part) for part in parts)


def commands(name: str, data: str, prepare: str, sample: str) -> list[str]:
    """Images -> figures, on one machine with eight GPUs; `prepare` and `sample` are the options of these two."""
    samples = f"samples/{name}.npz"
    return [
        f"repa prepare ILSVRC2012/train {data} {prepare}",
        f"{EIGHT} train {name} --data {data} --out runs/{name}",
        f"{EIGHT} sample runs/{name} --num-images 50000 {sample} --out {samples}",
        f"repa evaluate {samples} --reference {data} --neighbours float16",
    ]
