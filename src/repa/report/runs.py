"""Run folders as plain values: configuration, data, metrics, and results of `repa evaluate`.

The settings of an evaluation are its protocol; two distances are compared only if their protocols are equal.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from repa.base.errors import UserError, printable
from repa.base.faults import sentence_of
from repa.base.files import read_json, well_formed
from repa.evaluation.config import INCEPTION
from repa.runs import layout
from repa.runs.checkpoint import recorded_settings, weights_checksum
from repa.runs.log import lost_rows, read_metrics

# The settings that determine a Fréchet distance: two numbers are compared only if all of them agree.
PROTOCOL = (
    "features", "feature_weights", "features_precision", "reference", "reference_sha256", "num_samples", "labels",
    "sampler", "steps", "nfe", "guidance", "decoder", "weak_sha256", "guide_image_sha256", "weights",
    "neighbours",
)  # fmt: skip
ADAPTIVE = ("dopri5",)  # samplers whose NFE is not a setting: it differs from network to network
CHECKSUM = "weights_sha256"  # of the evaluated weights
DISTANCE = "frechet_distance"  # in any features; FID in Inception's
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
    "made": {"weak_sha256": str, "guide_image_sha256": str, "run": str, "weights": str, "weights_sha256": str},
}
MOST_NAMES = 100  # of the alignments of a run, because drawing a curve takes time
OTHER_WEIGHTS = "inception with weights that are not the published ones"

Protocol = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RunRecord:
    """All values of one run for the report; pictures stay on disk until they are needed."""

    path: Path
    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]  # by step; the last of repeated evaluations (same step and protocol)
    events: list[dict[str, Any]]
    lost: str = ""  # sentences about missing log entries and evaluations of other weights

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def batch_size(self) -> int | None:
        """Number of images per step."""
        return self.config.get("batch_size") if is_number(self.config.get("batch_size")) else None

    @property
    def alignments(self) -> list[dict[str, Any]]:
        """The alignments that affect the network: without those of weight 0 and those that only measure."""
        items = self.config.get("alignments") or []
        return [item for item in items if item.get("weight") != 0 and not item.get("measure_only")]

    @property
    def is_aligned(self) -> bool:
        return bool(self.alignments)

    @property
    def steps(self) -> int:
        """The last logged step, or 0."""
        return max((row["step"] for row in [*self.train, *self.evals]), default=0)

    def images_at(self, step: int) -> dict[str, int]:
        """{"images": number of images up to a step}, with repetitions; empty if the batch size is not known."""
        return {} if self.batch_size is None else {"images": step * self.batch_size}

    @cached_property
    def seconds_at(self) -> dict[int, float]:
        """Training time at every logged step."""
        rows = [*self.evals, *self.train]
        return {row["step"]: row["seconds"] for row in rows if is_number(row.get("seconds"))}

    @cached_property
    def alignment_names(self) -> list[str]:
        """The logged alignments, e.g. 'dinov2-b@8', whether trained or only measured; at most MOST_NAMES."""
        return list(dict.fromkeys(name for row in self.train for name in row.get("alignment") or {}))[:MOST_NAMES]

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(positions, values) of one quantity over the log entries; 'alignment/NAME' is the negative of its loss.

        Entries without the quantity, or with a value that is not finite, are left out.
        """
        group, _, name = key.partition("/")
        values = [(row.get(group) or {}).get(name) if name else row.get(group) for row in self.train]
        sign = -1.0 if group == "alignment" else 1.0
        logged = [(row.get(against), value) for row, value in zip(self.train, values, strict=True)]
        pairs = [(x, sign * value) for x, value in logged if is_number(x) and is_number(value)]
        return [x for x, _ in pairs], [value for _, value in pairs]

    def distances(self, protocol: Protocol | None) -> list[dict[str, Any]]:
        """The evaluations with this protocol and a finite Fréchet distance, by step; empty for None."""
        return [row for row in self.evals if is_number(row.get(DISTANCE)) and protocol_of(row) == protocol]

    @property
    def protocols(self) -> list[Protocol]:
        """The protocols of this run's Fréchet distances: the one with the most evaluations first, in a tie the latest."""
        found = Counter(protocol_of(row) for row in reversed(self.evals) if is_number(row.get(DISTANCE)))
        return [protocol for protocol, _ in found.most_common()]


def read_run(path: str | Path, name: str | None = None) -> RunRecord:
    """Read a run folder. Raises UserError with the name of the folder or file if it is not a run or is damaged.

    Args:
        path: folder of `repa train --out`; metrics, data.json and previews are optional, the configuration is not.
        name: name of the run in the report; None: the name of the folder.
    """
    path = Path(path)
    config = layout.read_config(path)
    steps = layout.checkpoint_steps(path)
    recorded, damage = None, ""
    if steps:
        try:
            recorded = recorded_settings(path, steps[-1])
        except UserError as error:
            damage = f"{error} The settings were not compared with those of this checkpoint."
        layout.require_settings(path, steps[-1], recorded, config)
    data = layout.read_data(path)
    # Read after listing the checkpoints, because training writes a log entry before its checkpoint.
    rows = list(read_metrics(path))
    kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("train", "eval", "event")}
    events = [row for row in kinds["event"] if isinstance(row.get("message"), str)]
    lost = f"{damage} {lost_rows(path, rows, steps)}".strip()
    run = RunRecord(path, name or path.resolve().name, config, data, [], [], events, lost)
    # The number of images per step comes from the configuration, which the record reads.
    train, evals = [[_readable(row) | run.images_at(row["step"]) for row in kinds[kind]] for kind in ("train", "eval")]
    for row in (*train, *evals):
        _require_types(path / layout.METRICS, "", row, "Remove that line.")
    return replace(run, train=train, evals=merged_by_step(map(_preview_row, evals)))


