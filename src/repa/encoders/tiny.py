"""The two networks inside the package: `tiny`, an alignment target, and `tiny-judge`, which measures samples."""

from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repa.base.errors import UserError
from repa.encoders.contract import Features, VisionEncoder, resize
from repa.encoders.convnet import SHAPES, ConvNet


class TinyEncoder(VisionEncoder):
    """A ConvNet of this package; pooled is the mean token. docs/tiny-encoder.md says how it was trained."""

    def prepare(self, pixels: Tensor, side: int) -> Tensor:
        # A reduced image aliases without antialiasing; enlarging needs none.
        shrinking = side < pixels.shape[-1]
        return resize(pixels, side, antialias=shrinking).mul(2).sub(1).contiguous(memory_format=torch.channels_last)

    def extract(self, pixels: Tensor, grid: int) -> Features:
        tokens = self.net(pixels)  # (N, G*G, D)
        return Features(tokens, tokens.mean(1))


def load_tiny(name: str, weights: Path | None) -> TinyEncoder:
    """The network `name`, with the weights inside the package or another file of tools/train_tiny.py.

    Raises:
        UserError: the file is missing, damaged or another network's.
    """
    path = weights or Path(str(resources.files("repa.encoders"))) / "weights" / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(
            f"The encoder {name} wants a .safetensors file written by tools/train_tiny.py, but {path} is none."
        )
    net = ConvNet(SHAPES[name])
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold the weights of the encoder {name}, or is damaged: {reason}") from error
    return TinyEncoder(
        net.to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # torch's stubs do not know it
        name=name,
        dim=SHAPES[name].dim,
        patch_size=SHAPES[name].patch_size,
        preprocessing="pixels / 255; bicubic to grid * patch_size, antialias when shrinking; 2 x - 1",
        weights_file=path,
    )
