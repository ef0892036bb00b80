"""`repa prepare SOURCE OUT ...`."""

from collections.abc import Sequence
from pathlib import Path

from repa.cli import options
from repa.cli.console import Progress, say
from repa.data.config import PrepareConfig

ABOUT = (
    "Images (a folder or zip of class folders, or `photographs`, the ones that come with the package's dependencies) "
    "-> shards for training: cropped images, latents, labels and target tokens. The same command continues after any stop."
)


class PrepareArguments(PrepareConfig):
    source: str
    """folder, zip, or photographs:num=10000"""
    out: str
    """folder of the prepared data"""


def main(argv: list[str]) -> int:
    given = options.parse(PrepareArguments, argv, verb="prepare", about=ABOUT, positional=("source", "out"))
    config = options.part(PrepareConfig, given)
    start(given.source, Path(given.out), config)
    return 0


def start(source: str, out: Path, config: PrepareConfig) -> None:
    from repa.base import dist
    from repa.data import prepare

    device = dist.setup()
    with Progress(f"preparing {out.name}", "images") as bar:
        manifest = prepare(source, out, config, progress=lambda done, total, what: bar(done, total), device=device)
    skipped = f", {len(manifest.skipped)} unreadable left out ({_some(manifest.skipped)})" if manifest.skipped else ""
    say(
        f"{out}: {manifest.num_images:,} images of {len(manifest.class_names)} classes at {manifest.resolution} pixels{skipped}."
    )


def _some(names: Sequence[str], num: int = 5) -> str:
    more = f" and {len(names) - num} more in its manifest" if len(names) > num else ""
    return ", ".join(str(name) for name in names[:num]) + more
