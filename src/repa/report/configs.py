"""What configurations say about runs: the alignment that was trained on, and every setting that differs."""

from collections.abc import Iterator, Sequence
from typing import Any

from repa.report.runs import RunRecord, is_number


def alignment_text(item: dict[str, Any]) -> str:
    """'dinov2-b@8, weight 0.5, cosine, mlp' from one entry of `alignments`."""
    target, depth = item.get("target"), item.get("depth")
    parts = [f"{target}@{depth}", f"weight {item['weight']:g}" if is_number(item.get("weight")) else None]
    parts += [item.get("loss"), item.get("projector")]
    parts += [
        item.get(key) for key, plain in (("schedule", "constant"), ("token_norm", "none")) if item.get(key) != plain
    ]
    return ", ".join(str(part) for part in parts if part)


def config_differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) for every leaf of the configurations that is not the same in all."""
    leaves = [dict(_leaves(run.config)) for run in records]
    names = dict.fromkeys(name for each in leaves for name in each)
    table = [(name, [_shown(each.get(name)) for each in leaves]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('optim.lr', 0.0001): mappings, and lists of mappings, are entered; other lists are one value."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _shown(value: Any) -> str:
    return "–" if value is None or value == [] or value == {} else str(value)
