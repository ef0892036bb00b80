"""Prompts from the command line, from files, or from the captions of prepared data; encoded as the run's captions were."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from repa.base import files
from repa.base.errors import UserError
from repa.conditions import load_text_encoder
from repa.data import open_data
from repa.runs import LoadedRun
from repa.runs.prompts import Prompts, prompts_in
from repa.sampling.config import SampleConfig


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
        return tuple(map(files.well_formed, config.prompt))
    if config.prompt_file:
        return prompts_in(Path(config.prompt_file))
    data = open_data(config.prompt_data)
    return [next(iter(texts), "") for texts in data.captions(data.originals)]
