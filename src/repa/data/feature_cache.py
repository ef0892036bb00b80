"""Features by key for your own loader: those of `repa prepare`, or a folder that is filled during training.

FOLDER/
  cache.json                    which encoder, shape and type of one entry
  RANDOM.safetensors            the entries of one batch; its header holds their keys and checksums
  .lock                         one process at a time adds
"""

import hashlib
import json
import uuid
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from repa.base import faults, files, lock
from repa.base.device import DTYPES
from repa.base.errors import UserError, require_type
from repa.data.dataset import DataSet, open_data
from repa.data.manifest import MANIFEST
from repa.data.packing import unpack
from repa.encoders.contract import VisionEncoder

STORED = ("F16", "BF16", "F32")  # as safetensors calls them
CACHE_FILE = "cache.json"
GIB = 1 << 30


class FeatureCache:
    """Features of images by key: `cache[keys]`, float32 (N, M, F). Made by `open`.

        cache = FeatureCache.open("features", encoder)
        features = cache.fill(paths, lambda missing: encoder(images[missing], grid=16).patches)

    Entries are never removed. At `limit` nothing more is stored: data is read in epochs, so removing the oldest entry
    would remove the one that is needed next. Processes share a folder, and each finds the entries of the others.
    """

    def __init__(self, folder: Path, identity: Any, dtype: str, limit: float):
        self.folder, self.identity, self.dtype, self.limit = folder, identity, dtype, limit
        self.shape: tuple[int, ...] | None = None
        self._places: dict[str, list[tuple[str, int, str]]] = {}  # key -> (file, row, checksum)
        self._sizes: dict[str, int] = {}
        self._warned = False

    @staticmethod
    def open(
        folder: str | Path,
        encoder: VisionEncoder | str | None = None,
        *,
        dtype: str = "fp16",
        limit: float = 64 * GIB,
    ) -> "FeatureCache | PreparedFeatures":
        """Open a folder of features; creates it if it does not exist.

        Args:
            folder: a folder of `repa prepare`, whose keys are the indices of images, 0, 1, ...; or a cache.
            encoder: for a prepared folder with several encoders, the name of one; for a cache, the encoder or any text that
                identifies it; a cache of another encoder is refused.
            dtype: stored type, fp16, bf16 or fp32.
            limit: largest size on disk in bytes.

        Raises:
            UserError: the folder has features of another encoder, or other contents.
        """
        folder = Path(folder)
        if (folder / MANIFEST).is_file():
            return PreparedFeatures(open_data(folder), encoder.name if isinstance(encoder, VisionEncoder) else encoder)
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}.")
        identity = encoder.identity if isinstance(encoder, VisionEncoder) else encoder
        identity = json.loads(json.dumps(identity))  # through JSON: a tuple becomes a list
        cache = FeatureCache(folder, identity, dtype, limit)
        # files that begin with a dot (a lock, incomplete files) belong to a running or killed process
        foreign = not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
        if folder.exists() and foreign and not (folder / CACHE_FILE).is_file():
            raise UserError(f"{folder} is neither prepared data nor a cache of features: choose an empty folder.")
        cache._refresh()
        return cache

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Hashable) -> bool:
        return str(key) in self._places

    def __repr__(self) -> str:
        used = files.size(sum(self._sizes.values()))
        return f"FeatureCache({str(self.folder)!r}): {len(self)} entries of {self.shape}, {used} of {files.size(self.limit)}"

    def __getitem__(self, keys: str | int | Sequence[Hashable]) -> Tensor:
        """(N, M, F) of N keys, or (M, F) of one.

        Raises:
            UserError: a key is missing, or its entry is damaged.
        """
        if isinstance(keys, (str, int)):
            return self[[keys]][0]
        entries = self.find(keys)
        missing = [key for key, entry in zip(keys, entries, strict=True) if entry is None]
        if missing:
            raise UserError(
                f"{self.folder} lacks features for {len(missing)} of {len(keys)} keys, such as {missing[0]!r}: add them with "
                "fill."
            )
        return torch.stack([entry for entry in entries if entry is not None])

    def find(self, keys: Sequence[Hashable]) -> list[Tensor | None]:
        """Each entry, float32 (M, F), or None if it is missing or damaged."""
        # the folder is read again only for an unknown key, which another process may have added
        if any(str(key) not in self._places for key in keys):
            self._refresh()
        return [self._read(str(key)) for key in keys]

    def fill(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """(N, M, F): stored entries; the others come from `compute` and are stored while there is space.

        Args:
            compute: positions in `keys` that are missing -> their features (n, M, F).
        """
        entries = self.find(keys)
        missing = [position for position, entry in enumerate(entries) if entry is None]
        if missing:
            new = compute(missing)
            require_type(new, Tensor, "compute must return a tensor of features (n, M, F)")
            new = new.detach()
            if len(new) != len(missing):
                raise UserError(
                    f"compute returned features of {len(new)} images instead of {len(missing)}: return one entry per position."
                )
            self.add([keys[position] for position in missing], new)
            # rounded like stored entries, so that the first epoch sees the same numbers as the others
            for position, entry in zip(missing, new.to("cpu", DTYPES[self.dtype]).float(), strict=True):
                entries[position] = entry
        whole = [entry for entry in entries if entry is not None]
        return torch.stack(whole) if whole else torch.empty(0, *(self.shape or ()))

    def add(self, keys: Sequence[Hashable], features: Tensor) -> bool:
        """Store (N, M, F) under N keys, atomically; False if there is no space.

        Raises:
            UserError: a shape that differs from the entries', or values that their type cannot hold.
        """
        names = [str(key) for key in keys]
        stored = features.detach().to("cpu", DTYPES[self.dtype]).contiguous()
        if stored.ndim < 2 or len(names) != len(stored) or not stored.numel():
            raise UserError(
                f"{len(names)} keys do not match features of shape {tuple(stored.shape)}: give (N, M, F) for N keys."
            )
        # after the conversion, as values beyond 65,504 become infinite in float16
        if not stored.isfinite().all():
            raise UserError(
                f"Features are not finite as {self.dtype}: check the encoder, or open the cache with dtype='fp32'."
            )
        files.require_place(self.folder, self.folder)
        with lock.held(self.folder / ".lock"):
            files.remove_leftovers(self.folder)  # from a killed process: the lock is ours
            self._refresh()
            shape = tuple(stored.shape[1:])
            if self.shape is None:
                facts = {"encoder": self.identity, "dtype": self.dtype, "shape": shape}
                files.write_json(self.folder / CACHE_FILE, facts)
                self.shape = shape
            if shape != self.shape:
                raise UserError(
                    f"{self.folder} holds features of shape {self.shape}, but got {shape}: use another folder."
                )
            # one file with a unique name per batch: files that other processes read never change
            header = {"keys": json.dumps(names), "checksums": json.dumps([_checksum(row) for row in stored])}
            content = save({"features": stored}, metadata=header)
            if sum(self._sizes.values()) + len(content) > self.limit:
                self._warn_full()
                return False
            path = self.folder / f"{uuid.uuid4().hex}.safetensors"
            files.write_bytes(path, content)
            self._add_file(path)
        return True

    def _refresh(self) -> None:
        """Read cache.json once, and the headers of new files."""
        path = self.folder / CACHE_FILE
        if self.shape is None and path.is_file():
            facts = files.read_object(path, dtype=str, shape=list)
            if facts.get("encoder") != self.identity and self.identity is not None:
                raise UserError(
                    f"{self.folder} holds features of {facts.get('encoder')}, not of {self.identity}: use another folder."
                )
            sides = facts["shape"]
            if facts["dtype"] not in DTYPES or not sides or not all(type(side) is int and side > 0 for side in sides):
                raise UserError(f"{path} is damaged: delete {self.folder} and fill it again.")
            self.identity, self.dtype, self.shape = facts.get("encoder"), facts["dtype"], tuple(facts["shape"])
        if self.shape is not None:
            for file in sorted(self.folder.glob("[0-9a-f]*.safetensors")):
                if file.name not in self._sizes:
                    self._add_file(file)

    def _add_file(self, path: Path) -> None:
        """Add the keys of a file. A damaged or mismatched file is skipped, and its features are computed again."""
        self._sizes[path.name] = 0
        try:
            faults.require_plain(path)  # opening a named pipe would wait for a writer forever
            self._sizes[path.name] = path.stat().st_size
            with safe_open(path, "pt") as file:
                header, entries = file.metadata() or {}, file.get_slice("features")
                shape, dtype = entries.get_shape(), entries.get_dtype()
                names, checksums = json.loads(header["keys"]), json.loads(header["checksums"])
            whole = len(names) == len(checksums) == shape[0] and tuple(shape[1:]) == self.shape and dtype in STORED
            if not (whole and all(isinstance(text, str) for text in (*names, *checksums))):
                raise ValueError("its header does not match")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            warnings.warn(f"{path} is damaged and skipped ({error}). Its entries will be computed again.", stacklevel=4)
            return
        for row, (name, checksum) in enumerate(zip(names, checksums, strict=True)):
            self._places.setdefault(name, []).append((path.name, row, checksum))

    def _read(self, name: str) -> Tensor | None:
        places = self._places.get(name, [])
        for place in list(places):
            file_name, row, checksum = place
            try:
                with safe_open(self.folder / file_name, "pt") as file:
                    entry = file.get_slice("features")[row]
            except (SafetensorError, OSError):
                entry = None
            # a damaged disk, or a file that has changed since its header was read: the entry is computed again
            if entry is not None and _checksum(entry) == checksum and entry.isfinite().all():
                return entry.float()
            places.remove(place)
        self._places.pop(name, None)
        return None

    def _warn_full(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.folder} is full ({files.size(self.limit)}), so features of further images are not stored. Raise limit.",
                stacklevel=4,
            )


