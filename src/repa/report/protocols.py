"""How an evaluation's numbers were made, as something that can be compared, and what its distance is called."""

import json
import math
from collections.abc import Mapping
from typing import Any

# The settings that make a Fréchet distance: two numbers are compared only when all of these agree.
PROTOCOL = (
    "features", "judge_weights", "reference", "num_samples", "labels", "sampler", "steps", "nfe", "guidance", "decoder",
    "weak_sha256", "guide_image_sha256", "weights", "neighbours",
)  # fmt: skip
ADAPTIVE = ("dopri5",)  # samplers whose NFE is no setting: it differs from network to network
DISTANCE = "frechet_distance"  # in whatever features; called FID in Inception's
INCEPTION = "inception"
SAME = {"fid": DISTANCE, "fd": DISTANCE}

Protocol = tuple[tuple[str, str], ...]


def protocol_of(row: Mapping[str, Any]) -> Protocol:
    """The settings of an evaluation."""
    found = {key: row[key] for key in PROTOCOL if row.get(key) is not None}
    if str(found.get("sampler")).partition(":")[0] in ADAPTIVE:
        found.pop("nfe", None)
    if found.get("guidance") == []:
        found["guidance"] = "off"
    return tuple((key, json.dumps(value, sort_keys=True)) for key, value in found.items())


def settings_of(protocol: Protocol) -> dict[str, Any]:
    """The settings as plain values."""
    return {key: json.loads(value) for key, value in protocol}


def distance_name(protocol: Protocol) -> str:
    """FID is the Fréchet distance in features of Inception, and no other is."""
    return "FID" if settings_of(protocol).get("features") == INCEPTION else "Fréchet distance"


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics with its distance under one name; the features tell which it is."""
    return {SAME.get(key, key): value for key, value in row.items()}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
