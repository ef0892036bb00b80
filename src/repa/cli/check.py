"""`repa check DATA`: verify prepared data, optionally against the models that made them."""

from pathlib import Path

from pydantic import Field

from repa.base import files
from repa.cli import options
from repa.cli.console import ProgressBar, say
from repa.encoders.loading import LocalWeights


class CheckArguments(options.Command):
    """Check a folder of prepared data: its manifest and the sizes of all files. With --full, also verify the checksum
    of every file, and encode a sample of the images again for comparison. The exit code is 2 if something is wrong.
    """

    verb = "check"
    positional = ("data",)

    data: options.DataFolder
    """folder of prepared data"""
    full: bool = False
    """Verify all checksums, count equal images, and encode a sample of the images again."""
    num_images: int = Field(64, ge=1)
    """Number of images to encode again."""
    autoencoder_weights: str = ""
    """Local folder of the autoencoder's weights; empty: the location that `repa prepare` recorded."""
    feature_weights: LocalWeights = Field({})
    """Local weights of encoders, written ENCODER=PATH."""

    def idle(self) -> dict[str, str]:
        whole = ("num_images", "autoencoder_weights", "feature_weights")
        return dict.fromkeys(() if self.full else whole, "without --full")


def main(argv: list[str]) -> int:
    given = options.parse(CheckArguments, argv)
    from repa.data import open_data

    manifest = open_data(given.data).manifest
    size = sum(record.size for record in manifest.records)
    say(f"{given.data}: {len(manifest.records)} files of {files.size(size)} have the recorded size")
    return _full(Path(given.data), given) if given.full else 0


def _full(folder: Path, given: CheckArguments) -> int:
    from repa.base import dist
    from repa.data import check_bytes, check_models, count_duplicates, open_data

    with ProgressBar(f"reading {folder.name}", "bytes") as bar:
        check_bytes(folder, bar)
    say("all checksums match")
    data = open_data(folder)
    if data.has_images:
        with ProgressBar("comparing images", "images") as bar:
            num = count_duplicates(data, bar)
        if num:
            say(f"images{'':<22} {num:,} of {len(data.originals):,} equal an earlier one, pixel for pixel")
    findings = check_models(
        folder, num=given.num_images, autoencoder_weights=given.autoencoder_weights or None,
        feature_weights=given.feature_weights, device=dist.own_device(),
    )  # fmt: skip
    for field, error, trouble, _ in findings:
        found = "" if error is None else f"encoded again: relative error {error:.2g}"
        say(f"{field:<28} {trouble or found}")
    return 2 if any(finding.trouble and finding.is_compared for finding in findings) else 0