def with_evaluations(run: RunRecord, rows: Sequence[dict[str, Any]]) -> RunRecord:
    """The run with the evaluations of results files in addition to those of its log."""
    timed = [{**row, "seconds": run.seconds_at.get(row["step"]), **run.images_at(row["step"])} for row in rows]
    return replace(run, evals=merged_by_step([*run.evals, *timed]))


def merged_by_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By step; the last of repeated evaluations (same step and protocol), with metrics that only earlier ones have."""
    latest: dict[tuple[int, Protocol], dict[str, Any]] = {}
    for row in rows:
        key = row["step"], protocol_of(row)
        latest[key] = {**latest.get(key, {}), **{name: value for name, value in row.items() if value is not None}}
    return sorted(latest.values(), key=lambda row: row["step"])


def read_runs(runs: Sequence[str | Path | RunRecord], names: Sequence[str] | None = None) -> list[RunRecord]:
    """Read several run folders (records are returned unchanged), with unique names."""
    if not runs:
        raise UserError("A report needs at least one run folder.")
    if names is not None and len(names) != len(runs):
        raise UserError(
            f"--names has {len(names)} names for {len(runs)} runs: give one name per run, in the same order."
        )
    named = names or _short_names([run.path if isinstance(run, RunRecord) else run for run in runs])
    called = [_shown(name) for name in named]
    records = [
        run if isinstance(run, RunRecord) else read_run(run, name) for run, name in zip(runs, called, strict=True)
    ]
    repeated = next((r.name for i, r in enumerate(records) if r.name in {other.name for other in records[:i]}), None)
    if repeated is not None:
        raise UserError(f"Two runs have the name {repeated!r}: give each a unique name with --names.")
    return records


def common_protocol(records: Sequence[RunRecord]) -> Protocol | None:
    """The protocol that most runs share, in a tie the one with the most evaluations; it defines the shared column."""
    found = dict.fromkeys(protocol for run in records for protocol in run.protocols)
    shared = {p: [len(run.distances(p)) for run in records if p in run.protocols] for p in found}
    return max(found, key=lambda protocol: (len(shared[protocol]), sum(shared[protocol])), default=None)


def _short_names(runs: Sequence[str | Path]) -> list[str]:
    """The names of the folders, with as many parents as needed to make them unique."""
    parts = [Path(run).resolve().parts for run in runs]
    most = max(map(len, parts))
    # A folder that is given twice has no unique name: `read_runs` refuses it.
    length = next((n for n in range(1, most + 1) if len({path[-n:] for path in parts}) == len(parts)), 1)
    return ["/".join(path[-length:]) for path in parts]


class OtherSamples(NamedTuple):
    """An evaluation of samples from none of the runs: published ones, or from a run that is not in the report."""

    name: str
    row: dict[str, Any]


def add_evaluations(
    records: Sequence[RunRecord], results: Sequence[str | Path] = ()
) -> tuple[list[RunRecord], list[OtherSamples]]:
    """The runs with the evaluations from their folders and the given files, and the files' evaluations of other samples.

    Raises:
        UserError: a file is damaged or has no results, or a file in a run's folder does not record its step.
    """
    known = {run.path.resolve(): run for run in records}
    found: dict[Path, list[dict[str, Any]]] = {path: [] for path in known}
    others, noted = [], []
    for run in records:
        listed, why_not = _files_of_evaluations(run.path)
        noted.append(replace(run, lost=f"{run.lost} {why_not}".strip()))
        for file in listed:
            row = evaluation_row(file)
            if row["step"] is None:
                raise UserError(
                    f"{file} does not name the checkpoint of its samples: move it out of {layout.EVALUATIONS}, "
                    "and give it as --results."
                )
            found[run.path.resolve()].append(row)
    for file in map(Path, results):
        row = evaluation_row(file)
        folder = Path(row["run"]).resolve() if row["run"] else None
        if folder in known and row["step"] is not None:
            found[folder].append(row)
        else:
            name = folder.name if folder else Path(row["samples"]).name
            others.append(OtherSamples(name, {key: value for key, value in row.items() if key != CHECKSUM}))
    return [_with_own(run, found[run.path.resolve()]) for run in noted], others


def _files_of_evaluations(run: Path) -> tuple[list[Path], str]:
    """The results files in a run's folder, and a sentence if they cannot be listed."""
    try:  # not glob, for which a folder that may not be listed is empty
        return sorted(path for path in (run / layout.EVALUATIONS).iterdir() if path.suffix == ".json"), ""
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"The evaluations in its folder are left out: {sentence_of(error)}"


