"""Turn errors of the system and of file readers into one-sentence user errors.

The origin of an error decides: a system error that names a file or reports the state of a disk, and any error that leaves
a block of `reading`, are user errors. Everything else is a bug in repa and keeps its traceback.
"""

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from repa.base.errors import UserError

PACKAGE = Path(__file__).parents[1]
AGAIN = "run the same command again; nothing already written was lost"
ELSEWHERE = "Choose another path, or change this one."
# what happened to a file, and what to do
SYSTEM = {
    errno.ENOSPC: ("the disk is full", f"Free some space and {AGAIN}."),
    errno.EDQUOT: ("the disk quota is used up", f"Free some space and {AGAIN}."),
    errno.EIO: ("the disk failed (input/output error)", f"Check the disk, then {AGAIN}."),
    errno.ESTALE: ("the network disk lost it (stale file handle)", f"Mount the disk again, then {AGAIN}."),
    errno.EROFS: ("the file system is read-only", "Choose a folder that can be written."),
    errno.EFBIG: (
        "the file is too large for its file system or for `ulimit -f`",
        f"Choose another disk or raise the limit, then {AGAIN}.",
    ),
    errno.EACCES: ("permission denied", "Change its permissions, or choose another path."),
    errno.EPERM: ("the file system does not permit this", "Choose another path."),
    errno.EINVAL: ("the file system does not support this (invalid argument)", "Choose a folder on another file system."),
    errno.ENOTSUP: ("the file system does not support this", "Choose a folder on another file system."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one."),
    errno.ELOOP: ("its symbolic links form a cycle", "Remove the links, or give the file itself."),
    errno.EMFILE: ("too many files are open", "Raise the limit (`ulimit -n`), then run the same command again."),
    errno.ENFILE: ("too many files are open on this machine", "Close other programs, then run the same command again."),
    errno.ENOENT: ("there is no such file or folder", "Check the path; if it was removed meanwhile, run the command again."),
    errno.EEXIST: ("a part of this path is a file, not a folder", "Choose another path."),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "Choose another path."),
    errno.ESHUTDOWN: ("the disk was taken away", f"Mount it again, then {AGAIN}."),
}  # fmt: skip
# A write or fsync on an open file has no file name: these errors still report a disk's state, and no bug of ours raises
# them.
NAMELESS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ESHUTDOWN,
}  # fmt: skip
# what third-party readers raise on invalid bytes; UserError, a ValueError, is handled first
DAMAGED = (OSError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ArithmeticError,
           SyntaxError, MemoryError, AssertionError)  # fmt: skip
