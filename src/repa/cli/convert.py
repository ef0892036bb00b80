"""`repa convert CHECKPOINT RUN`: a released checkpoint, or an exported folder, as a run folder."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from repa.autoencoders import AUTOENCODER, AUTOENCODERS
from repa.base.config import Config, refuse_idle
from repa.base.registry import Spec
from repa.cli import options
from repa.cli.console import say
from repa.training.config import TrainConfig


class Network(Config):
    """What a checkpoint does not say about its network."""

    num_heads: int = Field(0, ge=0)
    """Attention heads; 0: those of the named size with this width and depth."""


class ConvertArguments(options.Command):
    """Make a run folder from a checkpoint of REPA, SiT or DiT (.pt, .safetensors), a folder of `repa export`, or a
    diffusers DiT. `repa sample`, `repa analyse` and `repa train --init` accept it.
    """

    verb = "convert"
    positional = ("checkpoint", "run")

    checkpoint: options.AnyPath
    """.pt or .safetensors file, folder of `repa export`, or folder of a diffusers DiTTransformer2DModel"""
    run: str
    """run folder to make"""
    kind: Literal["repa", "sit", "dit"] = "repa"
    """Code of the checkpoint: sihyun-yu/REPA, willisma/SiT or facebookresearch/DiT; not needed for an exported folder."""
    autoencoder: Annotated[str, Spec(AUTOENCODERS)] = AUTOENCODER
    """Autoencoder of its latents; not needed for an exported folder."""
    autoencoder_weights: str = ""
    """Local folder of the autoencoder's weights; empty: the hub's."""
    model: Network = Network()
    """What a checkpoint does not say about its network."""
    targets: tuple[str, ...] = ()
    """Targets of REPA's projectors, in order; empty: those named in the file, otherwise the projectors are dropped."""
    depth: int = Field(0, ge=0)
    """Alignment depth of those projectors; 0: the depth named in the file."""
    weights: str = ""
    """Weights to use, by their name in the file (ema, model_ema, model, ...); empty: the average."""
    path: str = ""
    """Path of its training (linear, trigonometric, vp); empty: the path named in the file, otherwise linear."""

    def idle(self) -> dict[str, str]:
        of_files = ("kind", "model.num_heads", "targets", "depth", "weights", "path")
        return dict.fromkeys(
            of_files if Path(self.checkpoint).is_dir() else (), f"here: {self.checkpoint} is a folder, which records it"
        )


def main(argv: list[str]) -> int:
    given = options.parse(ConvertArguments, argv)
    from repa.runs.importing import is_diffusers, read_checkpoint, read_diffusers, read_export, write_run

    source, run = Path(given.checkpoint), Path(given.run)
    if source.is_dir():
        imported = read_diffusers(source) if is_diffusers(source) else read_export(source)
    else:
        imported = read_checkpoint(
            source, given.kind, num_heads=given.model.num_heads, targets=given.targets, depth=given.depth, path=given.path,
            weights=given.weights,
        )  # fmt: skip
    # Only the content tells which options are redundant.
    unread = {}
    if "autoencoder" in imported.settings:
        unread["autoencoder"] = f"here: {source} records it"
    if not imported.settings.get("alignments"):
        unread["depth"] = "without --targets"
    refuse_idle(unread, sorted(given.model_fields_set))
    settings = {"autoencoder": given.autoencoder, "autoencoder_weights": given.autoencoder_weights, **imported.settings}
    config = TrainConfig.parse(settings, where=str(source))
    write_run(run, config, imported.checkpoint, source.name, imported.kind)
    step, dims = imported.checkpoint.step, config.model.dims()
    say(
        f"{run}: {config.model.name}, width {dims.hidden_dim}, depth {dims.depth}, {config.model.num_classes:,} classes, "
        f"step {step:,}, {'EMA and raw' if imported.checkpoint.model else 'one set of'} weights."
    )
    if imported.taken:
        say(f"Its weights: {imported.taken}.")
    if imported.left_out:
        say(f"Its projectors ({imported.left_out}) were dropped. To keep them, give their --targets and --depth.")
    say(
        f"Next: repa sample {run} --num-images 64 --out samples.npz, or repa train RECIPE --data DATA --out NEW --init {run}"
    )
    return 0
