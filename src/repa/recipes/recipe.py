"""Recipes, and the texts that `repa show` prints with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from repa.sampling.config import SampleConfig
from repa.training.config import TrainConfig

EIGHT = "torchrun --nproc-per-node 8 -m repa"  # 8 GPUs of one machine


@dataclass(frozen=True)
class Recipe:
    """A complete training configuration, which a call returns, with its description."""

    make: Callable[[], TrainConfig]
    about: str
    """One line for `repa list recipes`."""
    promise: str
    """What it reproduces, the commands, the hardware, and the expected results."""
    samplings: tuple[SampleConfig, ...] = ()
    """Sampling settings of the published results."""
    group: str = "Small runs"
    """Its heading in `repa list recipes`."""
    pixels: int = 0
    """Image side for training on pixels; 0 for a recipe on latents, or one that names its autoencoder."""

    def __call__(self) -> TrainConfig:
        return self.make()

    @classmethod
    def of(cls, make: Callable[[], TrainConfig], *, pixels: int) -> "Recipe":
        """A recipe of a function, described by its docstring."""
        about = " ".join((make.__doc__ or "").split())
        return cls(make, about, about, pixels=pixels)


def paragraphs(*parts: Sequence[str]) -> str:
    """The parts, separated by empty lines."""
    return "\n\n".join("\n".join(part) for part in parts)


def commands(name: str, data: str, prepare: str, sample: str) -> list[str]:
    """Commands from images to results on a machine with eight GPUs; `prepare` and `sample` are options of these commands."""
    samples = f"samples/{name}.npz"
    return [
        f"repa prepare ILSVRC2012/train {data} {prepare}",
        f"{EIGHT} train {name} --data {data} --out runs/{name}",
        f"{EIGHT} sample runs/{name} --num-images 50000 {sample} --out {samples}",
        f"repa evaluate {samples} --reference {data} --neighbours float16",
    ]
