"""`repa VERB ...`: find the verb, run it, turn errors into an exit code."""

import importlib
import io
import os
import signal
import sys
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING

from repa import __version__
from repa.base import launch, trust
from repa.base.errors import UserError, choices, escaped
from repa.base.faults import sentence_of
from repa.base.launch import keep_freed_memory, spin_briefly
from repa.base.reporting import columns
from repa.cli.console import tell_retries_once

if TYPE_CHECKING:
    from repa.cli.options import Command

# Each verb is a module of this room with a class `<Verb>Arguments` (its options) and a function `main(argv)`.
VERBS = {
    "quickstart": "train a small SiT without and with alignment on this machine, and compare them",
    "estimate": "predict the cost of a recipe: FLOPs, memory, disk, time",
    "prepare": "turn images into shards of latents, labels and target tokens",
    "check": "verify prepared data, optionally against its models",
    "train": "train a diffusion transformer with or without alignment",
    "bench": "measure the speed of a recipe on this machine, with advice",
    "ema": "compute an average of the weights of any width after training",
    "sample": "generate images from a run folder",
    "evaluate": "compute FID, sFID, IS, precision, recall of samples or of a run; make references",
    "analyse": "linear probes, CKNNA, comparison of encoders, pictures of tokens and samples, copies",
    "report": "compare runs on one HTML page",
    "convert": "turn a released checkpoint of REPA, SiT or DiT into a run folder",
    "export": "write the averaged network of a run as safetensors, or for diffusers",
    "show": "describe a recipe, any other name, prepared data, or a run",
    "completion": "print the script for tab completion in a shell",
    "list": "list the names of recipes, encoders, autoencoders, models, samplers, ...",
}


def usage() -> str:
    lines = columns([(f"  {verb}", sentence) for verb, sentence in VERBS.items()])
    return "\n".join([
        f"repa {__version__}: representation alignment for diffusion transformers", "",
        "usage: repa VERB ...        repa VERB --help prints its options", "", *lines, "",
        "--trust MODULE (any verb) allows files of runs and data to name code of this module (docs/security.md).",
        "Several processes: torchrun --nproc-per-node 8 -m repa train ...   Exit codes: 0 done, 2 an error to fix, 1 a bug in repa.",
    ])  # fmt: skip


def run(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal's encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            raise UserError(f"Unknown verb {verb!r}{choices(verb, VERBS, 'repa --help')}")
        # Inconsistent variables of the launcher are refused before a process waits for others.
        launch.place()
        modules, rest = trusted(rest)
        with trust.command(rest):
            trust.trust(*modules)
            code = importlib.import_module(f"repa.cli.{verb}").main(rest)
        _leave_group()
        return code
    except BrokenPipeError:  # the reader of our output closed it, as in `repa list recipes | head`
        # Python flushes at exit and would report the same broken pipe once more.
        sys.stderr.close()
        return 0
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        return _print_error(sentence, of_all=isinstance(error, UserError) and _shared(error))
    except KeyboardInterrupt as stop:
        how = stop.args[0] if stop.args else signal.SIGINT
        word = "Ctrl-C" if how == signal.SIGINT else signal.Signals(how).name
        print(f"repa: stopped by {word}. Run the same command again to continue.", file=sys.stderr)
        # As shells do: 130 after Ctrl-C, 143 after SIGTERM.
        return 128 + how


def command_of(verb: str, words: list[str]) -> "tuple[type[Command], list[str]]":
    """The options class of a verb, and the words for it: `analyse` and `evaluate reference` have a second word."""
    module = importlib.import_module(f"repa.cli.{verb}")
    inner = module.arguments_of(words[0]) if words and hasattr(module, "arguments_of") else None
    return (inner, words[1:]) if inner else (getattr(module, f"{verb.capitalize()}Arguments"), words)


def trusted(argv: list[str]) -> tuple[list[str], list[str]]:
    """(modules, rest): the modules of `--trust MODULE`, an option of every verb, and the command line without them."""
    modules, rest = [], []
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name != "--trust":
            rest.append(token)
        elif module := value if equals else next(tokens, ""):
            modules.append(module)
        else:
            raise UserError("--trust needs the name of a module, such as --trust mylab.")
    return modules, rest


def _shared(error: Exception) -> bool:
    """Whether all processes raise this error. Before they meet, all read the same command line and files; later they agree."""
    # Looked up, not imported: commands that need no torch must not load it at their end.
    dist = sys.modules.get("repa.base.dist")
    if dist is None or not dist.active():
        return True
    if isinstance(error, dist.SharedError):
        _leave_group()
        return True
    return False


def _leave_group() -> None:
    if "repa.base.dist" in sys.modules:
        sys.modules["repa.base.dist"].teardown()


def _print_error(sentence: str, of_all: bool = True) -> int:
    """Print an error: once per machine if all processes raise it, otherwise with the rank of the process."""
    here = launch.place(strict=False)
    if here.local_rank == 0 or not of_all:
        who = f"process {here.rank}: " if not of_all and here.world > 1 else ""
        print(f"repa: {who}{escaped(' '.join(sentence.split()))}", file=sys.stderr)
    return 2


def _in_thread(arguments: threading.ExceptHookArgs) -> None:
    """Report a library's thread that cannot write, such as TensorBoard's, in one line; a bug keeps its traceback."""
    sentence = sentence_of(arguments.exc_value) if arguments.exc_value else None
    if sentence is None:
        threading.__excepthook__(arguments)
    else:
        _print_error(sentence)


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    if find_spec("fcntl") is None:
        sys.exit(_print_error("The commands need Linux or macOS, because they lock files. On Windows run them in WSL."))
    keep_freed_memory()
    spin_briefly()
    tell_retries_once()
    threading.excepthook = _in_thread
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names in scripts that the locale cannot encode; stderr escapes them anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):  # `train` and previews handle signals themselves
        signal.signal(number, _stop)
    code = run(sys.argv[1:])
    if launch.place(strict=False).world > 1 or code > 128:
        # gloo's threads may outlive the group and abort an interpreter that tears itself down, which hides the exit code; and
        # a second Ctrl-C would find threads that are waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
