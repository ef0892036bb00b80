"""DINOv2 (arXiv 2304.07193) with and without registers (arXiv 2309.16588), over transformers, as REPA uses it.

N batch, G grid side, M native grid side, D width.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repa.base import files
from repa.base.errors import UserError
from repa.encoders.contract import Features, VisionEncoder, resize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Family(NamedTuple):
    """What differs between the two: the transformers class, its config's model_type, and the name on the hub."""

    model: str
    model_type: str
    hub: str


PLAIN = Family("Dinov2Model", "dinov2", "facebook/dinov2-{size}")
REGISTERS = Family("Dinov2WithRegistersModel", "dinov2_with_registers", "facebook/dinov2-with-registers-{size}")
SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}


class Dinov2Encoder(VisionEncoder):
    """Patch tokens and the class token (pooled) after the final norm; any grid."""

    def __init__(self, net: nn.Module, name: str, weights_file: Path):
        super().__init__(
            net,
            name=name,
            dim=net.config.hidden_size,
            patch_size=net.config.patch_size,
            preprocessing="pixels / 255; ImageNet mean and std; bicubic to grid * patch_size, no antialias; "
            "positions resampled bicubic with antialias",
            weights_file=weights_file,
        )
        self.prefix = 1 + getattr(net.config, "num_register_tokens", 0)  # plain models have no such setting
        self.register_buffer("native_positions", net.embeddings.position_embeddings.detach().clone(), persistent=False)

    def prepare(self, pixels: Tensor, side: int) -> Tensor:
        channels = zip(pixels.unbind(1), MEAN, STD, strict=True)  # no buffers, which .to(bfloat16) would round
        normalised = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        return resize(normalised, side, antialias=False)  # the reference's order, and no antialias

    def extract(self, pixels: Tensor, grid: int) -> Features:
        self.place(grid)
        tokens = self.net(pixels).last_hidden_state  # (N, 1 + registers + G*G, D), after the final norm
        return Features(tokens[:, self.prefix :], tokens[:, 0])

    def place(self, grid: int) -> None:
        """Give the network a position table of this grid, as the reference does once at loading.

        transformers would resample in each forward, and without antialias; it leaves a table of the right size alone.
        """
        embeddings = self.net.embeddings
        if embeddings.position_embeddings.shape[1] != 1 + grid * grid:
            table = resample_positions(self.native_positions, grid)
            embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)


def resample_positions(table: Tensor, grid: int) -> Tensor:
    """Position table (1, 1 + M*M, D) -> (1, 1 + G*G, D): bicubic, antialias, by size; the class token's row stays."""
    native = round((table.shape[1] - 1) ** 0.5)
    if native == grid:
        return table
    image = table[:, 1:].float().unflatten(1, (native, native)).permute(0, 3, 1, 2)  # (1, D, M, M)
    image = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def load_dinov2(name: str, weights: Path | None) -> Dinov2Encoder:
    """`name` is dinov2-SIZE or dinov2-reg-SIZE; `weights` a folder like the hub's, or None for the hub or its cache.

    Raises:
        UserError: a file is missing, damaged or of another model, or the hub cannot be reached and holds no cached copy.
    """
    family = REGISTERS if "-reg-" in name else PLAIN
    folder = weights or download(name, family.hub.format(size=SIZES[name[-1]]))
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(
                f"weights={folder} for the encoder {name} must be a folder with {CONFIG} and {WEIGHTS}: no {file}."
            )
    found = files.read_json(folder / CONFIG).get("model_type")
    if found != family.model_type:
        raise UserError(
            f"{folder} holds a model of type {found!r}, but the encoder {name} is of type {family.model_type!r}."
        )
    return Dinov2Encoder(read(family, name, folder), name, folder / WEIGHTS)


def read(family: Family, name: str, folder: Path) -> nn.Module:
    """The network in `folder`, float32, every tensor of it from the file; raises UserError where one is missing."""
    import transformers
    from safetensors import SafetensorError

    try:
        net, report = getattr(transformers, family.model).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{folder / WEIGHTS} is damaged or does not fit its {CONFIG}: {str(error).splitlines()[0]}"
        ) from error
    if report["missing_keys"]:  # transformers would leave these at random values
        raise UserError(
            f"{folder / WEIGHTS} lacks weights of the encoder {name}, for example {min(report['missing_keys'])}."
        )
    return net


def download(name: str, hub: str) -> Path:
    """The folder of the hub's cache that holds the two files, fetched when they are not there yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def both(cached: bool) -> Path:
        return [Path(hf_hub_download(hub, file, local_files_only=cached)) for file in (CONFIG, WEIGHTS)][-1].parent

    try:
        return both(cached=True)  # asks nobody, so that a machine without a network does not wait for a time-out
    except LocalEntryNotFoundError:
        pass
    try:
        return both(cached=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"The weights of the encoder {name} ({hub}) are not on this machine and the hub cannot be reached: "
            f"run once with a network, or give weights=FOLDER with {CONFIG} and {WEIGHTS}."
        ) from error
