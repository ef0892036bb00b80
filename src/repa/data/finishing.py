"""Write the manifest of a folder when all parts are finished, and again when a field is removed."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repa.base import files, lock
from repa.base.arrays import load_npy
from repa.base.errors import UserError, choices
from repa.data.config import BASE, FP16, TEXT, PrepareConfig, plain_name, split_format
from repa.data.manifest import MANIFEST, PARTS, SETTINGS_FILE, Manifest, remove_parts
from repa.data.progress import FinishedParts, Part, started
from repa.data.records import ArrayFile, FeatureField, Shard, TextField, basis_name, fields_of


def finish(finished: FinishedParts) -> Manifest:
    """Write the manifest of a folder with all parts finished, and remove parts/. One process at a time may call it."""
    out, settings, parts = finished.out, finished.settings, finished.parts
    shards, first = [], None
    for number, shard in enumerate(parts):
        nums = {part.shard.num for name, part in shard.items() if name != TEXT}
        assert len(nums) == 1, f"shard {number} differs in length: {shard}"
        merged = {field: file for part in shard.values() for field, file in part.shard.files.items()}
        text = shard[TEXT].shard.text if TEXT in shard else {}
        shards.append(shard[BASE].shard.override(files=merged, text=text))
        first = first or (shard if shards[-1].num else None)
    if first is None:
        raise UserError(
            f"No image of {settings.source['name']} can be read, such as {shards[0].skipped[0]}: give another source."
        )
    # counted from the files, because images of the source may have been skipped
    counts = np.zeros(len(settings.class_names), np.int64)
    for made in shards:
        if made.num and not made.flipped:
            counts += np.bincount(load_npy(out / made.files["labels"].file, "labels"), minlength=len(counts))
    encoders = [name for name in first if name not in (BASE, TEXT)]
    manifest = Manifest(
        **settings.override(inventory=settings.inventory.override(captioned=_captioned(out, shards))).model_dump(),
        num_images=sum(shard.num for shard in shards),
        class_counts=tuple(counts.tolist()),
        autoencoder=first[BASE].identity,
        features={
            name: _facts(out, name, settings.config.feature_forms.get(name, FP16), first[name]) for name in encoders
        },
        text=_text_facts(settings.config.text_form, first[TEXT]) if TEXT in first else None,
        shards=tuple(shards),
    )
    # the manifest is written before parts/ is removed: a kill in between leaves both, and the next call removes parts/
    if manifest != finished.manifest:
        manifest.save(out)
    remove_parts(out)
    return manifest


def _text_facts(form: str, part: Part) -> TextField:
    """A shard with images, which has captions or at least the empty text."""
    _, num_tokens, dim = part.shard.text["text"].shape
    masked = "text_mask" in part.shard.text
    return TextField(dim=dim, num_tokens=num_tokens, masked=masked, form=form, identity=part.identity)


def _captioned(out: Path, shards: list[Shard]) -> int | None:
    """Number of originals with captions; None if no shard has captions."""
    files_of = [shard.captions.file for shard in shards if shard.captions and not shard.flipped]
    lines = (line for file in files_of for line in (out / file).read_bytes().splitlines())
    return sum(line != b"[]" for line in lines) if files_of else None


def _facts(out: Path, name: str, form: str, part: Part) -> FeatureField:
    _, tokens, dim = part.shard.files[f"features.{name}"].shape
    basis = _record_of(out / basis_name(name)) if split_format(form)[0] else None
    return FeatureField(
        dim=basis.shape[1] if basis else dim,
        grid=math.isqrt(tokens),
        pooled=f"pooled.{name}" in part.shard.files,
        form=form,
        basis=basis,
        identity=part.identity,
    )


def _record_of(path: Path) -> ArrayFile:
    array = load_npy(path, "an array")
    return ArrayFile(
        file=path.name, dtype=str(array.dtype), shape=array.shape, size=path.stat().st_size, sha256=files.sha256(path)
    )


def remove(out: str | Path, name: str) -> Manifest | None:
    """Delete a field of a folder, or the request for it; nothing else changes.

    The manifest is changed before the files are deleted, so a kill leaves a complete folder; the same call then deletes
    the rest. Runs that need the field can no longer use the folder.

    Args:
        out: a folder of `prepare`, finished or not.
        name: "features:ENCODER" (tokens, scales, pooled features, basis), "text" (tokens of captions; the captions
            stay), or "images" (if moments are stored).

    Returns:
        The new manifest; None while the folder is unfinished.

    Raises:
        UserError: no such field, or a field that everything else needs.
    """
    out, part = Path(out), name.removeprefix("features:")
    with lock.exclusive(out, "repa prepare --remove"):
        settings = started(out)
        if settings is None:
            raise UserError(f"{out} holds no prepared data: give a folder of `repa prepare`.")
        manifest = Manifest.open(out) if (out / MANIFEST).is_file() else None
        fields = ("images",) if name == "images" else fields_of(part)
        config = _without_images(out, manifest) if name == "images" else _without(out, settings.config, name, part)
        if manifest:
            manifest = _manifest_without(manifest, fields, config)
            manifest.save(out)
        # the folder may be unfinished or be extended: parts/ would restore the field
        if (out / PARTS).is_dir():
            files.write_sealed(out / PARTS / SETTINGS_FILE, settings.override(config=config).model_dump(mode="json"))
            for path in _numbered_files(out / PARTS, "json", part):
                path.unlink()
        for path in _numbered_files(out, "npy", *fields):
            path.unlink()
        (out / basis_name(part)).unlink(missing_ok=True)
        wanted = {BASE, *config.features, *([TEXT] if config.text else [])}
        if manifest and wanted <= manifest.parts:  # nothing is left to make
            remove_parts(out)
        return manifest


def _manifest_without(manifest: Manifest, fields: Sequence[str], config: PrepareConfig) -> Manifest:
    """The manifest of the other fields, with their configuration."""
    shards = [
        shard.override(
            files={field: file for field, file in shard.files.items() if field not in fields},
            text={field: file for field, file in shard.text.items() if field not in fields},
        )
        for shard in manifest.shards
    ]
    features = {spec: facts for spec, facts in manifest.features.items() if f"features.{spec}" not in fields}
    text = None if "text" in fields else manifest.text
    return manifest.override(config=config, features=features, text=text, shards=shards)


def _without_images(out: Path, manifest: Manifest | None) -> PrepareConfig:
    if manifest is None or (out / PARTS).is_dir():
        raise UserError(f"The preparation of {out} is not finished: finish it before you remove its images.")
    if "images" not in manifest.fields:
        raise UserError(f"{out} stores no images, so there is nothing to remove.")
    if "moments" not in manifest.fields:
        raise UserError(
            f"The images of {out} cannot be removed: it stores no moments, so networks train on the images."
        )
    return manifest.config.override(store_images=False)


def _without(out: Path, config: PrepareConfig, name: str, part: str) -> PrepareConfig:
    """The configuration without the tokens of an encoder or of captions, also after a killed removal."""
    stored = ["images", *([TEXT] if config.text else []), *(f"features:{spec}" for spec in config.features)]
    is_encoder = name != part and part not in (BASE, TEXT)
    leftovers = (name == TEXT or is_encoder) and _numbered_files(out, "npy", *fields_of(part))
    if name not in stored and not leftovers:
        raise UserError(f"{out} has no {name!r} to remove{choices(name, stored)}")
    if name == TEXT:
        return config.override(text="", text_weights="", text_form="fp16")
    return config.override(
        features=[spec for spec in config.features if spec != part],
        feature_forms={spec: form for spec, form in config.feature_forms.items() if spec != part},
        feature_weights={spec: path for spec, path in config.feature_weights.items() if spec != part},
    )


def _numbered_files(folder: Path, ending: str, *names: str) -> list[Path]:
    """The files NAME-NUMBER.ENDING of fields or parts, also those that a killed removal left."""
    # not by a pattern such as tiny-*, which also matches files of tiny-classifier
    either = "|".join(re.escape(plain_name(name)) for name in names)
    return [path for path in folder.iterdir() if re.fullmatch(rf"(?:{either})-\d+\.{ending}", path.name)]
