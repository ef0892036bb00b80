"""Run folders read back as plain values: configuration, data, metrics, and what `repa evaluate` found.

How an evaluation was made is a `Protocol`; two distances are compared only where theirs agree.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from repa.base.errors import UserError, printable
from repa.base.files import read_json, read_object, well_formed
from repa.evaluation.config import INCEPTION
from repa.runs import layout
from repa.runs.checkpoint import recorded_settings
from repa.runs.log import lost_rows, read_metrics

# The settings that make a Fréchet distance: two numbers are compared only when all of these agree.
PROTOCOL = (
    "features", "feature_weights", "features_precision", "reference", "reference_sha256", "num_samples", "labels",
    "sampler", "steps", "nfe", "guidance", "decoder", "weak_sha256", "guide_image_sha256", "weights",
    "neighbours",
)  # fmt: skip
ADAPTIVE = ("dopri5",)  # samplers whose NFE is not a setting: it differs from network to network
DISTANCE = "frechet_distance"  # in whatever features; called FID in Inception's
DISTANCE_KEYS = {"fid": DISTANCE, "fd": DISTANCE}
# of a results file: part -> key -> type; "" is the file itself
FIELD_TYPES: dict[str, dict[str, type]] = {
    "": {
        "alignment": dict,
        "made": dict,
        "encoder": dict,
        "arithmetic": dict,
        "num_samples": int,
        "reference_sha256": str,
    },
    "data": {"num_images": int, "class_names": list, "class_counts": list},
    "made": {"weak_sha256": str, "guide_image_sha256": str, "run": str},
}
OTHER_WEIGHTS = "inception with weights that are not the published ones"

Protocol = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RunRecord:
    """Everything the report needs to know of one run; pictures stay on disk until they are drawn."""

    path: Path
    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]  # by step; of repeated evaluations (same step and protocol) the last
    events: list[dict[str, Any]]
    lost: str = ""  # a sentence when rows of its metrics are gone

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def batch_size(self) -> int | None:
        """Images of a step."""
        return self.config.get("batch_size") if is_number(self.config.get("batch_size")) else None

    @property
    def alignments(self) -> list[dict[str, Any]]:
        """The alignment settings that reached the network: not those of weight 0 or those that only measure."""
        items = self.config.get("alignments") or []
        return [item for item in items if item.get("weight") != 0 and not item.get("measure_only")]

    @property
    def is_aligned(self) -> bool:
        return bool(self.alignments)

    @property
    def steps(self) -> int:
        """The last step that left a row (0 when none did)."""
        return max((row["step"] for row in [*self.train, *self.evals]), default=0)

    def images_at(self, step: int) -> dict[str, int]:
        """{"images": how many were seen by a step}, with repetitions; empty where the batch size is not known."""
        return {} if self.batch_size is None else {"images": step * self.batch_size}

    @cached_property
    def seconds_at(self) -> dict[int, float]:
        """Training time at every step that left a row."""
        rows = [*self.evals, *self.train]
        return {row["step"]: row["seconds"] for row in rows if is_number(row.get("seconds"))}

    @cached_property
    def alignment_names(self) -> list[str]:
        """The alignments that were measured, e.g. 'dinov2-b@8', trained on or not."""
        return list(dict.fromkeys(name for row in self.train for name in row.get("alignment") or {}))

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(positions, values) of one quantity over the training rows; 'alignment/NAME' is the negative of its loss.

        Rows without the quantity, or where it is not finite, are left out.
        """
        group, _, name = key.partition("/")
        values = [(row.get(group) or {}).get(name) if name else row.get(group) for row in self.train]
        sign = -1.0 if group == "alignment" else 1.0
        logged = [(row.get(against), value) for row, value in zip(self.train, values, strict=True)]
        pairs = [(x, sign * value) for x, value in logged if is_number(x) and is_number(value)]
        return [x for x, _ in pairs], [value for _, value in pairs]

    def distances(self, protocol: Protocol | None) -> list[dict[str, Any]]:
        """The evaluations with a finite Fréchet distance made by `protocol`, by step; none for None."""
        return [row for row in self.evals if is_number(row.get(DISTANCE)) and protocol_of(row) == protocol]

    @property
    def protocols(self) -> list[Protocol]:
        """The ways this run's Fréchet distances were made: the one of most evaluations first, of equals the latest."""
        found = Counter(protocol_of(row) for row in reversed(self.evals) if is_number(row.get(DISTANCE)))
        return [protocol for protocol, _ in found.most_common()]


