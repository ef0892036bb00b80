"""Conversion to run folders: released checkpoints of REPA, SiT and DiT, and folders of `repa export`.

Settings are plain values here, named as in config.yaml; the caller validates them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from repa.base import faults, files, lock
from repa.base.config import Config
from repa.base.errors import UserError
from repa.base.weights import read_weights
from repa.encoders import canonical
from repa.models import diffusers_export
from repa.models.config import BLOCK_OPTIONS, FAMILIES, PATCH_SIZES, SIZES
from repa.models.exported import CONFIG, read_exported, require_digest
from repa.models.published import MOST_STEPS, Published, check_keys, check_values, constructor_arguments, load_published
from repa.runs import layout
from repa.runs.checkpoint import SETTINGS, Checkpoint, save_checkpoint

PROJ_COEFF = 0.5  # alignment weight if the file of a REPA does not give it: the default of REPA's code
MLP_RATIO = 4  # the only ratio that a run's configuration supports
# names of paths in the settings of REPA and SiT
PATHS = {"linear": "linear", "cosine": "trigonometric", "Linear": "linear", "GVP": "trigonometric", "VP": "vp"}


class Imported(NamedTuple):
    """The settings that a file gives, and its weights, without an optimizer."""

    settings: dict[str, Any]
    checkpoint: Checkpoint
    kind: str  # the code that made it: "repa", "sit", "dit", or "" if unknown
    taken: str = ""  # a sentence that names the file's weights in use
    left_out: int = 0  # number of projectors without a known encoder and depth


def read_checkpoint(
    file: Path,
    kind: str,
    *,
    num_heads: int = 0,
    targets: Sequence[str] = (),
    depth: int = 0,
    path: str = "",
    weights: str = "",
) -> Imported:
    """A released checkpoint as a run's settings (without autoencoder) and weights.

    Args:
        file: .pt or .safetensors; see repa.models.load_published.
        kind: "repa", "sit" or "dit".
        num_heads: number of attention heads; 0: those of the named size with this width and depth.
        targets: encoders of the projectors, in order; empty: from the file; if it names none, the projectors are dropped.
        depth: block of the alignment; 0: from the file.
        path: the path of training; empty: from the file, otherwise linear.
        weights: which of the file's weights to use; empty: its average, otherwise its only weights.

    Raises:
        UserError: not a checkpoint of this kind, or a network that no configuration can describe.
    """
    published = load_published(file, kind, weights)
    model = _model_settings(published.ema, num_heads, kind, str(file))
    diffusion = {"objective": "ddpm"} if kind == "dit" else {"path": path or _path(published.settings, str(file))}
    if kind == "dit" and path:
        raise UserError(f"A DiT has no choice of path, but got {path!r}: remove it.")
    alignments = _alignments(published, targets, depth, str(file))
    indices = {key.partition(".")[0] for key in published.projectors}
    projectors = {}
    if alignments:
        # Named as by `AlignmentConfig.module`, which this package cannot import: it reads plain values.
        names = [f"{a['target']}@{a['depth']}".replace(".", "_") for a in alignments]
        modules = dict(zip(sorted(indices, key=int), names, strict=True))
        for key, value in published.projectors.items():
            index, _, rest = key.partition(".")
            projectors[f"{modules[index]}.projector.{rest}"] = value
    checkpoint = _weights(published.steps or 0, published.ema, published.model, projectors)
    settings = {"model": model, "diffusion": diffusion, "alignments": alignments}
    return Imported(settings, checkpoint, kind, published.taken, 0 if alignments else len(indices))


def read_export(folder: Path) -> Imported:
    """A folder of `repa export` as a run's settings and weights."""
    config, ema = read_exported(folder)
    if missing := [name for name in ("diffusion", "autoencoder", "step") if name not in config]:
        raise UserError(
            f"{folder} does not record its {missing[0]}: save_pretrained writes only the network. Load it with "
            "DiT.from_pretrained, or make the folder with `repa export`."
        )
    files.read_object(folder / CONFIG, diffusion=dict, autoencoder=str, step=int)
    _check_step(config["step"], folder / CONFIG)
    settings = {name: config[name] for name in ("diffusion", "autoencoder")}
    overlap = config["model"].get("patch_overlap", 0)
    model = _model_settings(ema, config["model"]["num_heads"], "export", str(folder), overlap)
    checkpoint = _weights(config["step"], ema)
    kind = config.get("kind", "")
    return Imported({**settings, "model": model}, checkpoint, kind if isinstance(kind, str) else "")


