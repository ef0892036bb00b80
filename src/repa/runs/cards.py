"""The model card (README.md) of an exported network: what it is, what it was trained on, how it is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa.base.errors import in_markdown
from repa.diffusion import ImprovedDDPM

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
for block in model.transformer_blocks:  # DiT's frequencies of the timestep, which this class has no setting for
    block.norm1.emb.time_proj.downscale_freq_shift = 0"""


def card(form: str, arguments: Mapping[str, Any], facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        form: "safetensors" or "diffusers".
        arguments: of DiT.
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
    labels = f"0 to {null - 1}, {null} is not a class" if null else "0, no class"
    last = ImprovedDDPM().num_timesteps - 1
    time = f"integer timesteps 0 (nearly data) to {last} (noise)" if ddpm else "in [0, 1], 0 is data and 1 is noise"
    return "\n".join([
        "---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---", "",
        f"# {name}, {facts['step']:,} steps", "", "| | |", "|---|---|", *(f"| {a} | {in_markdown(b)} |" for a, b in rows), "",
        load, "", f"`x_t` (N, {_shape(arguments)}) noised latents; `t` (N,) floats, {time}; `labels` (N,) int64, {labels}.", "",
    ])  # fmt: skip


def _name(model: Mapping[str, Any]) -> str:
    """SiT-XL/2 for a named size, SiT/2 for one of its own."""
    family, _, rest = model["name"].partition("-")
    own = any(model.get(name) for name in ("hidden_dim", "depth", "num_heads"))
    return f"{family}/{rest.partition('/')[2]}" if own else model["name"]


def _data(facts: Mapping[str, Any]) -> str:
    if not facts["source"]:
        return f"not known: the weights were converted from {facts['converted_from']}"
    return f"{facts['source'].get('name')}, {facts['num_images']:,} images of {len(facts['class_names'])} classes"


def _shape(arguments: Mapping[str, Any]) -> str:
    return f"{arguments['latent_channels']}, {arguments['latent_size']}, {arguments['latent_size']}"


def _prediction(diffusion: Mapping[str, Any]) -> str:
    if diffusion["objective"] == "ddpm":
        return "noise and its learned variance, improved DDPM"
    return f"{diffusion['prediction']} on the path {diffusion['path']}"


def _alignments(alignments: Any) -> str:
    felt = [a for a in alignments if not a.get("measure_only")]
    return ", ".join(f"{a['target']} at block {a['depth']}, weight {a['weight']}" for a in felt) or "nothing"