FORMATS = (
    "safetensors",
    "safetensors_rust",  # up to 0.7
    "zipfile",
    "tarfile",
    "zlib",
    "struct",
    "pickle",
    "_pickle",
    "pyarrow",
    "yaml",
    "csv",
    "_csv",
    "lzma",
    "_lzma",
    "tokenize",  # of NumPy's headers
)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def sentence_of(error: BaseException) -> str | None:
    """The message for a system error, or None for a bug in repa."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or _is_torch_memory(error):
        return (
            f"Out of memory ({_first_line(error)}): use smaller batches (--batch-size; --accumulate in training), "
            "close other programs, or use a larger machine."
        )
    if (number := _hidden_errno(error)) is not None:
        return _sentence(number, None)
    return _of_system(error) if isinstance(error, OSError) else None


def why_no_place(error: OSError, folder: Path) -> str:
    """Why a folder accepts no new files, and what to do."""
    if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):  # ENOENT: in /proc, where no file can be created
        return f"{folder} accepts no new files. Choose another folder."
    return _what(error.errno, error.strerror or "it cannot be used")


def is_of_disk(error: BaseException) -> bool:
    """Whether the error reports the state of a disk (full, failing, read-only, ...)."""
    return isinstance(error, OSError) and error.errno in NAMELESS


def written(error: Exception, path: Path) -> UserError | None:
    """The error of a block that writes `path`, with its name added if missing; None for a bug in repa.

    FileNotFoundError and FileExistsError that name a file are not changed, because callers handle them: another process
    may have removed a folder. Those of fsync name none.
    """
    if isinstance(error, UserError):
        return None
    if isinstance(error, (FileNotFoundError, FileExistsError)) and error.filename is not None:
        return None
    if isinstance(error, OSError) and error.filename is not None and not _is_temporary(error.filename, path):
        sentence = _of_system(error)
        return None if sentence is None else UserError(sentence)
    number = _hidden_errno(error) or (error.errno if isinstance(error, OSError) else None)
    return None if number is None else UserError(f"{path} was not written: {_what(number, os.strerror(number))}")


@contextlib.contextmanager
def reading(
    path: str | Path, kind: str, remedy: str = "", *, missing: str = "", damaged: tuple[type[Exception], ...] = DAMAGED
) -> Iterator[None]:
    """A block that reads one untrusted file: any error in it becomes a one-sentence error that names the file.

    Put only the reader of the format into the block, because a bug of ours in it would look like a user error. Pipes,
    sockets and devices, which block or never end, are refused before they are opened.

    Args:
        path: a file on this machine, or its name in errors.
        kind: what it should be, as in "a safetensors file".
        remedy: a sentence that says what to do.
        missing: a sentence for a missing file.
        damaged: what readers raise on invalid bytes; (Exception,) if several libraries read.

    Raises:
        UserError: the block raised an error.
    """
    if missing and not os.path.lexists(path):
        raise UserError(missing)
    require_plain(path)
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(_sentence(error.errno, path)) from error
    except RecursionError:
        raise UserError(f"{path} is refused: it is nested too deeply for {kind}. {remedy}".rstrip()) from None
    except Exception as error:
        if not (isinstance(error, damaged) or type(error).__module__.split(".")[0] in FORMATS):
            raise
        reason = _first_line(error).rstrip(".")
        raise UserError(f"{path} cannot be read as {kind}: {reason}. {remedy}".rstrip()) from error


def require_plain(path: str | Path) -> None:
    """Refuse pipes, which block, and devices, which never end. Missing files and folders are left to the caller."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # the code that opens it reports this
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is refused: it is {_kind_of(mode)}, not a file. Remove it, or give a file.")


def _kind_of(mode: int) -> str:
    names = {
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for is_it, name in names.items() if is_it(mode)), "something else")


def _of_system(error: OSError) -> str | None:
    path = error.filename
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if isinstance(path, (str, os.PathLike)):
        ours = PACKAGE in Path(path).absolute().parents  # a file that the package should contain
        return None if ours else _sentence(error.errno, path, error.strerror)
    return _sentence(error.errno, None) if is_of_disk(error) else None


def _sentence(number: int | None, path: object, strerror: str | None = None) -> str:
    what = _what(number, strerror or (os.strerror(number) if number else "it cannot be used"))
    return f"{path}: {what}" if path else what[:1].upper() + what[1:]


def _what(number: int | None, reason: str) -> str:
    what, remedy = SYSTEM.get(number or 0, (reason[:1].lower() + reason[1:].rstrip("."), ELSEWHERE))
    return f"{what}. {remedy}"


def _hidden_errno(error: BaseException) -> int | None:
    """The errno of a failed write whose library reports it only as text, or not at all."""
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error" in text:
        found = re.search(r"os error (\d+)", text)
        return int(found[1]) if found else errno.EIO
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", text):  # numpy.ndarray.tofile
        return errno.ENOSPC
    if isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in text:
        return errno.ENOSPC
    return None


def _is_torch_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _is_temporary(name: object, path: Path) -> bool:
    """Whether a file name is the temporary name of `path`, or is inside it."""
    return isinstance(name, (str, os.PathLike)) and f".{path.name}." in str(name)


def _first_line(error: BaseException) -> str:
    """The reason without colours and without the library's advice."""
    text = ANSI.sub("", str(error.args[0] if isinstance(error, KeyError) and error.args else error)).strip()
    first, _, rest = text.partition("\n")
    # torch's report of mismatched tensors: the reason is on the lines below.
    if first.endswith(":"):
        first = " ".join((first, *rest.split()))
    return first[:300] or type(error).__name__
