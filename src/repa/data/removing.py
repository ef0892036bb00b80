"""Fields that are no longer wanted."""

import re
from pathlib import Path

from repa.base import lock
from repa.base.errors import UserError
from repa.data.finishing import forget
from repa.data.manifest import MANIFEST, PARTS, Manifest
from repa.data.progress import Settings, started
from repa.data.stored_files import TEXT, array_name, basis_name, fields_of, plain_name


def remove(out: str | Path, name: str) -> Manifest | None:
    """Delete a field of a folder, or the wish for it; nothing else changes.

    The manifest forgets the field before its files go, so a kill leaves a whole folder; the same call then deletes the
    rest. Runs that need the field can no longer use the folder.

    Args:
        out: a folder of `prepare`, finished or not.
        name: "features:ENCODER" (tokens, scales, pooled features, basis), "text" (tokens of captions, which stay themselves), or
            "images" where moments are stored.

    Returns:
        The new manifest; None while the folder is unfinished.

    Raises:
        UserError: no such field, or the one that everything else needs.
    """
    with lock.alone(Path(out), "repa prepare --remove"):
        return _remove(Path(out), name)


def _remove(out: Path, name: str) -> Manifest | None:
    before = started(out)
    if before is None:
        raise UserError(f"{out} holds no prepared data, so nothing can be removed from it.")
    manifest = Manifest.open(out) if (out / MANIFEST).is_file() else None
    spec = name.removeprefix("features:")
    if name == "images":
        config, gone = _without_images(out, manifest), ("images",)
    elif name == TEXT and (before.config.text or _files(out, *fields_of(TEXT))):
        config, gone = before.config.override(text="", text_weights="", text_form="fp16"), fields_of(TEXT)
    elif name.startswith("features:") and (spec in before.config.features or _files(out, *fields_of(spec))):
        config, gone = _without_features(before, spec), fields_of(spec)
    else:
        stored = ", ".join(
            [
                "images",
                *([TEXT] if before.config.text else []),
                *(f"features:{spec}" for spec in before.config.features),
            ]
        )
        raise UserError(f"{out} has no {name!r} to remove: allowed are {stored}.")
    if manifest:
        shards = [
            shard.override(
                files={field: file for field, file in shard.files.items() if field not in gone},
                text={} if name == TEXT else shard.text,
            )
            for shard in manifest.shards
        ]
        features = {other: facts for other, facts in manifest.features.items() if f"features.{other}" not in gone}
        text = None if name == TEXT else manifest.text
        manifest = manifest.override(config=config, features=features, text=text, shards=shards)
        manifest.save(out)
    if (out / PARTS).is_dir():
        before.override(config=config).save(out)
        for path in (out / PARTS).glob(f"{array_name(spec, 0).removesuffix('00000.npy')}*.json"):
            path.unlink()
    for path in _files(out, *gone):
        path.unlink()
    if name.startswith("features:"):
        (out / basis_name(spec)).unlink(missing_ok=True)
    if manifest and set(config.features) <= set(manifest.features):  # nothing is wanted any more
        forget(out)
    return manifest


def _without_images(out: Path, manifest: Manifest | None):
    if manifest is None or (out / PARTS).is_dir():
        raise UserError(f"The preparation of {out} is not finished: finish it before its images are removed.")
    if "images" not in manifest.fields:
        raise UserError(f"{out} holds no images.")
    if "moments" not in manifest.fields:
        raise UserError(f"{out} holds no moments, so a network trains on its images: they cannot be removed.")
    return manifest.config.override(store_images=False)


def _without_features(before: Settings, spec: str):
    config = before.config
    others = tuple(other for other in config.features if other != spec)
    return config.override(
        features=others,
        feature_forms=tuple(f"{other}={config.form_of(other)}" for other in others),
        feature_weights=tuple(f"{o}={path}" for o in others if (path := config.weights_of(o))),
    )


def _files(out: Path, *fields: str):
    """The shards' files of fields, whether a manifest names them or not."""
    names = "|".join(re.escape(plain_name(field)) for field in fields)
    return [path for path in out.glob("*.npy") if re.fullmatch(rf"(?:{names})-\d+\.npy", path.name)]
