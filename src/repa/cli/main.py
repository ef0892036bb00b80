"""`repa VERB ...`: find the verb, run it, turn what goes wrong into an exit code."""

import errno
import importlib
import sys

from repa import __version__
from repa.base.errors import UserError, nearest

VERBS = {
    "quickstart": "the whole main job on this machine: real images to a page that shows the difference",
    "prepare": "images -> shards of latents, labels and target tokens",
    "train": "train a diffusion transformer, with alignment or without",
    "sample": "images from a run folder",
    "evaluate": "Fréchet distance, precision and recall of samples",
    "analyse": "linear probing and CKNNA of a run's hidden states",
    "convert": "a released checkpoint of REPA, SiT or DiT -> a run folder",
    "export": "the averaged network of a run as safetensors, or for diffusers",
    "report": "one HTML page that compares runs",
    "show": "print a recipe, prepared data, or a run",
    "list": "names of recipes, encoders, autoencoders, models, samplers, ...",
}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {sentence}" for verb, sentence in VERBS.items()]
    return "\n".join([
        f"repa {__version__}: representation alignment for diffusion transformers", "",
        "usage: repa VERB ...        repa VERB --help tells more", "", *lines, "",
        "Several processes: torchrun --nproc-per-node 8 -m repa train ...   Exit codes: 0 fine, 2 your input, 1 our bug.",
    ])  # fmt: skip


def run(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            raise UserError(f"There is no verb {verb!r}: allowed are {', '.join(VERBS)}.{nearest(verb, VERBS)}")
        code = importlib.import_module(f"repa.cli.{verb}").main(rest)
        if "repa.base.dist" in sys.modules:
            sys.modules["repa.base.dist"].teardown()
        return code
    except UserError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # the reader of our output left, as in `repa list recipes | head`
        sys.stderr.close()
        return 0
    except (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}. Choose another path, or mend this one.")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _refuse("The disk is full: make room, then run the same command again; what was whole before still is.")
    except KeyboardInterrupt:
        print("repa: stopped by Ctrl-C; the same command continues where it was.", file=sys.stderr)
        return 130


def _refuse(sentence: str) -> int:
    print("repa: " + sentence.replace("\n", " "), file=sys.stderr)
    return 2


def main() -> None:
    sys.exit(run(sys.argv[1:]))