def read_run(path: str | Path, name: str | None = None) -> RunRecord:
    """Read a run folder. Raises UserError, naming the folder or the file, when it is none or damaged.

    Args:
        path: what `repa train --out` wrote; metrics, data.json and previews may be missing, the configuration may not.
        name: how the report calls it; the folder's name when None.
    """
    path = Path(path)
    config = layout.read_config(path)
    steps = layout.checkpoint_steps(path)
    if steps:
        layout.require_settings(path, steps[-1], recorded_settings(path, steps[-1]), config)
    data = read_object(path / layout.DATA) if (path / layout.DATA).is_file() else {}
    _require_types(path / layout.DATA, "data", data, "Restore it from a copy.")
    # Read after the checkpoints are listed: training writes a row first.
    rows = list(read_metrics(path))
    kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("train", "eval", "event")}
    events = [row for row in kinds["event"] if isinstance(row.get("message"), str)]
    lost = lost_rows(path, rows, steps)
    run = RunRecord(path, name or path.resolve().name, config, data, [], [], events, lost)
    # The number of images at a step follows from the configuration, which the record reads.
    train, evals = [[{**row, **run.images_at(row["step"])} for row in kinds[kind]] for kind in ("train", "eval")]
    for row in (*train, *evals):
        _require_types(path / layout.METRICS, "", row, "Remove that line.")
    return replace(run, train=train, evals=merged_by_step(map(_preview_row, evals)))


def with_evaluations(run: RunRecord, rows: Sequence[dict[str, Any]]) -> RunRecord:
    """The run with the rows of results files in addition to those of its metrics."""
    timed = [{**row, "seconds": run.seconds_at.get(row["step"]), **run.images_at(row["step"])} for row in rows]
    return replace(run, evals=merged_by_step([*run.evals, *timed]))


def merged_by_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By step; of repeated evaluations (same step and protocol) the last, with what only earlier ones measured."""
    latest: dict[tuple[int, Protocol], dict[str, Any]] = {}
    for row in rows:
        key = row["step"], protocol_of(row)
        latest[key] = {**latest.get(key, {}), **{name: value for name, value in row.items() if value is not None}}
    return sorted(latest.values(), key=lambda row: row["step"])


def read_runs(runs: Sequence[str | Path | RunRecord], names: Sequence[str] | None = None) -> list[RunRecord]:
    """Read several run folders (records pass through) under names that differ."""
    if not runs:
        raise UserError("A report needs at least one run folder.")
    if names is not None and len(names) != len(runs):
        raise UserError(
            f"--names has {len(names)} names for {len(runs)} runs: give one name per run, in the same order."
        )
    named = names or _short_names([run.path if isinstance(run, RunRecord) else run for run in runs])
    called = [printable(well_formed(name)) for name in named]  # fonts refuse what is not UTF-8
    records = [
        run if isinstance(run, RunRecord) else read_run(run, name) for run, name in zip(runs, called, strict=True)
    ]
    repeated = next((r.name for i, r in enumerate(records) if r.name in {other.name for other in records[:i]}), None)
    if repeated is not None:
        raise UserError(f"Two runs have the name {repeated!r}: give each a unique name with --names.")
    return records


def common_protocol(records: Sequence[RunRecord]) -> Protocol | None:
    """The way of measuring that most runs share, of equals the one of most evaluations: what stands in one column."""
    found = dict.fromkeys(protocol for run in records for protocol in run.protocols)
    shared = {p: [len(run.distances(p)) for run in records if p in run.protocols] for p in found}
    return max(found, key=lambda protocol: (len(shared[protocol]), sum(shared[protocol])), default=None)


def _short_names(runs: Sequence[str | Path]) -> list[str]:
    """The folders' names, with as many parents before them as tell them apart."""
    parts = [Path(run).resolve().parts for run in runs]
    most = max(map(len, parts))
    # A folder given twice is told apart by nothing: `read_runs` refuses the name.
    length = next((n for n in range(1, most + 1) if len({path[-n:] for path in parts}) == len(parts)), 1)
    return ["/".join(path[-length:]) for path in parts]


class OtherSamples(NamedTuple):
    """An evaluation of samples that are of none of the runs: published ones, or of a run that is not in the report."""

    name: str
    row: dict[str, Any]


