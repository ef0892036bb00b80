"""Local weights that `prepare` was given, used again by whoever works with its folder.

A folder may come from anyone: a path in it is followed only where the checksum of what lies there is the recorded one, and all
that is read there are safetensors, or tensors without code.
"""

from pathlib import Path

import torch

from repa.base.errors import UserError
from repa.data.config import PrepareConfig
from repa.data.dataset import DataSet
from repa.encoders import canonical, load_encoder
from repa.encoders.contract import VisionEncoder


def with_absolute_paths(config: PrepareConfig) -> PrepareConfig:
    """Local weights by their absolute paths, so that other working folders find them; names on the hub stay."""
    return config.override(
        autoencoder_weights=_absolute(config.autoencoder_weights),
        text_weights=_absolute(config.text_weights),
        feature_weights=tuple(
            f"{encoder}={_absolute(path)}" for encoder, _, path in (p.rpartition("=") for p in config.feature_weights)
        ),
    )


def autoencoder_weights(data: DataSet, given: str) -> str:
    """What was given, else what `prepare` was given and still lies there; "" takes the hub's."""
    recorded = data.manifest.config.autoencoder_weights
    return given or (recorded if data.manifest.autoencoder.get("sha256") and Path(recorded).exists() else "")


def feature_weights(data: DataSet, given: tuple[str, ...], encoders: list[str]) -> tuple[str, ...]:
    """Pairs ENCODER=PATH: those given, then those that `prepare` was given, of `encoders` whose weights still lie there."""
    named = {canonical(pair.rpartition("=")[0]) for pair in given}
    found = {spec: encoder_weights(data, spec) for spec in encoders if canonical(spec) not in named}
    return (*given, *(f"{spec}={path}" for spec, path in found.items() if path))


def encoder_weights(data: DataSet, spec: str) -> str | None:
    """Where the weights lie that an encoder's stored features were made by, or None."""
    recorded = data.manifest.config.weights_of(spec)
    return recorded if recorded and _checksum(data, spec) and Path(recorded).exists() else None


def load_encoder_of(
    data: DataSet, spec: str, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> VisionEncoder:
    """As `load_encoder`; without `weights`, those that `prepare` was given, which must still be the same."""
    if weights:
        return load_encoder(spec, weights=weights, device=device)
    encoder = load_encoder(spec, weights=encoder_weights(data, spec), device=device)
    if encoder_weights(data, spec):
        require_same_encoder(data, spec, encoder)
    return encoder


def require_same_encoder(data: DataSet, spec: str, encoder: VisionEncoder) -> None:
    """UserError when the data's stored features are by other weights of this encoder."""
    recorded = _checksum(data, spec)
    if recorded and encoder.identity.get("weights_sha256") != recorded:
        raise UserError(
            f"The features of {spec} in {data.folder} were made by weights with the checksum {str(recorded)[:12]}, but "
            f"{encoder.weights_file} has {str(encoder.identity.get('weights_sha256'))[:12]}: give the same weights as "
            f"--feature-weights {spec}=PATH."
        )


def _checksum(data: DataSet, spec: str) -> str | None:
    facts = data.features.get(canonical(spec))
    return facts.identity.get("weights_sha256") if facts else None


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().exists() else path