class PreparedFeatures:
    """Stored tokens of prepared data by the indices of images, 0, 1, ..., in the order of the source."""

    def __init__(self, data: DataSet, encoder: str | None):
        names = list(data.features)
        if encoder is None and len(names) == 1:
            (encoder,) = names
        if encoder not in names:
            raise UserError(f"{data.folder} has no features of {encoder!r}: choose from {', '.join(names) or 'none'}.")
        self.data, self.encoder, self._basis = data, encoder, data.basis(encoder, "cpu")
        facts = data.features[encoder]
        self.shape = (facts.grid**2, facts.dim)

    def __len__(self) -> int:
        return self.data.num_images

    def __contains__(self, key: Hashable) -> bool:
        return type(key) is int and 0 <= key < len(self)

    def __repr__(self) -> str:
        return f"PreparedFeatures({str(self.data.folder)!r}): {self.encoder}, {len(self)} entries of {self.shape}"

    def __getitem__(self, keys: int | Sequence[int] | np.ndarray) -> Tensor:
        """(N, M, F) of N indices, or (M, F) of one; raises UserError for an invalid index."""
        if isinstance(keys, (int, np.integer)):
            return self[[int(keys)]][0]
        rows = np.asarray(keys)
        if (
            rows.ndim != 1
            or rows.dtype.kind not in "iu"
            or (len(rows) and not 0 <= rows.min() <= rows.max() < len(self))
        ):
            raise UserError(
                f"The keys of prepared features are image indices from 0 to {len(self) - 1}, but got {keys!r:.80}."
            )
        stored = torch.from_numpy(self.data.gather(f"features.{self.encoder}", rows))
        scale = None
        if self.data.features[self.encoder].form.endswith("int8"):
            scale = torch.from_numpy(self.data.gather(f"scale.{self.encoder}", rows))
        return unpack(stored, scale, self._basis)


def _checksum(entry: Tensor) -> str:
    return hashlib.blake2b(entry.contiguous().view(torch.uint8).numpy().data, digest_size=16).hexdigest()
