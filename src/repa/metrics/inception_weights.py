"""Location, download and loading of Inception-v3's weights."""

from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch

from repa.base import dist, files
from repa.base.errors import UserError
from repa.base.weights import read_weights
from repa.metrics.inception import InceptionV3

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
ALSO = "pt_inception-2015-12-05-6726825d.pth"  # the same file, as pytorch-fid names it
SHA256 = "6726825d"  # first digits of the file's checksum, as in its name


class LoadedInception(NamedTuple):
    """The network, and the checksum of its weights."""

    net: InceptionV3
    weights_sha256: str

    @property
    def is_published(self) -> bool:
        """Whether these are the weights of published results."""
        return self.weights_sha256.startswith(SHA256)


def load_inception(weights: str | Path | None = None, device: torch.device | str = "cpu") -> LoadedInception:
    """Inception-v3 with the weights of a local file, else from the caches of this package, torch-fidelity and pytorch-fid,
    else downloaded by the main process into the first of these caches.

    Raises:
        UserError: no such file, no network access, a damaged file, or weights of another network.
    """
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"There is no file {weights} with Inception's weights: give the path of {FILE}.")
    path = Path(weights) if weights is not None else _cached_or_downloaded()
    # Recorded with every result: only results with the published weights are comparable with papers.
    checksum = files.sha256(path)
    if weights is None and not checksum.startswith(SHA256):
        raise UserError(
            f"{path} is damaged: its checksum does not begin with {SHA256}. Remove it and run the command again."
        )
    net = InceptionV3()
    try:
        net.load_state_dict(read_weights(path, f"Give {FILE}."))
    # The tensors do not fit, or the file has no dictionary of tensors.
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not contain the weights of Inception-v3 ({reason}): give {FILE}.") from error
    # 1.4 times as fast as (N, C, H, W) on a CPU (docs/evaluation.md); on CUDA half precision needs no transposition
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return LoadedInception(net, checksum)


def _cached_or_downloaded() -> Path:
    """The first cached file; if there is none, the main process downloads it."""
    # One process downloads, and all processes get its error; otherwise the others would wait for the file for ever.
    problem = _download() if dist.is_main() and _cached_file() is None else ""
    problem = dist.from_main(problem)
    if (path := _cached_file()) is not None:
        return path
    raise UserError(
        f"The weights of Inception-v3 are not on this machine and could not be downloaded from {URL} "
        f"({problem or 'they were downloaded to another machine'}): give --features-weights FILE (for `repa train`: "
        f"--feature-weights inception=FILE), put the file at {_cache_paths()[0]}, or use the extractor of this package, "
        "--features tiny-classifier (for `repa train`: --preview.features tiny-classifier)."
    )


def _cache_paths() -> list[Path]:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [files.cache_folder() / "metrics" / FILE, hub / FILE, hub / ALSO]


def _cached_file() -> Path | None:
    return next((place for place in _cache_paths() if place.is_file()), None)


def _download() -> str:
    """Download the file and verify its checksum; returns the error, or an empty string."""
    try:
        with files.atomic_path(_cache_paths()[0]) as temporary:
            torch.hub.download_url_to_file(URL, str(temporary), hash_prefix=SHA256, progress=False)
    except (OSError, RuntimeError, HTTPException) as error:  # no network access; wrong checksum; interrupted
        return str(error)
    return ""
