"""The configuration of `repa prepare`, and the names of its parts and files."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from repa.autoencoders import AUTOENCODERS
from repa.base.config import Config
from repa.base.errors import UserError
from repa.base.registry import Spec
from repa.conditions import TEXT_ENCODERS
from repa.encoders import ENCODERS
from repa.encoders.loading import ByEncoder, LocalWeights

BASE, TEXT = "base", "text"
"""Names of two parts of a shard; the other parts have the names of their encoders. `--only` selects parts."""
FP16 = "fp16"  # stored form of tokens, unless `feature_forms` has another


class PrepareConfig(Config):
    """Settings of a preparation."""

    resolution: int = Field(ge=8)
    """Resolution of the square images in pixels (ADM's centre crop)."""
    autoencoder: Annotated[str, Spec(AUTOENCODERS)] = "pixels"
    """Autoencoder whose moments are stored; pixels stores none and trains on the images themselves."""
    autoencoder_weights: str = ""
    """Local folder of the autoencoder's weights; empty: the hub's."""
    features: tuple[Annotated[str, Spec(ENCODERS)], ...] = ()
    """Vision encoders whose tokens are stored, e.g. dinov2-b."""
    feature_weights: LocalWeights = Field({})
    """Local weights of encoders, written ENCODER=PATH, e.g. dinov2-b=weights/dinov2; others come from the hub."""
    feature_forms: ByEncoder = Field({})
    """Stored form of tokens: fp16, int8 (one scale per token), pcaK (K numbers per token) or pcaK-int8; ENCODER=FORM for one encoder."""
    text: Annotated[str, Spec(TEXT_ENCODERS, also=("",))] = ""
    """Text encoder whose tokens of every caption are stored, e.g. clip-l; empty: store only the captions."""
    text_weights: str = ""
    """Local folder of the text encoder's weights; empty: the hub's."""
    text_form: Literal["fp16", "int8"] = "fp16"
    """Stored form of text tokens: fp16, or int8 with one scale per token."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of autoencoder and encoders; bf16 and fp16 are less exact, but faster if the hardware supports them."""
    flip: bool = False
    """Store a second, mirrored copy of every image after the originals."""
    grid: int = Field(0, ge=0)
    """Side of the stored token grid; 0: each encoder's default for this resolution."""
    store_images: bool = True
    """Also store the uint8 images, which encoders during training, later additions of features, and metrics need."""
    shard_size: int = Field(4096, ge=1)
    """Images per shard."""

    batch_size: int = Field(64, ge=1)
    """Images per batch of the encoders, in each process."""
    skip_bad: bool = False
    """Skip images that cannot be read, and list them in the manifest, instead of refusing the source."""
    num_workers: int = Field(4, ge=0)
    """Worker processes that read, decode and crop images, per process; 0: no workers."""
    labels: str = ""
    """Origin of the classes; empty: the source's own; or none, folders, folders:2, folders:last, folders:path, names, tars,
    TABLE.csv:COLUMN."""

    @field_validator("autoencoder_weights", "text_weights")
    @classmethod
    def _absolute(cls, path: str) -> str:
        """Local weights with absolute paths, so that commands in other folders find them; names on the hub do not change."""
        return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().exists() else path

    @field_validator("feature_weights", "feature_forms")
    @classmethod
    def _only_features(cls, values: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        features = info.data.get("features", ())
        if other := [encoder for encoder in values if encoder and encoder not in features]:
            raise ValueError(
                f"{info.field_name} names {other[0]!r}, but features are "
                f"{', '.join(features) or 'none'}: name the same encoder in both"
            )
        return values

    @field_validator("feature_weights")
    @classmethod
    def _absolute_weights(cls, weights: dict[str, str]) -> dict[str, str]:
        return {encoder: cls._absolute(path) for encoder, path in weights.items()}

    @field_validator("feature_forms")
    @classmethod
    def _forms_of_features(cls, forms: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        """One spelling for equal settings, which are compared when an interrupted call continues: in the order of
        `features`, without fp16, and without a form for all encoders."""
        of_features = {name: forms.get(name, forms.get("", FP16)) for name in info.data.get("features", ())}
        for form in {*forms.values(), *of_features.values()}:
            split_format(form)
        return {name: form for name, form in of_features.items() if form != FP16}

    @model_validator(mode="after")
    def _files_differ(self) -> Self:
        # characters that are invalid in file names become "_", so that two specs may have the same name
        names = [array_name(part, 0) for part in (BASE, *self.features)]
        for spec, name in zip(self.features, names[1:], strict=True):
            if names.count(name) > 1:
                raise ValueError(
                    f"features has {spec!r} twice, or two names whose files are both {name}: leave one of them out"
                )
        return self


def plain_name(field: str) -> str:
    """'features.tiny:seed=1' -> 'features.tiny_seed_1': a file name that is valid on every system."""
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
