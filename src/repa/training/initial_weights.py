"""Initial weights for fine-tuning: from another run, an exported network, or a released checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repa.alignment.config import AlignmentConfig
from repa.base.errors import UserError
from repa.base.registry import parse_spec
from repa.diffusion.config import DiffusionConfig
from repa.models import Backbone, DiT
from repa.models.config import ModelConfig
from repa.models.exported import CONFIG, read_exported
from repa.models.lora import merged_weights
from repa.models.published import FUSION, KINDS, constructor_arguments, heads_of_named
from repa.runs import layout
from repa.runs.checkpoint import load_checkpoint, load_weights, recorded_settings
from repa.runs.importing import is_diffusers, read_checkpoint, read_diffusers
from repa.runs.layout import refuse_converted
from repa.runs.loading import network_of
from repa.training.config import TrainConfig
from repa.training.objective import Objective

LABELS = "y_embedder.embedding_table.weight"
POSITIONS = ("pos_embed", "rotation.cos", "rotation.sin")  # formulas of the grid
# sizes that must agree, with their names in messages; latent size and classes may differ
SIZES = {
    "hidden_dim": "width", "depth": "depth", "num_heads": "heads", "patch_size": "patch", "latent_channels": "channels",
    "learn_sigma": "learned variance", "mlp_ratio": "MLP ratio",
    "norm": "norm", "mlp": "MLP", "qk_norm": "qk-norm", "bias": "bias", "rotary": "rotary",
}  # fmt: skip


class InitialWeights(NamedTuple):
    """EMA weights of a network, its number of attention heads (None: unknown), and its projectors by alignment."""

    state: dict[str, Tensor]
    num_heads: int | None
    projectors: dict[tuple[str, str], dict[str, Tensor]]  # (name of the alignment, spec of the projector) -> state dict


def is_new_run(run: Path) -> bool:
    """Whether this run has no checkpoint to resume. Raises UserError for a folder of `repa convert`, which cannot be resumed."""
    refuse_converted(run)
    return not layout.checkpoint_steps(run)


def start_from(source: str, objective: Objective, num_heads: int) -> None:
    """Overwrite a new objective's weights with those of `source` that have the same meaning.

    Labels: the complete table if the number of classes is equal, otherwise only the null label. Positions: computed from the
    grid if the grids differ. Projectors: those with the same target, depth and kind; others stay new.

    Args:
        source: run folder (its EMA), folder of `repa export` or of diffusers, or KIND:FILE with a kind of KINDS.
        num_heads: of the objective's network.

    Raises:
        UserError: `source` has no usable weights, or a network of other sizes.
    """
    if not isinstance(objective.model, DiT):
        raise UserError(
            f"--init works only for a DiT, but the network is a {type(objective.model).__name__}: leave it out."
        )
    start, own = _read_source(source, num_heads), objective.model.state_dict()
    _check_sizes(source, start, objective.model, num_heads)
    state = dict(start.state)
    # Classes of other data have another meaning. The null label has the same meaning everywhere, and guidance needs it.
    if state[LABELS].shape != own[LABELS].shape:
        state[LABELS] = own[LABELS].clone()
        state[LABELS][-1] = start.state[LABELS][-1]
    state |= {name: own[name] for name in POSITIONS if name in own and state[name].shape != own[name].shape}
    objective.model.load_state_dict(state)
    for alignment in objective.terms():
        # The key has target and depth: a projector does not fit the hidden states of another block.
        new = start.projectors.get((alignment.key, alignment.config.projector))
        shapes = {key: value.shape for key, value in alignment.state_dict().items()}
        if new is not None and {key: value.shape for key, value in new.items()} == shapes:
            alignment.load_state_dict(new)


def frozen_network(config: TrainConfig, model: Backbone, device: torch.device) -> Backbone | None:
    """The averaged network of a target "run:path=...", in evaluation mode; None without such a target.

    Raises:
        UserError: no such run, or its width, depth, latents, classes, path or objective differ from those of `model`.
    """
    named = [settings for name, settings in (parse_spec(a.target) for a in config.alignments) if name == "run"]
    if not named:
        return None
    run = Path(str(named[0]["path"]))
    found = layout.read_config(run, ("model", "diffusion"))
    where = str(run / layout.CONFIG)
    diffusion = DiffusionConfig.parse(found["diffusion"], where=where)
    step, state = load_weights(run, "ema", None if named[0].get("step", -1) < 0 else int(named[0]["step"]))
    network = network_of(run, ModelConfig.parse(found["model"], where=where), step, state)
    layout.require_settings(run, step, recorded_settings(run, step), found)
    for name in ("hidden_dim", "depth", "state_shapes", "num_classes", "prefix_tokens"):
        if (theirs := getattr(network, name)) != (own := getattr(model, name)):
            raise UserError(
                f"The target run {run} has the {name} {theirs}, but this run has {own}: use the same for both."
            )
    # Both networks see the same noised images, so both must be trained with the same path.
    for name in ("objective", "path"):
        if (theirs := getattr(diffusion, name)) != (own := getattr(config.diffusion, name)):
            raise UserError(
                f"The target run {run} has the {name} {theirs!r}, but this run has {own!r}: use the same for both."
            )
    return network.to(device).eval().requires_grad_(False)


def _read_source(source: str, num_heads: int) -> InitialWeights:
    kind, colon, file = source.partition(":")
    path = Path(source)
    if (path / layout.CONFIG).is_file():
        config, checkpoint = layout.read_config(path), load_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"--init is {path}, which has no checkpoint yet: train it first, or give another run.")
        where = str(path / layout.CONFIG)
        heads = ModelConfig.parse(config.get("model", {}), where=where).dims().num_heads
        projectors = _projectors_by_term(config.get("alignments", ()), checkpoint.projectors, where)
        return InitialWeights(merged_weights(checkpoint.ema), heads, projectors)
    if is_diffusers(path):
        imported = read_diffusers(path)
        heads = ModelConfig.parse(imported.settings["model"]).dims().num_heads
        return InitialWeights(imported.checkpoint.ema, heads, {})
    if (path / CONFIG).is_file():
        exported, state = read_exported(path)
        return InitialWeights(state, exported["model"]["num_heads"], {})
    if colon and kind in KINDS:
        imported = read_checkpoint(Path(file), kind, num_heads=num_heads)
        ema = imported.checkpoint.ema
        arguments = constructor_arguments(ema, num_heads)
        # Without a named size, only the configuration has the number of heads.
        named = heads_of_named(arguments["hidden_dim"], arguments["depth"])
        projectors = _projectors_by_term(imported.settings["alignments"], imported.checkpoint.projectors, file)
        return InitialWeights(ema, named, projectors)
    kinds = ", ".join(f"{kind}:FILE" for kind in KINDS)
    raise UserError(
        f"--init is {source!r}, which is neither a run folder nor an exported network: for a checkpoint of another project "
        f"give its kind ({kinds}), or convert it with `repa convert` first."
    )


def _projectors_by_term(
    alignments: Iterable[dict[str, Any]], state: Mapping[str, Tensor], where: str
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The state dict of each alignment, from the combined one."""
    found = {}
    for alignment in (AlignmentConfig.parse(values, where=where) for values in alignments):
        prefix = f"{alignment.module}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        found[alignment.key, alignment.projector] = own
    return found


def _check_sizes(source: str, start: InitialWeights, model: DiT, num_heads: int) -> None:
    found = constructor_arguments(start.state, start.num_heads or num_heads)
    wanted = constructor_arguments(model.state_dict(), num_heads)
    differences = [
        f"{word} {found[name]} (here {wanted[name]})" for name, word in SIZES.items() if found[name] != wanted[name]
    ]
    if (FUSION in start.state) != (FUSION in model.state_dict()):
        differences.append("the merge fuse" if FUSION in start.state else "no merge fuse")
    if bool(start.state["pos_embed"].any()) != bool(model.pos_embed.any()):
        differences.append("fixed positions" if start.state["pos_embed"].any() else "no fixed positions")
    if differences:
        raise UserError(
            f"--init is {source}, a network with {', '.join(differences)}: choose the recipe or --model options of its size, "
            "or another network to start from."
        )
