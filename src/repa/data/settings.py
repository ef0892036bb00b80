"""What a folder is being prepared from and how, and whether that is what is asked now. Free of torch."""

from pathlib import Path
from typing import Any

from repa.base import files
from repa.base.config import Config, difference
from repa.base.errors import UserError
from repa.data.config import PrepareConfig
from repa.data.manifest import MANIFEST, PARTS, SETTINGS, Inventory, Manifest

FREE = (
    "batch_size",
    "num_workers",
    "skip_bad",
    "labels",
    "autoencoder_weights",
    "feature_weights",
    "text_weights",
)  # may change: weights are compared by checksum, labels by the source's

READABLE = 100  # characters: of longer differences (a thousand class names) only the field is named


class Settings(Config):
    """What a folder is being prepared from and how: parts/settings.json."""

    source: dict[str, Any]
    """Identity of the source."""
    class_names: tuple[str, ...]
    """Its classes."""
    config: PrepareConfig
    """How it is prepared."""
    inventory: Inventory = Inventory()
    """What was found in the source; of no consequence to the work."""


def agree(out: Path, asked: Settings) -> Settings:
    """What to prepare in `out`: what is asked, plus encoders that were asked for before.

    Refuses a folder that holds other things, or data of another source or configuration.
    """
    before = started(out)
    if before is None:
        return asked
    old, new = before.config, asked.config
    both = [name for name in new.features if name in old.features]
    lines = [
        f"config.feature_forms of {name}: {old.form_of(name)} -> {new.form_of(name)}"
        for name in both
        if old.form_of(name) != new.form_of(name)
    ]
    forms = [f"{name}={old.form_of(name)}" for name in old.features]
    forms += [f"{name}={new.form_of(name)}" for name in new.features if name not in both]
    if old.text and not new.text:
        new = new.override(text=old.text, text_form=old.text_form, text_weights=new.text_weights or old.text_weights)
    new = new.override(features=tuple(dict.fromkeys([*old.features, *new.features])), feature_forms=tuple(forms))
    added = () if old.text else ("text", "text_form")
    same = {name: getattr(new, name) for name in (*FREE, *added, "features", "feature_forms")}
    asked = Settings(source=asked.source, class_names=asked.class_names, config=new, inventory=asked.inventory)
    was = Settings(
        source=before.source, class_names=before.class_names, config=old.override(**same), inventory=asked.inventory
    )
    lines += [line if len(line) <= READABLE else f"other {line.partition(':')[0]}" for line in difference(was, asked)]
    if lines:
        raise UserError(
            f"{out} holds data of another source or configuration ({'; '.join(lines[:5])}): "
            "choose another folder, or give the settings it was started with."
        )
    return asked


def started(out: Path) -> Settings | None:
    """What `out` was started with; None when it is new."""
    settings = out / PARTS / SETTINGS
    if (values := read_record(settings)) is not None:
        return Settings.parse(values, where=str(settings))
    if (out / MANIFEST).is_file():
        manifest = Manifest.open(out)
        return Settings(
            source=manifest.source,
            class_names=manifest.class_names,
            config=manifest.config,
            inventory=manifest.inventory,
        )
    if out.exists() and not (out.is_dir() and all(path.name.lstrip(".").startswith(PARTS) for path in out.iterdir())):
        raise UserError(f"{out} is not an empty folder and holds no prepared data: choose another one.")
    return None


def read_record(path: Path) -> Any:
    """A file of parts/; None when it is not there, or another process has just finished and removed it."""
    try:
        return files.read_json(path) if path.is_file() else None
    except UserError:
        if path.is_file():
            raise
        return None
