"""Prompts from the command line, from files, or from the captions of prepared data; encoded as the run's captions were."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from repa.base import faults, files
from repa.base.errors import UserError
from repa.conditions import load_text_encoder
from repa.data import open_data
from repa.runs import LoadedRun
from repa.runs.prompts import Prompts
from repa.sampling.config import SampleConfig

MOST_BYTES = 2**28  # of a file of prompts


def prompts_of(run: LoadedRun, config: SampleConfig, device: torch.device | str) -> Prompts | None:
    """What `config` asks a run for; None for a run that reads no text.

    Raises:
        UserError: prompts and run do not go together, a file cannot be read, or the text encoder is not that of the run.
    """
    asked = bool(config.prompt or config.prompt_file or config.prompt_data)
    if not run.text:
        if asked or config.negative_prompt:
            raise UserError(f"{run.folder} was trained on labels, not on texts: give --labels in place of a prompt.")
        return None
    if not asked:
        raise UserError(
            f"{run.folder} was trained on captions: say what its images shall be of, as in --prompt 'a photograph of a cat', "
            "--prompt-file FILE or --prompt-data DATA."
        )
    if config.negative_prompt and not config.guidance:
        raise UserError("A negative prompt is what guidance walks away from: give --guidance cfg:scale=4 too.")
    texts = read_prompts(config)
    encoder = load_text_encoder(run.text, weights=config.text_weights or run.text_weights or None, device=device)
    changed = [key for key, value in encoder.identity.items() if (run.text_identity or {}).get(key) != value]
    if run.text_identity and changed:
        raise UserError(
            f"{run.folder} was trained on texts of another {run.text} (different: {', '.join(changed)}): give the folder of its "
            "weights as --text-weights."
        )
    negative = encoder([config.negative_prompt]) if config.negative_prompt else None
    return Prompts(texts, lambda numbers: encoder([texts[number] for number in numbers]), negative)


def prompts_record(run: LoadedRun) -> dict[str, Any]:
    """Of which texts samples are, for their record; nothing for a run that reads none."""
    if run.prompts is None:
        return {}
    checksum = hashlib.sha256(json.dumps(list(run.prompts.texts)).encode()).hexdigest()
    return {"num_prompts": len(run.prompts.texts), "prompts_sha256": checksum}


def read_prompts(config: SampleConfig) -> Sequence[str]:
    """The texts that are asked for, in order."""
    if config.prompt:
        return config.prompt
    if config.prompt_file:
        return prompts_in(Path(config.prompt_file))
    data = open_data(config.prompt_data)
    return [next(iter(texts), "") for texts in data.captions(data.originals)]


def prompts_in(path: Path) -> list[str]:
    """One a line; of .jsonl the "prompt" (or "caption", "text") of each line's object. Empty lines are left out.

    Raises:
        UserError: no such file, no UTF-8, no prompt in it or in a line.
    """
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has more than {files.size(MOST_BYTES)}: give fewer prompts.")
    with faults.reading(path, "a file of prompts", "Save it as UTF-8."):
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_prompt(line, number, path) for number, line in enumerate(lines, start=1)]
    if not lines:
        raise UserError(f"{path} holds no prompt: write one a line.")
    return [line.strip() for line in lines]


def _prompt(line: str, number: int, path: Path) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    found = [values.get(key) for key in ("prompt", "caption", "text")] if isinstance(values, dict) else []
    text = next((text for text in found if isinstance(text, str)), None)
    if text is None:
        raise UserError(f'Line {number} of {path} holds no object with a "prompt".')
    return text
