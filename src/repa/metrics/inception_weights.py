"""Where the weights of Inception-v3 lie, and the network that they make."""

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
ALSO = "pt_inception-2015-12-05-6726825d.pth"  # the same bytes as pytorch-fid names them
SHA256 = "6726825d"  # the first digits of the file's checksum, as its name says


class LoadedInception(NamedTuple):
    """The network, and whose weights it has."""

    net: InceptionV3
    weights_sha256: str

    @property
    def is_published(self) -> bool:
        """Whether these are the weights with which papers measure."""
        return self.weights_sha256.startswith(SHA256)


def load_inception(weights: str | Path | None = None, device: torch.device | str = "cpu") -> LoadedInception:
    """Inception-v3 with the weights of a local file; else of the caches of this package, torch-fidelity and pytorch-fid;
    else downloaded into the first of them, by the main process.

    Raises:
        UserError: no such file, no network, a damaged file, another network's weights.
    """
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"There is no file {weights} with Inception's weights: give the path of {FILE}.")
    path = Path(weights) if weights is not None else _cached_or_downloaded()
    # Part of every figure's record: only by the published weights can it be compared with a paper's.
    checksum = files.sha256(path)
    if weights is None and not checksum.startswith(SHA256):
        raise UserError(f"{path} is damaged: its checksum does not begin with {SHA256}. Remove it and run again.")
    net = InceptionV3()
    try:
        net.load_state_dict(read_weights(path, f"Give {FILE}."))
    # Other tensors than the network's; no dictionary of tensors.
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not hold the weights of Inception-v3 ({reason}): give {FILE}.") from error
    # 1.4 times as fast as (N, C, H, W) on a CPU (docs/evaluation.md); on CUDA what half precision convolves without transposing
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return LoadedInception(net, checksum)


def _cached_or_downloaded() -> Path:
    """The first file that is there; the main process fetches it when none is."""
    # One process downloads, and all hear what went wrong: others that waited for the file alone would wait for ever.
    problem = _download() if dist.is_main() and _cached_file() is None else ""
    problem = dist.from_main(problem)
    if (path := _cached_file()) is not None:
        return path
    raise UserError(
        f"The weights of Inception-v3 are not on this machine and could not be fetched from {URL} "
        f"({problem or 'they were fetched to another machine'}): give --features-weights FILE (of `repa train`: "
        f"--feature-weights inception=FILE), put the file at {_cache_paths()[0]}, or measure in the features of an encoder inside "
        "this package with --features tiny-classifier (--preview.features tiny-classifier)."
    )


def _cache_paths() -> list[Path]:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [files.cache_folder() / "metrics" / FILE, hub / FILE, hub / ALSO]


def _cached_file() -> Path | None:
    return next((place for place in _cache_paths() if place.is_file()), None)


def _download() -> str:
    """Fetch the file and compare its checksum; returns what went wrong, or nothing."""
    try:
        with files.atomic_path(_cache_paths()[0]) as temporary:
            torch.hub.download_url_to_file(URL, str(temporary), hash_prefix=SHA256, progress=False)
    except (OSError, RuntimeError, HTTPException) as error:  # no network; other bytes than expected; cut off
        return str(error)
    return ""
