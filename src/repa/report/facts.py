"""Facts for the page: what the runs were trained on, and the machine and versions at hand."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from repa.report.runs import RunRecord
from repa.report.text import count


def machine_facts() -> dict[str, str]:
    """Versions, processor and threads of this process: pass them as `facts` when the runs were made on this machine."""
    import torch

    facts = {"Python": platform.python_version()}
    facts |= {"torch": torch.__version__, "repa": _own_version()}
    facts["Processor"] = _processor()
    facts["Threads"] = f"{torch.get_num_threads()} used by torch, {os.cpu_count()} present"
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts


def data_facts(records: Sequence[RunRecord]) -> dict[str, str]:
    """What the runs were trained on, from data.json; where runs differ, each one's with its name."""
    described = {run.name: _describe(run.data) for run in records if run.data}
    keys = dict.fromkeys(key for each in described.values() for key in each)
    facts = {}
    for key in keys:
        values = {name: each[key] for name, each in described.items() if key in each}
        same = len(set(values.values())) == 1
        facts[key] = next(iter(values.values())) if same else "; ".join(f"{name}: {v}" for name, v in values.items())
    return facts


def _describe(data: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if data.get("source") is not None:
        facts["Source"] = _words(data["source"])
    if data.get("num_images") is not None:
        facts["Images"] = count(data["num_images"])
    if data.get("resolution") is not None:
        facts["Resolution"] = f"{data['resolution']} × {data['resolution']} pixels"
    names = data.get("class_names") or []
    if names:
        shown = ", ".join(str(name) for name in names[:12])
        facts["Classes"] = f"{len(names)}: {shown}{', …' if len(names) > 12 else ''}"
    for key, label in (("autoencoder", "Autoencoder"), ("features", "Alignment features")):
        if data.get(key):
            facts[label] = _words(data[key])
    return facts


def _words(value: Any) -> str:
    if (
        isinstance(value, Mapping) and "name" in value
    ):  # an identity: the name, and what tells it from others of that name
        checksums = [str(item)[:12] for key, item in value.items() if key.endswith("sha256") and item]
        seed = f", seed {value['seed']}" if "seed" in value else ""
        return f"{value['name']}{seed}" + (f", checksum {' '.join(checksums)}" if checksums else "")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} ({_words(item)})" if item or item == 0 else str(key) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(item) for item in value)
    return str(value)


def _own_version() -> str:
    try:
        return metadata.version("repa")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "a source checkout"


def _processor() -> str:
    """The processor's name where the system tells it (Linux), else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
