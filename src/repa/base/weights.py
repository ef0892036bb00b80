"""Tensors from untrusted files: safetensors, torch.save, TorchScript. No code of a file is ever run.

torch.load with weights_only reads files of torch.save, with no classes but those listed here. A TorchScript archive is a zip
with the same pickled tree and records, and with code, which torch would compile. So the tree is read here, with `Inert` in
place of every class, and the code is ignored.
"""

import argparse
import contextlib
import hashlib
import json
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from repa.base import faults
from repa.base.errors import UserError
from repa.base.files import size, unique_keys

MOST_HEADER = 2**25  # bytes of a safetensors header; a hundred thousand tensors need a tenth of this
DESCRIBED = 16  # least bytes of a tensor's name, type and shape in a file
# safetensors' names of the types that weights may have
PRECISE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_VIEWS = 16  # bytes of a file's tensors for each byte of the file: several tensors may share a storage
CHUNK = 2**20  # bytes that are read at a time for the checksum of a record
NUMBERS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
           "f2": "e", "f4": "f", "f8": "d"}  # fmt: skip  # NumPy types -> codes of struct
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values; it does not depend on the file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: str | Path, remedy: str = "Download or copy it again.") -> Any:
    """The content of a checkpoint file, on the CPU: a dictionary of tensors, or the plain containers of a training script.

    NumPy scalars become Python numbers, paths pure paths, and NumPy arrays objects without numbers. A TorchScript archive
    gives its tensors by name.

    Args:
        path: .safetensors, or a file of torch.save or torch.jit.save.
        remedy: a sentence that says what to do about a file that cannot be read.

    Raises:
        UserError: the file is missing or damaged (the error names the tensor if a checksum shows it), or holds an object of
            another class.
    """
    path = Path(path)
    with faults.reading(path, "a checkpoint of tensors", remedy, missing=f"There is no checkpoint file {path}."):
        if _is_safetensors(path):
            from safetensors.torch import load_file

            _require_plain_header(path)
            return load_file(path)
        if not zipfile.is_zipfile(path):
            return _unpickled(path, mmap=False)
        with zipfile.ZipFile(path) as archive:
            _check_records(archive, path, remedy)
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                scripted = {name: stored.tensor(archive) for name, stored in _tensors_of(archive)}
                _require_held(scripted, path.stat().st_size)
                return scripted
            _require_mappable(archive, path)
        # Mapped, so that unused parts of a training checkpoint, such as its optimizer, are never read into memory.
        return _unpickled(path, mmap=True)


