"""Export of a run's averaged network: safetensors or diffusers' DiTTransformer2DModel, with a model card (README.md)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from repa.base import files, lock
from repa.base.errors import UserError, choices, in_markdown
from repa.base.weights import digest_of
from repa.diffusion import ImprovedDDPM
from repa.diffusion.config import DiffusionConfig
from repa.models import constructor_arguments, diffusers_export
from repa.models.config import ModelConfig
from repa.models.exported import CHECKSUM, save_exported
from repa.runs import layout
from repa.runs.checkpoint import load_weights, recorded_settings
from repa.runs.layout import kind_of

FORMATS = ("safetensors", "diffusers")
LOAD = {
    "safetensors": """```python
from repa.models import Condition, load_exported

model = load_exported("FOLDER")  # frozen, in eval mode
prediction = model({"x": x_t}, t, Condition(labels)).prediction["x"]
```

Samples, and all other commands of `repa` that take a run:

```
repa convert FOLDER RUN
repa sample RUN --num-images 64 --out samples.npz
```""",
    "diffusers": """```python
from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel.from_pretrained("FOLDER").eval(){exact}
prediction = model(x_t, timestep=t, class_labels=labels).sample
```""",
}
EXACT = """
for block in model.transformer_blocks:  # DiT's timestep frequencies; this class has no setting for them
    block.norm1.emb.time_proj.downscale_freq_shift = 0"""


def export_run(run: Path, out: Path, form: str = "safetensors", step: int | None = None) -> int:
    """Write the EMA network of a run into a new folder with a model card; returns its step.

    Args:
        run: run folder.
        out: output folder; it must be absent, empty, or already hold this export.
        form: "safetensors" (for repa.models.load_exported) or "diffusers" (for DiTTransformer2DModel).
        step: which checkpoint; the highest when None.

    Raises:
        UserError: no such run or step, a non-empty folder, or a network that the format cannot hold.
    """
    if form not in FORMATS:
        raise UserError(f"Unknown format {form!r}{choices(form, FORMATS)}")
    if out.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin"):
        raise UserError(f"{out} looks like a file, but an export is a folder: give a name without {out.suffix}.")
    config = layout.read_config(run, ("model", "diffusion", "autoencoder"))
    DiffusionConfig.parse(config["diffusion"], where=str(run / layout.CONFIG))
    model = ModelConfig.parse(config["model"], where=str(run / layout.CONFIG))
    if model.backbone != "dit":
        raise UserError(
            f"Only the backbone dit can be exported, but {run} has {model.backbone!r}: use its checkpoints."
        )
    if form == "diffusers" and model.patch_overlap:
        raise UserError(
            f"diffusers' DiTTransformer2DModel has no overlapping patches, but {run} has: export safetensors."
        )
    num_heads = model.dims().num_heads
    step, state = load_weights(run, "ema", step)
    layout.require_settings(run, step, recorded_settings(run, step), config)
    arguments = constructor_arguments(state, num_heads, model.patch_overlap)
    arguments |= {"route": model.routing} if model.route else {}
    facts = {**_facts(run, config), "step": step}
    with lock.exclusive(out, "repa export"), files.new_folder(out, "README.md", "the export") as temporary:
        if form == "safetensors":
            save_exported(temporary, state, arguments, facts)
        else:
            unit_times = facts["diffusion"]["objective"] != "ddpm"
            theirs, tensors = diffusers_export.to_diffusers(state, num_heads, unit_times=unit_times)
            files.write_json(temporary / diffusers_export.CONFIG, theirs)
            sealed = {**facts, "config": theirs, CHECKSUM: digest_of(tensors)}
            files.write_sealed(temporary / diffusers_export.FACTS, sealed)
            save_file(tensors, temporary / diffusers_export.WEIGHTS, {"format": "pt"})
        files.write_text(temporary / "README.md", card(form, arguments, facts, config))
    return step


def _facts(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The facts that a user of the network needs; without local paths, because an export is published."""
    data = layout.read_data(run)
    origin = files.read_object(run / layout.ORIGIN, origin=str)["origin"] if (run / layout.ORIGIN).is_file() else None
    return {
        "diffusion": {"objective": "flow", **config["diffusion"]},
        "autoencoder": config["autoencoder"],
        "converted_from": origin,
        "kind": kind_of(run),
        "source": data.get("source"),
        # without flipped copies, where data.json has the counts
        "num_images": sum(data.get("class_counts", ())) or data.get("num_images"),
        "class_names": data.get("class_names", []),
    }


