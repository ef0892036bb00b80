"""What one alignment term is: which hidden state, which encoder, how projected, compared and weighted. Torch-free."""

from pydantic import Field, field_validator

from repa.alignment import PROJECTORS, SCHEDULES, SIMILARITIES, TOKEN_NORMS
from repa.base.config import Config
from repa.base.errors import UserError
from repa.encoders import ENCODERS


class AlignmentConfig(Config):
    """One alignment term of Eq. 9; a run has as many as it likes, each with its own projector and weight."""

    target: str
    """Encoder whose patch features are the target, e.g. "dinov2-b"; also the name of the cached feature field."""

    depth: int = Field(ge=1)
    """Block whose output is aligned, counted from 1 (the paper: 8 for the sizes L and XL; 4 for B)."""

    weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """Lambda of Eq. 9: how much this term counts beside the denoising loss."""

    schedule: str = "constant"
    """Multiplier of the weight over training: constant, stop:step=250000, linear:steps=400000, cosine:steps=400000."""

    similarity: str = "cosine"
    """How projected and target patches are compared: cosine, nt_xent:temperature=0.07."""

    projector: str = "mlp"
    """Map from the hidden state to the encoder's features: mlp:width=2048, linear, conv:kernel=3."""

    token_norm: str = "none"
    """Normalisation of the target's patches within an image: none, zscore:alpha=0.6."""

    measure_only: bool = False
    """Train the projector on detached hidden states: shows how aligned a baseline is, its network untouched."""

    @property
    def name(self) -> str:
        """Target and depth, as in "dinov2-b@8": names the term in logs and checkpoints."""
        return f"{self.target}@{self.depth}"

    @field_validator("target")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip():
            raise UserError("an alignment needs the name of an encoder, but was given an empty text.")
        return ENCODERS.check(value)

    @field_validator("similarity")
    @classmethod
    def _similarity(cls, value: str) -> str:
        return SIMILARITIES.check(value)

    @field_validator("projector")
    @classmethod
    def _projector(cls, value: str) -> str:
        return PROJECTORS.check(value)

    @field_validator("token_norm")
    @classmethod
    def _token_norm(cls, value: str) -> str:
        return TOKEN_NORMS.check(value)

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, value: str) -> str:
        SCHEDULES.build(SCHEDULES.check(value))(0)  # schedules are plain Python: an impossible value is found here
        return value
