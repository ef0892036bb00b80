"""A run's averaged network for others: safetensors with a model card, or diffusers' DiTTransformer2DModel."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from repa.base import files, lock
from repa.base.errors import UserError, choices
from repa.diffusion.config import DiffusionConfig
from repa.models import constructor_arguments, diffusers_export
from repa.models.config import ModelConfig
from repa.models.exported import save_exported
from repa.runs import layout
from repa.runs.cards import card
from repa.runs.checkpoint import load_weights
from repa.runs.layout import kind_of

FORMATS = ("safetensors", "diffusers")


def export_run(run: Path, out: Path, form: str = "safetensors", step: int | None = None) -> int:
    """Write the EMA network of a run into a new folder with a model card; returns its step.

    Args:
        run: run folder.
        out: folder to make: absent, empty, or already what this call makes.
        form: "safetensors" (read by repa.models.load_exported) or "diffusers" (by DiTTransformer2DModel).
        step: which checkpoint; the highest when None.

    Raises:
        UserError: no such run or step, a folder that is in use, or a network that the format cannot hold.
    """
    if form not in FORMATS:
        raise UserError(f"Unknown format {form!r}{choices(form, FORMATS)}")
    config = layout.read_config(run, ("model", "diffusion", "autoencoder"))
    DiffusionConfig.parse(config["diffusion"], where=str(run / layout.CONFIG))
    model = ModelConfig.parse(config["model"], where=str(run / layout.CONFIG))
    if model.backbone != "dit":
        raise UserError(
            f"Exports hold a DiT alone, but {run} has the backbone {model.backbone!r}: use its checkpoints."
        )
    if form == "diffusers" and model.patch_overlap:
        raise UserError(
            f"diffusers' DiTTransformer2DModel cannot hold the network of {run}, whose patches overlap: export safetensors."
        )
    num_heads = model.dims().num_heads
    step, state = load_weights(run, "ema", step)
    arguments = constructor_arguments(state, num_heads, model.patch_overlap)
    arguments |= {"route": model.routing} if model.route else {}
    facts = {**_facts(run, config), "step": step}
    with lock.alone(out, "repa export"), files.new_folder(out, "README.md", "the export") as temporary:
        if form == "safetensors":
            save_exported(temporary, state, arguments, facts)
        else:
            unit_times = facts["diffusion"]["objective"] != "ddpm"
            theirs, tensors = diffusers_export.to_diffusers(state, num_heads, unit_times=unit_times)
            files.write_json(temporary / diffusers_export.CONFIG, theirs)
            files.write_json(temporary / diffusers_export.FACTS, facts)
            save_file(tensors, temporary / diffusers_export.WEIGHTS, {"format": "pt"})
        files.write_text(temporary / "README.md", card(form, arguments, facts, config))
    return step


def _facts(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a reader must know besides the network; no path of this machine is among it."""
    kinds = {"source": dict, "num_images": int, "class_names": list}
    data = files.read_object(run / layout.DATA, **kinds) if (run / layout.DATA).is_file() else {}
    origin = files.read_object(run / layout.ORIGIN, origin=str)["origin"] if (run / layout.ORIGIN).is_file() else None
    return {
        "diffusion": {"objective": "flow", **config["diffusion"]},
        "autoencoder": config["autoencoder"],
        "converted_from": origin,
        "kind": kind_of(run),
        "source": data.get("source"),
        "num_images": data.get("num_images"),
        "class_names": data.get("class_names", []),
    }