def card(form: str, arguments: Mapping[str, Any], facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The text of README.md: the network, its training data, and how to load it.

    Args:
        form: "safetensors" or "diffusers".
        arguments: constructor arguments of DiT.
        facts: step, diffusion, autoencoder, converted_from, source, num_images, class_names.
        config: the run's configuration.
    """
    ddpm = facts["diffusion"]["objective"] == "ddpm"
    library, name = "repa" if form == "safetensors" else "diffusers", _name(config["model"])
    tags = ["image-generation", "diffusion-transformer", *(["repa"] if config.get("alignments") else [])]
    rows = [
        ("Network", "width {hidden_dim}, depth {depth}, {num_heads} heads, patch {patch_size}".format(**arguments)),
        ("Weights", f"exponential moving average after {facts['step']:,} steps"),
        ("Data", _data(facts)),
        ("Latents", f"{_shape(arguments)} of the autoencoder {facts['autoencoder']}"),
        ("Trained to predict", _prediction(facts["diffusion"])),
        ("Aligned to", _alignments(config.get("alignments", ()))),
        *([("Fine-tuned from", Path(config["init"]).name)] if config.get("init") else []),
    ]
    load = LOAD[form].replace("{exact}", EXACT if ddpm else "")
    null = arguments["num_classes"]
    labels = f"0 to {null - 1}, {null} stands for no class" if null else "0, no class"
    if facts["class_names"]:
        where = "config.json" if form == "safetensors" else diffusers_export.FACTS
        labels += f"; `class_names` in {where} has their names"
    last = ImprovedDDPM().num_timesteps - 1
    time = f"integer timesteps 0 (nearly data) to {last} (noise)" if ddpm else "in [0, 1], 0 is data and 1 is noise"
    return "\n".join([
        "---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---", "",
        f"# {name}, {facts['step']:,} steps", "", "| | |", "|---|---|", *(f"| {a} | {in_markdown(b)} |" for a, b in rows), "",
        load, "", f"`x_t` (N, {_shape(arguments)}) noised latents; `t` (N,) floats, {time}; `labels` (N,) int64, {labels}.", "",
    ])  # fmt: skip


def _name(model: Mapping[str, Any]) -> str:
    """SiT-XL/2 for a named size, SiT/2 for other sizes."""
    family, _, rest = model["name"].partition("-")
    own = any(model.get(name) for name in ("hidden_dim", "depth", "num_heads"))
    return f"{family}/{rest.partition('/')[2]}" if own else model["name"]


def _data(facts: Mapping[str, Any]) -> str:
    if not facts["source"]:
        return f"unknown: the weights were converted from {facts['converted_from']}"
    return f"{facts['source'].get('name')}, {facts['num_images']:,} images of {len(facts['class_names'])} classes"


def _shape(arguments: Mapping[str, Any]) -> str:
    return f"{arguments['latent_channels']}, {arguments['latent_size']}, {arguments['latent_size']}"


def _prediction(diffusion: Mapping[str, Any]) -> str:
    if diffusion["objective"] == "ddpm":
        return "noise and its learned variance, improved DDPM"
    return f"{diffusion['prediction']} on the path {diffusion['path']}"


def _alignments(alignments: Any) -> str:
    # Terms with measure_only have no influence on the network.
    felt = [a for a in alignments if not a.get("measure_only")]
    return ", ".join(f"{a['target']} at block {a['depth']}, weight {a['weight']}" for a in felt) or "nothing"