def is_diffusers(folder: Path) -> bool:
    """Whether this folder holds a DiT in diffusers' format."""
    return _weights_of_diffusers(folder).is_file() and (folder / diffusers_export.CONFIG).is_file()


def _weights_of_diffusers(folder: Path) -> Path:
    path = folder / diffusers_export.WEIGHTS
    return path if path.is_file() else folder / diffusers_export.OLD_WEIGHTS


def read_diffusers(folder: Path) -> Imported:
    """A folder with a DiTTransformer2DModel: an export of `repa export --format diffusers`, or another project's DiT.

    Another project's DiT is assumed to use DDPM's timesteps, as the class does. Its settings then name no autoencoder.
    """
    path, weights = folder / diffusers_export.CONFIG, _weights_of_diffusers(folder)
    config = files.read_object(path, _class_name=str)
    if config["_class_name"] not in ("DiTTransformer2DModel", diffusers_export.OLD_CLASS):
        raise UserError(f"{path} describes a {config['_class_name']}: only a DiTTransformer2DModel can be converted.")
    facts: dict[str, Any] = {"diffusion": {"objective": "ddpm"}, "step": 0, "kind": "dit"}
    is_ours = (folder / diffusers_export.FACTS).is_file()
    if is_ours:
        facts = files.read_object(
            folder / diffusers_export.FACTS, diffusion=dict, autoencoder=str, step=int, kind=str, config=dict
        )
        _check_step(facts["step"], folder / diffusers_export.FACTS)
        if changed := [name for name, value in facts["config"].items() if config.get(name) != value]:
            raise UserError(
                f"{path} has {changed[0]} {config.get(changed[0])!r:.80}, but the export had {facts['config'][changed[0]]!r:.80}: "
                "restore it from a copy."
            )
    with faults.reading(weights, "the weights of a DiTTransformer2DModel", "Restore it from a copy."):
        state = read_weights(weights, "Restore it from a copy.")
        own, heads = diffusers_export.from_diffusers(
            config, state, unit_times=facts["diffusion"].get("objective") != "ddpm"
        )
        check_keys(own, str(folder), "diffusers")
        check_values(own, str(folder))
        if is_ours:
            require_digest(facts, state, weights)
        model = _model_settings(own, heads, facts["kind"] or "export", str(folder))
    settings: dict[str, Any] = {name: facts[name] for name in ("diffusion", "autoencoder") if name in facts}
    checkpoint = _weights(facts["step"], own)
    return Imported({**settings, "model": model}, checkpoint, facts["kind"])


