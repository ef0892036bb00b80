"""What `repa prepare` makes of a source of images."""

from pydantic import Field, field_validator, model_validator

from repa.autoencoders import AUTOENCODERS
from repa.base.config import Config
from repa.encoders import ENCODERS, canonical
from repa.encoders.loading import check_pairs, weights_for


class PrepareConfig(Config):
    """How images become shards."""

    resolution: int = Field(ge=8)
    """Side of the square images, in pixels: ADM's centre crop of every picture."""
    autoencoder: str = "pixels"
    """Autoencoder whose moments are stored; pixels stores none and trains on the images themselves."""
    autoencoder_weights: str = ""
    """Local folder of the autoencoder's weights; empty takes the hub's."""
    features: tuple[str, ...] = ()
    """Vision encoders whose tokens are stored, e.g. dinov2-b."""
    feature_weights: tuple[str, ...] = ()
    """Local weights of encoders, written ENCODER=PATH, e.g. dinov2-b=weights/dinov2; the others come from the hub."""
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
    num_workers: int = Field(4, ge=1)
    """Threads that read and decode images, in each process."""

    @field_validator("autoencoder")
    @classmethod
    def _known_autoencoder(cls, spec: str) -> str:
        return AUTOENCODERS.check(spec)

    @field_validator("features")
    @classmethod
    def _known_encoders(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        specs = tuple(ENCODERS.check(spec) for spec in specs)
        for spec in specs:
            if specs.count(spec) > 1:
                raise ValueError(f"features name {spec!r} twice: name each encoder once")
        return specs

    @model_validator(mode="after")
    def _weights_belong(self):
        check_pairs(self.feature_weights)
        for encoder, _, _ in (pair.rpartition("=") for pair in self.feature_weights):
            if canonical(encoder) not in self.features:
                raise ValueError(
                    f"feature_weights names {encoder!r}, but the features asked for are "
                    f"{', '.join(self.features) or 'none'}: name the same encoder in both"
                )
        return self

    def weights_of(self, encoder: str) -> str | None:
        """The local folder or file given for an encoder, or None."""
        return weights_for(encoder, self.feature_weights)