def _is_safetensors(path: Path) -> bool:
    """By its ending, or its start under another ending."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


@contextlib.contextmanager
def no_larger_than(paths: Sequence[Path], config: Path) -> Iterator[None]:
    """Networks built in the block take no memory, and raise an error if they are larger than the files of their weights.

    For a trial before a network is built from an untrusted config.json, which can request any size in a few bytes. Both too
    many layers and too wide layers are found, because each tensor and each number occupies space in a file.

    Args:
        paths: the files of the weights.
        config: the file that describes the networks.

    Raises:
        UserError: a file is damaged or quantised, or the networks have more tensors or numbers than the files can hold.
    """
    for path in paths:
        _require_sound(path)
    num_bytes = sum(path.stat().st_size for path in paths)
    left = 2 * num_bytes  # a shared tensor is registered once per place

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 0 if parameter is None else parameter.numel() + DESCRIBED
        if left < 0:
            raise UserError(
                f"{config} describes a larger network than its weights can be of ({size(num_bytes)}): download or copy both again."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    finally:
        hook.remove()


def _unpickled(path: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        _require_held(content, path.stat().st_size)
        return content
    except (pickle.UnpicklingError, RuntimeError) as error:
        if "PytorchStreamReader" in str(error):
            raise ValueError("it is truncated or damaged") from None
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:  # torch's message would advise to run the code in the file
            raise ValueError("it was not written by torch.save, or is damaged") from None
        raise UserError(
            f"{path} holds an object of the class {found[1]}, which is not read because it could run code: save the "
            "checkpoint again with tensors, numbers and texts only."
        ) from None


def _require_held(content: Any, num_bytes: int) -> None:
    """Raises ValueError for tensors that repeat a few stored numbers without end, as expanded ones: using them fills the memory."""
    left = MOST_VIEWS * num_bytes + CHUNK
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            left -= value.numel() * value.element_size()
        elif isinstance(value, (Mapping, list, tuple)):
            waiting += value.values() if isinstance(value, Mapping) else value
        if left < 0:
            raise ValueError("its tensors have more numbers than the file holds")


def _check_records(archive: zipfile.ZipFile, path: Path, remedy: str) -> None:
    """UserError for the first record that does not match its checksum; it names the tensor."""
    for info in archive.infolist():
        # Compressed records, such as the code of TorchScript, are never read here, and so are not unpacked.
        if info.compress_type != zipfile.ZIP_STORED:
            continue
        try:
            with archive.open(info) as record:
                while record.read(CHUNK):
                    pass
        except (zipfile.BadZipFile, EOFError) as error:
            key = info.filename.rpartition("/data/")[2]
            try:
                name = next((name for name, stored in _tensors_of(archive) if stored.key == key), None)
            except Exception:  # the tree is damaged too
                name = None
            what = f"the tensor {name!r}" if name else f"the record {info.filename!r}"
            raise UserError(f"{path} is damaged: {what} does not match its checksum. {remedy}") from error


def _require_plain_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; raises ValueError if it names a tensor twice, because readers then differ in
    which one they use, or if the file has another size than it says."""
    with path.open("rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if size > MOST_HEADER:
            raise ValueError(f"its header claims {size:,} bytes, more than {MOST_HEADER:,}")
        text = file.read(size)
    if len(start) + len(text) < 8 + size:
        raise ValueError("it ends within its header")
    header: dict[str, Any] = json.loads(text, object_pairs_hook=unique_keys)
    header.pop("__metadata__", None)
    whole = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if (found := path.stat().st_size) != whole:
        raise ValueError(f"it has {found:,} bytes, but its header describes {whole:,}")
    return header


def _require_sound(path: Path) -> None:
    """Raises UserError for a file of a network's weights that is damaged, or has weights of 8 bits or of integers.

    Other libraries read these files: they check no checksum, and convert every type to float32.
    """

    def check(name: str, kind: Any, allowed: Collection[Any]) -> None:
        if name.rpartition(".")[2] in ("weight", "bias") and kind not in allowed:
            raise UserError(
                f"{path} is refused: its tensor {name!r:.80} has the type {str(kind).removeprefix('torch.')!r:.20}. Give weights of "
                "16 or 32 bits."
            )

    remedy = "Download or copy it again."
    with faults.reading(path, "a file of weights", remedy):
        if _is_safetensors(path):
            for name, entry in _require_plain_header(path).items():
                check(name, entry["dtype"], PRECISE)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_records(archive, path, remedy)
                for name, stored in _tensors_of(archive):
                    check(name, stored.dtype, PRECISE.values())


def require_all_read(where: Path, what: str, report: Mapping[str, Iterable[str]], network: nn.Module) -> None:
    """UserError unless `network`, which transformers built from a folder or file, has all its weights and left out no layer.

    transformers only warns: it fills missing weights with random values, and the features would be noise. A tensor that was
    not read although another layer has one like it shows that config.json describes fewer layers, or layers with fewer
    parts. Tensors of other towers and heads may stay unread.

    Args:
        where: the folder or file.
        what: "the encoder dinov2-b".
        report: the loading info of transformers.
        network: the network that was built.
    """

    def layer_of(name: str) -> str:
        return re.sub(r"\d+", "#", name.rpartition(".")[0])

    if report["missing_keys"]:
        raise UserError(
            f"{where} lacks weights of {what}, for example {min(report['missing_keys'])}: download or copy it again."
        )
    layers = {layer_of(name) for name in network.state_dict()}
    if spare := [n for n in report["unexpected_keys"] if "#" in layer_of(n) and layer_of(n) in layers]:
        raise UserError(
            f"{where} has {min(spare)}, but its config.json describes a smaller network: download or copy both again."
        )


def _require_mappable(archive: zipfile.ZipFile, path: Path) -> None:
    """UserError for an archive that torch would map wrongly, because it maps the bytes of a record without checks.

    A compressed record would give wrong values, and a record that is too short the values of the next record.
    """
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{path} is refused: its record {info.filename!r} is compressed, which torch.save never does. Unpack the archive, "
                "and pack it again without compression."
            )
    with archive.open(_stored(archive, "data.pkl")) as file:
        tree = _Tree(file)
        # If the tree is not one of torch.save, torch.load reports it.
        with contextlib.suppress(Exception):
            tree.load()
    for key, num_bytes in tree.num_bytes.items():
        if (found := _stored(archive, f"data/{key}").file_size) < num_bytes:
            raise ValueError(f"the record data/{key} has {found:,} bytes instead of {num_bytes:,}")


