"""The configuration of `repa prepare`, and the names of the parts and files that it makes."""

import functools
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from repa.autoencoders import AUTOENCODERS
from repa.base.config import Config
from repa.base.errors import UserError
from repa.base.registry import Spec
from repa.conditions import TEXT_ENCODERS
from repa.encoders import ENCODERS, canonical
from repa.encoders.loading import LocalWeights

BASE, TEXT = "base", "text"
"""Names of two parts of a shard; the others are called as their encoders. `--only` chooses parts."""


class PrepareConfig(Config):
    """How images become shards."""

    resolution: int = Field(ge=8)
    """Side of the square images, in pixels: ADM's centre crop of every picture."""
    autoencoder: Annotated[str, Spec(AUTOENCODERS)] = "pixels"
    """Autoencoder whose moments are stored; pixels stores none and trains on the images themselves."""
    autoencoder_weights: str = ""
    """Local folder of the autoencoder's weights; empty takes the hub's."""
    features: tuple[Annotated[str, Spec(ENCODERS)], ...] = ()
    """Vision encoders whose tokens are stored, e.g. dinov2-b."""
    feature_weights: LocalWeights = ()
    """Local weights of encoders, written ENCODER=PATH, e.g. dinov2-b=weights/dinov2; the others come from the hub."""
    feature_forms: tuple[str, ...] = ()
    """How tokens are stored: fp16, int8 (a scale for each token), pcaK (K numbers a token) or pcaK-int8; ENCODER=FORM for one encoder."""
    text: Annotated[str, Spec(TEXT_ENCODERS, also=("",))] = ""
    """Text encoder whose tokens of every caption are stored, e.g. clip-l; empty stores the captions alone."""
    text_weights: str = ""
    """Local folder of the text encoder's weights; empty takes the hub's."""
    text_form: Literal["fp16", "int8"] = "fp16"
    """How tokens of captions are stored: fp16, or int8 with a scale for each token."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of autoencoder and encoders; bf16 and fp16 are faster where the hardware has them, and less exact."""
    flip: bool = False
    """Store a second, mirrored copy of every image after the originals."""
    grid: int = Field(0, ge=0)
    """Side of the stored token grid; 0 takes each encoder's own for this resolution."""
    store_images: bool = True
    """Store the uint8 images too: encoders that run while training, features added later and metrics need them."""
    shard_size: int = Field(4096, ge=1)
    """Images in a shard."""
    batch_size: int = Field(64, ge=1)
    """Images that are encoded at a time, in each process."""
    skip_bad: bool = False
    """Leave out images that cannot be read, and name them in the manifest, instead of refusing the source."""
    num_workers: int = Field(4, ge=0)
    """Processes that read, decode and crop images, for each process with a model; 0 does it in that process."""
    labels: str = ""
    """Where classes come from: empty for the source's own; none, folders, folders:2, folders:last, folders:path, tars, TABLE.csv:COLUMN."""

    @field_validator("autoencoder_weights", "text_weights")
    @classmethod
    def _absolute(cls, path: str) -> str:
        """Local weights by their absolute paths, so that other working folders find them; names on the hub stay."""
        return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().exists() else path

    @field_validator("feature_weights")
    @classmethod
    def _absolute_pairs(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        parts = [pair.rpartition("=") for pair in pairs]
        return tuple(f"{encoder}{equals}{cls._absolute(path)}" for encoder, equals, path in parts)

    @model_validator(mode="after")
    def _settings_of_encoders(self) -> Self:
        """Check what is given for single encoders; forms are written as one ENCODER=FORM for each that is not fp16."""
        forms = [text.rpartition("=") for text in self.feature_forms]
        named = {
            "feature_weights": [canonical(pair.rpartition("=")[0]) for pair in self.feature_weights],
            "feature_forms": [canonical(encoder) for encoder, _, _ in forms if encoder],
        }
        for setting, encoders in named.items():
            if other := [encoder for encoder in encoders if encoder not in self.features]:
                raise ValueError(
                    f"{setting} names {other[0]!r}, but the features asked for are "
                    f"{', '.join(self.features) or 'none'}: name the same encoder in both"
                )
        # one spelling for what is the same: configurations are compared when an interrupted call continues
        written = tuple(f"{name}={form}" for name, form in self.forms.items() if split_format(form) != (0, "fp16"))
        object.__setattr__(self, "feature_forms", written)  # frozen, and this is still its making
        return self

    @functools.cached_property
    def forms(self) -> dict[str, str]:
        """Encoder -> how its tokens are stored: fp16, int8, pcaK or pcaK-int8."""
        given: dict[str, str] = {}
        for encoder, _, form in (text.rpartition("=") for text in self.feature_forms):
            split_format(form)
            if not encoder and given.get("", form) != form:
                raise ValueError(
                    f"feature_forms {list(self.feature_forms)} are two for all encoders: write ENCODER=FORM"
                )
            given[canonical(encoder) if encoder else ""] = form
        return {name: given.get(name) or given.get("") or "fp16" for name in self.features}

    @model_validator(mode="after")
    def _files_differ(self) -> Self:
        # characters that a file name cannot hold become "_", so that two specs may meet in one name
        names = [array_name(part, 0) for part in (BASE, *self.features)]
        for spec, name in zip(self.features, names[1:], strict=True):
            if names.count(name) > 1:
                raise ValueError(
                    f"features name {spec!r} twice, or two whose files are both {name}: leave one of the two out"
                )
        return self


def plain_name(field: str) -> str:
    """'features.tiny:seed=1' -> 'features.tiny_seed_1': a file name that every system takes."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in field)


def array_name(field: str, shard: int) -> str:
    """'features.tiny:seed=1', 3 -> 'features.tiny_seed_1-00003.npy'."""
    return f"{plain_name(field)}-{shard:05d}.npy"


def split_format(form: str) -> tuple[int, str]:
    """'pca64-int8' -> (64, 'int8'): principal components (0 for none) and type. Raises UserError for any other text."""
    match = re.fullmatch(r"pca([1-9]\d*)(?:-(int8))?|(fp16|int8)", form)
    if match is None:
        raise UserError(f"Unknown token format {form!r}. Choose fp16, int8, pcaK or pcaK-int8, e.g. pca64.")
    return int(match[1] or 0), match[2] or match[3] or "fp16"
