"""Images to shards, once: crop, encode, store. Any number of processes; the same call continues an interrupted one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from repa.base.errors import UserError
from repa.data.config import PrepareConfig
from repa.data.filling import Job, Report, fill
from repa.data.groups import BASE, TEXT, BaseGroup, FeatureGroup, Group
from repa.data.manifest import Inventory, Manifest
from repa.data.reader import ShardReader
from repa.data.reading import FromShards, FromSource, Planned, plan_shards
from repa.data.recorded import with_absolute_paths
from repa.data.settings import Settings, agree, started
from repa.data.sources.opening import open_source
from repa.data.sources.reference_layout import require_autoencoder
from repa.data.text_encoding import TextJob, encode_captions


def prepare(
    source: str | Path,
    out: str | Path,
    config: PrepareConfig,
    *,
    only: Sequence[str] = (),
    rank: int = 0,
    world: int = 1,
    progress: Report | None = None,
    device: torch.device | str = "cpu",
) -> Manifest | None:
    """Make the shards of `source` in folder `out`; returns their manifest.

    The same call continues after an interruption, adds encoders that are new in config.features, makes anew what is
    missing, and does nothing when all is there.

    Processes share the work without meeting: process `rank` of `world` makes every world-th shard and leaves, and the
    last to finish writes the manifest; to all others None is returned. Equal calls on one folder at the same time
    share it too, on file systems with locks. What a lost process leaves undone is done by the next call.

    Args:
        source: what `open_source` takes.
        out: a new or empty folder, or one made by this function from the same source and configuration.
        config: what to make.
        only: make these parts alone: "base" (labels, images, moments, captions), "features:ENCODER" or "text".
        progress: called after every batch with (done, total, note): images of this process, and the bytes written.
        device: where the models run.

    Raises:
        UserError: a source, image, setting or disk that the user can mend; finished shards stay.
    """
    config = with_absolute_paths(config)
    images = open_source(source, labels=config.labels)
    require_autoencoder(images, config)
    inventory = Inventory(labels_from=images.labels_from, left_out=dict(images.left_out))
    names = tuple(images.class_names)
    settings = agree(Path(out), Settings(source=images.identity, class_names=names, config=config, inventory=inventory))
    config, device = settings.config, torch.device(device)
    chosen = chosen_groups(only, config)
    if TEXT in chosen and not images.has_captions:
        raise UserError(f"{source} has no captions, so text {config.text!r} has nothing to encode: leave it out.")
    models = load_later(config, device, [name for name in chosen if name != TEXT])
    shards = plan_shards(len(images), config.shard_size, config.flip)
    read = FromSource(images, config.resolution, config.num_workers)
    job = Job(Path(out), settings, shards, models, read, device, rank, world, progress)
    manifest = fill(job) if models else None
    if TEXT in chosen:  # captions come with the images, so after them
        manifest = encode_captions(TextJob(Path(out), settings, len(shards), device, rank, world, progress))
    return manifest


def add_features(
    out: str | Path,
    spec: str,
    *,
    weights: str | None = None,
    form: str = "fp16",
    rank: int = 0,
    world: int = 1,
    progress: Report | None = None,
    device: torch.device | str = "cpu",
) -> Manifest | None:
    """Add the tokens of one more encoder to a prepared folder, from its stored images: the source is not needed.

    Args:
        out: a folder made by `prepare`.
        spec: a name of ENCODERS or a dotted name.
        weights: local weights of that encoder; None for its own.
        form: how its tokens are stored: fp16, int8, pcaK or pcaK-int8.
        rank: as for `prepare`.
        world: as for `prepare`.
        progress: as for `prepare`.
        device: as for `prepare`.

    Raises:
        UserError: the folder holds no images, or the encoder cannot be loaded.
    """
    out, device = Path(out), torch.device(device)
    manifest = Manifest.open(out)
    if not manifest.config.store_images:
        raise UserError(f"{out} holds no images to encode: run `repa prepare` on the source with --features {spec}.")
    config = manifest.config
    if spec not in config.features:
        forms = (*config.feature_forms, f"{spec}={form}")
        config = config.override(features=(*config.features, spec), feature_forms=forms)
    if weights:
        config = with_absolute_paths(config.override(feature_weights=(f"{spec}={weights}", *config.feature_weights)))
    asked = Settings(
        source=manifest.source, class_names=manifest.class_names, config=config, inventory=manifest.inventory
    )
    settings = agree(out, asked)
    reader = ShardReader(out, manifest, only=("images", "labels"))
    shards = [Planned(range(int(end) - s.num, int(end))) for end, s in zip(reader.ends, manifest.shards, strict=True)]
    models: dict[str, Callable[[], Group]] = {spec: lambda: FeatureGroup(spec, weights, settings.config, device)}
    return fill(Job(out, settings, shards, models, FromShards(reader), device, rank, world, progress))


def add_text(
    out: str | Path,
    spec: str = "",
    *,
    weights: str | None = None,
    form: str = "fp16",
    rank: int = 0,
    world: int = 1,
    progress: Report | None = None,
    device: torch.device | str = "cpu",
) -> Manifest | None:
    """Add the tokens of the captions to a prepared folder that holds captions: the source is not needed.

    Args:
        out: a folder made by `prepare`.
        spec: a text encoder; "" takes that of the folder's settings.
        weights, form, rank, world, progress, device: as for `add_features`; form is fp16 or int8.

    Raises:
        UserError: the folder holds no captions, or tokens of another text encoder.
    """
    out, device = Path(out), torch.device(device)
    manifest = Manifest.open(out)
    if not any(shard.captions for shard in manifest.shards):
        raise UserError(f"{out} holds no captions to encode: prepare a source that has some.")
    text = {"text": spec, "text_form": form} if spec else {}
    before = started(out).config  # the wish of an interrupted call among it
    config = before.override(**text, text_weights=weights or before.text_weights)
    if not config.text:
        raise UserError(f"{out} names no text encoder yet: give one, as in --text clip-l.")
    asked = Settings(
        source=manifest.source, class_names=manifest.class_names, config=with_absolute_paths(config),
        inventory=manifest.inventory,
    )  # fmt: skip
    return encode_captions(TextJob(out, agree(out, asked), len(manifest.shards), device, rank, world, progress))


def load_later(config: PrepareConfig, device: torch.device, names: Sequence[str]) -> dict[str, Callable[[], Group]]:
    """Group -> how to load its model."""

    def loader(name: str) -> Callable[[], Group]:
        if name == BASE:
            return lambda: BaseGroup(config, device)
        return lambda: FeatureGroup(name, config.weights_of(name), config, device)

    return {name: loader(name) for name in names}


def chosen_groups(only: Sequence[str], config: PrepareConfig) -> list[str]:
    """The groups that `only` names; all of them when it is empty."""
    groups = [BASE, *config.features, *([TEXT] if config.text else [])]
    chosen = [text.removeprefix("features:") for text in only]
    for text, name in zip(only, chosen, strict=True):
        if name not in groups or (name in (BASE, TEXT)) == text.startswith("features:"):
            allowed = ", ".join(
                [BASE, *(f"features:{spec}" for spec in config.features), *groups[-1:][: bool(config.text)]]
            )
            raise UserError(f"only was given {text!r}: allowed here are {allowed}.")
    return [name for name in groups if not chosen or name in chosen]
