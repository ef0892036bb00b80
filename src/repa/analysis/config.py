"""What to ask of a run's hidden states."""

from pydantic import Field, field_validator

from repa.base.config import Config


class AnalyseConfig(Config):
    """Which hidden states, of how many images, at which noise levels."""

    depths: tuple[int, ...] = ()
    """Blocks, counted from 1; empty takes all."""
    times: tuple[float, ...] = (0.5,)
    """Noise levels t in [0, 1]; 0 is data."""
    num: int = Field(10_000, ge=20)
    """Images, evenly spaced over the data; the paper takes 10,000."""
    batch_size: int = Field(64, ge=1)
    """Images at a time."""
    seed: int = 0
    """Seed of the noise, and of the split for the probe."""
    encoder: str = "tiny"
    """CKNNA: the encoder whose pooled features the hidden states are compared with."""
    encoder_weights: str = ""
    """Local folder of that encoder's weights; empty takes the hub's or the package's."""
    neighbours: int = Field(10, ge=2)
    """CKNNA: k."""
    variant: str = "paper"
    """CKNNA: paper (the printed formula) or platonic (the code that most people run)."""
    epochs: int = Field(90, ge=1)
    """Probe: epochs."""

    @field_validator("times")
    @classmethod
    def _in_range(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if not times or not all(0 <= t <= 1 for t in times):
            raise ValueError(f"times {list(times)} must be at least one number between 0 (data) and 1 (noise)")
        return times

    @field_validator("variant")
    @classmethod
    def _known(cls, variant: str) -> str:
        if variant not in ("paper", "platonic"):
            raise ValueError(f"variant {variant!r} must be paper or platonic")
        return variant