def add_evaluations(
    records: Sequence[RunRecord], results: Sequence[str | Path] = ()
) -> tuple[list[RunRecord], list[OtherSamples]]:
    """The runs with the evaluations in their folders and in the files given, and what those files hold of other samples.

    Raises:
        UserError: a file is damaged or no results; one in a run's folder does not say which step it is of.
    """
    known = {run.path.resolve(): run for run in records}
    found: dict[Path, list[dict[str, Any]]] = {path: [] for path in known}
    others = []
    for run in records:
        for file in sorted((run.path / layout.EVALUATIONS).glob("*.json")):
            row = evaluation_row(file)
            if row["step"] is None:
                raise UserError(
                    f"{file} does not name the checkpoint of its samples: move it out of {layout.EVALUATIONS}, "
                    "and give it as --results."
                )
            found[run.path.resolve()].append(_with_decoder(row, run))
    for file in map(Path, results):
        row = evaluation_row(file)
        folder = Path(row["run"]).resolve() if row["run"] else None
        if folder in known and row["step"] is not None:
            found[folder].append(_with_decoder(row, known[folder]))
        else:
            name = folder.name if folder else Path(row["samples"]).name
            others.append(OtherSamples(name, row))
    return [with_evaluations(run, found[run.path.resolve()]) for run in records], others


def evaluation_row(file: Path) -> dict[str, Any]:
    """A results file as a row of metrics: its figures, the step, and how they were made; `step` and `run` may be None."""
    results = read_json(file)
    metrics = results.get("metrics") if isinstance(results, dict) else None
    if not isinstance(metrics, dict) or "features" not in results:
        raise UserError(
            f"{file} holds no results of `repa evaluate`: it has no metrics, or not whose features they are in."
        )
    for part in FIELD_TYPES:
        _require_types(file, part, results.get(part) if part else results, "Make it again by `repa evaluate`.")
    made = results.get("made") or {}
    arithmetic = (results.get("arithmetic") or {}).get("neighbours")
    return {
        "kind": "eval",
        "step": made.get("step") if isinstance(made.get("step"), int) else None,
        **renamed(metrics),
        **_extractor_settings(results["features"], results.get("encoder") or {}),
        "reference": Path(str(results.get("reference"))).name,
        "reference_sha256": results.get("reference_sha256"),
        "num_samples": results.get("num_samples"),
        **{
            key: made.get(key)
            for key in ("labels", "sampler", "steps", "nfe", "guidance", "weak_sha256", "guide_image_sha256", "weights")
        },
        "decoder": made.get("decoder") or made.get("autoencoder"),
        "neighbours": None if arithmetic == "float32" else arithmetic,
        "file": file.name,
        "run": made.get("run"),
        "samples": str(results.get("samples")),
    }


def _require_types(file: Path, part: str, given: Any, remedy: str) -> None:
    """A file may come from anyone: a number where text is expected would end the report in the middle of its page."""
    for key, kind in FIELD_TYPES[part].items():
        if isinstance(given, dict) and not isinstance(given.get(key), kind | None):
            raise UserError(f"{file} is damaged: {f'{part}.{key}' if part else key} is {given[key]!r:.60}. {remedy}")


def _extractor_settings(features: Any, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a feature: the network, its weights and its arithmetic. None stands for the usual: published, float32."""
    published = identity.get("published")
    return {
        "features": OTHER_WEIGHTS if features == INCEPTION and published is False else features,
        "feature_weights": None if published else str(identity.get("weights_sha256") or "")[:8] or None,
        "features_precision": identity.get("precision"),
    }


def _with_decoder(row: dict[str, Any], run: RunRecord) -> dict[str, Any]:
    """Samples whose file names no decoder were decoded by the run's own autoencoder."""
    return {**row, "decoder": row["decoder"] or run.config.get("autoencoder") or None}


def protocol_of(row: Mapping[str, Any]) -> Protocol:
    """The settings of an evaluation."""
    found = {key: row[key] for key in PROTOCOL if row.get(key) is not None}
    # The number of evaluations of an adaptive sampler is a result and not a setting: with it no two networks would compare.
    if str(found.get("sampler")).partition(":")[0] in ADAPTIVE:
        found.pop("nfe", None)
    if found.get("guidance") == []:
        found["guidance"] = "off"
    # As JSON, because a protocol is the key of dictionaries and guidance is a list.
    return tuple((key, json.dumps(value, sort_keys=True)) for key, value in found.items())


def settings_of(protocol: Protocol) -> dict[str, Any]:
    """The settings as plain values."""
    return {key: json.loads(value) for key, value in protocol}


def distance_name(protocol: Protocol) -> str:
    """FID is the Fréchet distance in features of Inception, and no other is."""
    return "FID" if settings_of(protocol).get("features") == INCEPTION else "Fréchet distance"


def _preview_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of kind "eval" in metrics.jsonl, with its feature extractor as in a results file."""
    found = renamed(row)
    if isinstance(identity := found.pop("encoder", None), dict):
        found |= _extractor_settings(found.get("features"), identity)
    return found


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics with its distance under one name; the features tell which it is."""
    return {DISTANCE_KEYS.get(key, key): value for key, value in row.items()}


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