class Inert:
    """Replaces an object of any class: keeps its attributes and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...


class Stored:
    """A tensor before its bytes are read; has the arguments of torch's `_rebuild_tensor_v2`."""

    def __init__(self, storage: tuple[str, torch.dtype], offset: int, size: tuple, stride: tuple, *_: Any):
        (self.key, self.dtype), self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state: Any) -> None: ...

    def tensor(self, archive: zipfile.ZipFile) -> Tensor:
        """The tensor with its values; torch refuses sizes beyond the record."""
        data = bytearray(archive.read(_stored(archive, f"data/{self.key}")))
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)


class Attributed(dict):
    """Replaces OrderedDict; a state dict's versions are pickled as its attribute."""


class _Tree(pickle._Unpickler):
    """Reads the pickled tree of an archive without importing any class, so that no code can run.

    It is Python's unpickler, not the one in C, which allocates 16 bytes for every index below a number that the file sets.
    """

    # This opcode allocates the size that the file claims before it reads; torch never writes it.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.num_bytes: dict[str, int] = {}  # record -> bytes that its tensors need

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Stored
        if (module, name) == ("collections", "OrderedDict"):
            return Attributed
        return STORAGES.get(name, Inert) if module == "torch" else Inert

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, _, num = pid  # ("storage", type, key, device, number of values)
        size = dtype.itemsize if isinstance(dtype, torch.dtype) else 1  # for an untyped storage, num counts bytes
        self.num_bytes[key] = max(self.num_bytes.get(key, 0), num * size)
        return key, dtype


def _tensors_of(archive: zipfile.ZipFile) -> Iterator[tuple[str, Stored]]:
    """The tensors of the tree, with dotted names."""
    with archive.open(_stored(archive, "data.pkl")) as file:
        waiting, seen = [("", _Tree(file).load())], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Stored):
            yield name, value
            continue
        inside = value.state if isinstance(value, Inert) else value
        # An untrusted tree may contain itself.
        if isinstance(inside, dict) and id(inside) not in seen:
            seen.add(id(inside))
            waiting += [(f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(inside.items())]


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The record NAME in the archive's folder; torch never compresses records, so a compressed one is refused."""
    root = archive.namelist()[0].partition("/")[0]
    info = archive.getinfo(f"{root}/{name}")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the record {name} is compressed")
    return info


class Dtype:
    """Replaces numpy's dtype, whose state could point anywhere in memory."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _scalar(dtype: Dtype, raw: bytes) -> bool | int | float | bytes:
    """A NumPy scalar as a Python number; a text as its bytes."""
    code = NUMBERS.get(dtype.code)
    return struct.unpack(dtype.order + code, raw)[0] if code else raw


ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (Dtype, "numpy.dtype"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    # arrays, such as the state of a generator, are not needed
    *(
        (Inert, name)
        for name in ("numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    ),
    *(
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
        for name in (pure.__name__, pure.__name__.removeprefix("Pure"))
    ),
]