def _with_own(run: RunRecord, rows: Sequence[dict[str, Any]]) -> RunRecord:
    """The run with those evaluations that are of its present weights, and sentences about the others."""
    kept: dict[str, list[dict[str, Any]]] = {}  # why they are left out -> evaluations
    for row in rows:
        kept.setdefault(_why_not(run, row), []).append(row)
    own = kept.pop("", [])
    for why, stale in kept.items():
        steps = ", ".join(f"{step:,}" for step in sorted({row["step"] for row in stale}))
        run = replace(run, lost=f"{run.lost} Evaluations of step {steps} are left out: {why}".lstrip())
    # without a recorded decoder, samples were decoded by the run's autoencoder
    decoder = run.config.get("autoencoder") or None
    own = [{**row, "decoder": row["decoder"] or decoder} for row in own]
    return with_evaluations(run, [{k: v for k, v in row.items() if k != CHECKSUM} for row in own])


def _why_not(run: RunRecord, row: Mapping[str, Any]) -> str:
    """Why an evaluation is left out: training continued from an earlier checkpoint and replaced its weights, or damage."""
    step, weights = row["step"], str(row.get("weights"))
    if row[CHECKSUM] is None or Path(weights).name != weights:
        return ""
    try:
        is_own = weights_checksum(run.path, weights, step) == row[CHECKSUM]
    except UserError:
        return f"{layout.STATE_FILE} of their checkpoint is damaged. Restore it from a copy."
    # The checkpoint is not kept: only a step that the run has not reached is known to be wrong.
    except (OSError, KeyError):
        is_own = not run.train or step <= max(run.steps, *layout.checkpoint_steps(run.path), 0)
    return "" if is_own else "their weights are not those of the run now. Evaluate again."


def evaluation_row(file: Path) -> dict[str, Any]:
    """A results file as a log entry: metrics, step and protocol; `step` and `run` may be None."""
    results = read_json(file)
    metrics = results.get("metrics") if isinstance(results, dict) else None
    if not isinstance(metrics, dict) or "features" not in results:
        raise UserError(
            f"{file} is not a result of `repa evaluate`: it has no metrics, or no extractor. Remove it, or run the evaluation again."
        )
    for part in FIELD_TYPES:
        _require_types(file, part, results.get(part) if part else results, "Run `repa evaluate` again.")
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
        CHECKSUM: made.get(CHECKSUM),
        "run": made.get("run"),
        "samples": str(results.get("samples")),
    }


def _require_types(file: Path, part: str, given: Any, remedy: str) -> None:
    """Check types in an untrusted file: a number in place of a text would stop the report in the middle of its page."""
    for key, kind in FIELD_TYPES[part].items():
        if isinstance(given, dict) and not isinstance(given.get(key), kind | None):
            raise UserError(f"{file} is damaged: {f'{part}.{key}' if part else key} is {given[key]!r:.60}. {remedy}")


def _extractor_settings(features: Any, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of features: network, weights and precision. None is the default: published weights, float32."""
    published = identity.get("published")
    return {
        "features": OTHER_WEIGHTS if features == INCEPTION and published is False else features,
        "feature_weights": None if published else str(identity.get("weights_sha256") or "")[:8] or None,
        "features_precision": identity.get("precision"),
    }


def protocol_of(row: Mapping[str, Any]) -> Protocol:
    """The settings of an evaluation."""
    settings = {key: row[key] for key in PROTOCOL if row.get(key) is not None}
    # The NFE of an adaptive sampler is a result, not a setting: included, it would make any two networks incomparable.
    if str(settings.get("sampler")).partition(":")[0] in ADAPTIVE:
        settings.pop("nfe", None)
    if settings.get("guidance") == []:
        settings["guidance"] = "off"
    # As JSON, because a protocol is a dictionary key and guidance is a list.
    return tuple((key, json.dumps(value, sort_keys=True)) for key, value in settings.items())


def settings_of(protocol: Protocol) -> dict[str, Any]:
    """The settings as plain values."""
    return {key: json.loads(value) for key, value in protocol}


def distance_name(protocol: Protocol) -> str:
    """Whether the distance is the FID: only the Fréchet distance in Inception's features is."""
    return "FID" if settings_of(protocol).get("features") == INCEPTION else "Fréchet distance"


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """A log entry whose names of alignments can be drawn and printed."""
    named = row.get("alignment")
    return row | (
        {"alignment": {_shown(key): value for key, value in named.items()}} if isinstance(named, dict) else {}
    )


def _shown(name: str) -> str:
    return printable(well_formed(name))  # fonts refuse what is not UTF-8


def _preview_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of kind "eval" in metrics.jsonl, with its feature extractor as in a results file."""
    renamed_row = renamed(row)
    if isinstance(identity := renamed_row.pop("encoder", None), dict):
        renamed_row |= _extractor_settings(renamed_row.get("features"), identity)
    return renamed_row


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A log entry with its distance under one name; the extractor shows which distance it is."""
    return {DISTANCE_KEYS.get(key, key): value for key, value in row.items()}


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