def _weights(
    step: int,
    ema: dict[str, Tensor],
    model: dict[str, Tensor] | None = None,
    projectors: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """A checkpoint of the available weights; the training time is unknown."""
    found = {layout.EMA_FILE: ema, layout.MODEL_FILE: model, layout.PROJECTORS_FILE: projectors}
    return Checkpoint(step, {"seconds": 0.0}, {file: tensors for file, tensors in found.items() if tensors})


def _check_step(step: int, file: Path) -> None:
    if not 0 <= step <= MOST_STEPS:
        raise UserError(f"{file} is damaged: its 'step' is {step:.4g}.")


def write_run(run: Path, config: Config, checkpoint: Checkpoint, origin: str, kind: str) -> None:
    """Write a run folder atomically, for sampling, analysis and as initial weights.

    `origin` is the source of the conversion, `kind` the code that made it.
    """
    with lock.exclusive(run, "repa convert"), files.new_folder(run, layout.ORIGIN, "the converted run") as temporary:
        files.write_text(temporary / layout.CONFIG, config.to_yaml())
        files.write_sealed(temporary / layout.ORIGIN, {"origin": origin, "kind": kind})
        settings = layout.fixed_settings(config.model_dump(mode="json"))
        save_checkpoint(temporary, checkpoint._replace(counters={**checkpoint.counters, SETTINGS: settings}))


def _model_settings(
    state: Mapping[str, Tensor], num_heads: int, kind: str, where: str, patch_overlap: int = 0
) -> dict[str, Any]:
    """The section `model` of the configuration of this state dict's network."""
    try:
        arguments = constructor_arguments(state, num_heads or None, patch_overlap)
    except UserError as error:
        raise UserError(f"{error} The option is --model.num-heads.") from None
    if kind == "repa" and arguments["learn_sigma"]:
        raise UserError(f"{where} also predicts a variance, but a REPA does not: give --kind sit or --kind dit.")
    if kind == "dit" and not arguments["learn_sigma"]:
        remedy = (
            "its times are unknown, so it cannot be converted" if Path(where).is_dir() else "give --kind repa or sit"
        )
        raise UserError(f"{where} predicts no variance, but a DiT does: {remedy}.")
    if arguments["mlp_ratio"] != MLP_RATIO or arguments["patch_size"] not in PATCH_SIZES:
        raise UserError(
            f"{where} has the MLP ratio {arguments['mlp_ratio']:g} and the patch size {arguments['patch_size']}, but a run needs "
            f"{MLP_RATIO} and {', '.join(map(str, PATCH_SIZES))}: load it without a run, by repa.models.load_published."
        )
    dims = tuple(arguments[name] for name in ("hidden_dim", "depth", "num_heads"))
    size = next((size for size, named in SIZES.items() if named == dims), None)
    family = next(name for name, learn_sigma in FAMILIES.items() if learn_sigma == arguments["learn_sigma"])
    own = {} if size else dict(zip(("hidden_dim", "depth", "num_heads"), dims, strict=True))
    data = {
        name: arguments[name]
        for name in ("latent_size", "latent_channels", "num_classes", "patch_overlap", *BLOCK_OPTIONS)
    }
    return {"name": f"{family}-{size or 'S'}/{arguments['patch_size']}", **data, **own}


def _path(settings: Mapping[str, Any], where: str) -> str:
    """The path in the settings of a REPA or SiT; linear, the default of both, if they name none."""
    if (prediction := settings.get("prediction", "v")) not in ("v", "velocity"):
        raise UserError(f"{where} predicts {prediction!r}: only networks that predict velocity can be converted.")
    name = settings.get("path_type", "linear")
    if not isinstance(name, str) or name not in PATHS:
        raise UserError(f"{where} was trained on an unknown path {name!r}: give --path linear, trigonometric or vp.")
    return PATHS[name]


def _alignments(published: Published, targets: Sequence[str], depth: int, where: str) -> list[dict[str, Any]]:
    """The section `alignments` for the projectors of a REPA; empty if neither the caller nor the file names the encoders."""
    indices = sorted({int(key.partition(".")[0]) for key in published.projectors})
    named = published.settings.get("enc_type")
    if not targets and isinstance(named, str) and indices:
        targets = named.split(",")
    if not targets:
        return []
    # The projector mlp supports exactly the released architecture.
    layers = {f"{index}.{layer}.{kind}" for index in indices for layer in (0, 2, 4) for kind in ("weight", "bias")}
    if published.projectors.keys() != layers:
        raise UserError(f"{where} has projectors other than REPA's three linear layers: remove --targets.")
    if len(targets) != len(indices):
        raise UserError(
            f"{where} has {len(indices)} projectors, but got {len(targets)} encoders ({', '.join(targets)}): name one per projector."
        )
    depth = depth or published.settings.get("encoder_depth") or 0
    if not isinstance(depth, int) or depth < 1:
        raise UserError(f"{where} does not record the block of its projectors: give --depth, 8 for the released REPA.")
    weight = published.settings.get("proj_coeff", PROJ_COEFF)
    if not isinstance(weight, int | float) or not 0 <= weight <= sys.float_info.max:
        raise UserError(f"{where} has the impossible alignment weight {weight!r:.80}: use another checkpoint.")
    return [
        {
            "target": canonical(target),
            "depth": depth,
            "projector": f"mlp:width={published.projectors[f'{index}.0.weight'].shape[0]}",
            # REPA averages over encoders, but a run sums its terms.
            "weight": weight / len(indices),
        }
        for index, target in zip(indices, targets, strict=True)
    ]
