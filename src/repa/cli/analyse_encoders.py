"""`repa analyse encoders DATA --encoders ...`."""

from pathlib import Path

from repa.analysis.config import EncodersConfig
from repa.cli import options, tables
from repa.cli.console import Bars, say

ABOUT = (
    "Which encoder should I align to? Spatial structure (LDS, CDS, RMSC: the higher, the more an encoder helped in the study "
    "that proposed them), linear probe, likeness to the others, speed on this machine and size of stored tokens."
)
COLUMNS = {
    "encoder": "encoder", "dim": "channels", "grid": "grid", "lds": "LDS|.3f", "cds": "CDS|.4f", "rmsc": "RMSC|.3f",
    "top1": "top-1|.4f", "top5": "top-5|.4f", "images_per_second": "images/s|,.1f", "bytes_fp16": "fp16 B/image|,",
    "bytes_int8": "int8 B/image|,",
}  # fmt: skip


class EncodersArguments(EncodersConfig):
    data: str
    """folder of prepared data"""
    val: str = ""
    """Folder of prepared data to test the probe on; empty keeps a fifth of the images for it."""
    out: str = ""
    """Name of a .json; the .csv is written next to it. Empty only prints."""


def encoders(argv: list[str]) -> int:
    given = options.parse(EncodersArguments, argv, verb="analyse encoders", about=ABOUT, positional=("data",))
    config = options.part(EncodersConfig, given)
    out = tables.output(given.out, Path()) if given.out else None
    from repa.analysis import compare_encoders
    from repa.base import dist
    from repa.data import open_data

    device, data = dist.setup(), open_data(given.data)
    val = open_data(given.val) if given.val else None
    with Bars() as bars:
        shown, heads = bars.of(f"encoders on {given.data}"), bars.of("their heads", "epochs")
        found = compare_encoders(data, config, val=val, device=device, progress=shown, heads_progress=heads)
    say(*tables.in_columns(found.encoders, COLUMNS))
    if len(config.encoders) > 1:
        say("", f"CKNNA ({config.variant}, k = {config.neighbours}) to each other")
        say(
            *tables.in_columns(
                found.matrix(), {"encoder": "encoder", **{name: f"{name}|.4f" for name in config.encoders}}
            )
        )
    if out is not None:
        tables.write(out, {**tables.how("encoders", given), "device": str(device)}, found.rows())
        say(f"{out} and .csv.")
    return 0
