"""The state of a training run, its construction from a configuration, and its contents in a checkpoint."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from repa.alignment import Alignment
from repa.base import dist, faults
from repa.base.device import resolved
from repa.base.errors import UserError
from repa.base.rng import fold
from repa.conditions import Text
from repa.models import Backbone, build
from repa.models.layers import Block
from repa.models.lora import use_lora
from repa.runs import layout
from repa.runs.averaging import save_snapshot, weights_name
from repa.runs.checkpoint import SETTINGS, Checkpoint, OwnedTensor, load_owned, shares
from repa.training.acceleration import use_fp8
from repa.training.config import TrainConfig
from repa.training.initial_weights import frozen_network, start_from
from repa.training.objective import Objective
from repa.training.parallel import distribute_like, gather_full, load, shard
from repa.training.update import EMA, Guard, MuonAdamW, adamw, exponential, power_function


@dataclass
class TrainState:
    """The network, its averages, the projectors and the optimizer, after `step` steps."""

    config: TrainConfig
    objective: Objective
    averages: dict[str, EMA]  # by the stem of their file; previews and terms use "ema"
    optimizer: torch.optim.Optimizer
    guard: Guard
    frozen: Backbone | None = None  # another run's network, if a term reads one
    step: int = 0
    rate: float = 0.0  # learning rate of the last step
    seconds: float = 0.0  # time in training steps, without previews and checkpoints
    metrics: dict[str, float] = field(default_factory=dict)  # of the last logged step

    @property
    def model(self) -> Backbone:
        return self.objective.model

    @property
    def ema(self) -> EMA:
        return self.averages["ema"]

    def snapshot(self, writers: Sequence[int] = (0,), *, copy: bool = False) -> Checkpoint:
        """This process's share of everything that must survive a restart, as full tensors on the CPU; a collective call.

        Args:
            writers: ranks of the processes that share it.
            copy: copy all tensors, so that training may continue during the write.
        """
        files = {
            layout.MODEL_FILE: self.model.state_dict(),
            layout.PROJECTORS_FILE: self.objective.alignments.state_dict(),
            layout.OPTIMIZER_FILE: named_state(self.optimizer, self.objective),
            **{name + layout.WEIGHTS: average.model.state_dict() for name, average in self.averages.items()},
        }
        sizes = {
            file: {name: x.numel() * x.element_size() for name, x in state.items()} for file, state in files.items()
        }
        mine = dict(zip(writers, shares(sizes, len(writers)), strict=True)).get(dist.rank(), {})
        wanted: dict[str, set[str]] = {file: set() for file in files}
        for part, names in mine.items():
            wanted[layout.whole_name(part)].update(names)
        whole = {file: gather_full(state, wanted[file], copy=copy) for file, state in files.items()}
        counters = {"seconds": self.seconds, **self.guard.state(), "schedules": self.objective.schedule_states()}
        counters[SETTINGS] = self._settings
        parts = {part: {name: whole[layout.whole_name(part)][name] for name in names} for part, names in mine.items()}
        return Checkpoint(self.step, counters, parts)

    def keep_snapshot(self, run: Path) -> None:
        """The current averages of ema_widths, for `repa ema`; a collective call."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        # Only trained tensors: `repa ema` reads the rest, such as positions, from a checkpoint.
        averages = {}
        for width in self.config.ema_widths:
            average = self.averages[weights_name(width)].model
            parameters = {name: p for name, p in average.named_parameters() if name in trained}
            averages[width] = gather_full(parameters, trained if dist.is_main() else ())
        dist.on_main(lambda: save_snapshot(run, self.step, averages, self._settings))

    @property
    def _settings(self) -> dict[str, str]:
        """The settings that determine the result. Checkpoints and snapshots record them, to be recognised as this run's."""
        return layout.fixed_settings(self.config.model_dump(mode="json"))

    def resume(self, run: Path) -> None:
        """Resume from the newest checkpoint, if there is one, from any number of processes and any strategy.

        Each process reads a part of it and distributes it tensor by tensor; a collective call.
        """
        if (found := load_owned(run)) is None:
            return
        step, counters, files = found
        if not files.get(layout.OPTIMIZER_FILE):
            raise UserError(
                f"{layout.checkpoint_folder(run, step)} has no {layout.OPTIMIZER_FILE}, so training cannot continue: "
                f"start from its weights in a new folder, repa train RECIPE --data DATA --out NEW --init {run}."
            )
        with dist.together():
            layout.require_settings(run, step, counters.get(SETTINGS), self.config.model_dump(mode="json"))
        folder = layout.checkpoint_folder(run, step)
        # The checksums match, so an error here means that the tensors belong to another configuration.
        with faults.reading(folder, "the state of this configuration", f"Restore {run / layout.CONFIG}."):
            load(self.model, files[layout.MODEL_FILE])
            for name, average in self.averages.items():
                load(average.model, files[name + layout.WEIGHTS])
            load(self.objective.alignments, files[layout.PROJECTORS_FILE])
            load_named_state(self.optimizer, self.objective, files[layout.OPTIMIZER_FILE])
            self.guard.load(counters)
            self.objective.load_schedule_states(counters.get("schedules", {}))
            self.step, self.seconds = step, counters["seconds"]

    @contextlib.contextmanager
    def full_average(self) -> Iterator[Backbone]:
        """The average as a network that each process can run alone; entering the context is collective."""
        if not dist.is_sharded(next(self.ema.model.parameters())):
            yield self.ema.model
            return
        device = next(self.ema.model.parameters()).device
        model = build(self.config.model).to(device).eval().requires_grad_(False)
        model.load_state_dict({name: dist.full_tensor(value) for name, value in self.ema.model.state_dict().items()})
        yield model


def build_state(
    config: TrainConfig, feature_dims: dict[str, int], device: torch.device, *, is_new_run: bool = True,
    empty_text: Text | None = None,
) -> TrainState:  # fmt: skip
    """A state at step 0. `config` is resolved (no field left to the data); feature_dims: encoder -> width of its tokens.

    `empty_text` (1, S, E) is the null condition of a network that reads text.
    `config.init` is read only for a new run; later the checkpoint replaces it, and it need not exist any more.

    Network and projectors are initialised from separate random streams: runs with other alignments, or without, start from
    the same network.
    """
    # The order matters: initial weights, then LoRA, then the averages, which copy both; then changes of the implementation that
    # keep the parameters; sharding next to last, because a sharded network cannot be copied; the optimizer last, because it
    # must hold the sharded parameters.
    with seeded(config.seed, "model"):
        model = build(config.model)
    model.checkpoint_activations = config.checkpoint_activations
    if empty_text is not None:
        model.take_empty_text(*empty_text.map(lambda x: x[0]))
    alignments = []
    for alignment in config.alignments:
        with seeded(config.seed, "projector", alignment.key):
            alignments.append(Alignment.of(alignment, model, feature_dims))
    objective = Objective(
        model, alignments, config.diffusion, label_dropout=config.label_dropout, seed=config.seed,
        streams=config.streams, head_weight=config.head_weight, denoising_schedule=config.denoising_schedule,
    ).to(device)  # fmt: skip
    with dist.together():
        frozen = frozen_network(config, model, device)
    if config.init and is_new_run:
        with dist.together():
            start_from(config.init, objective, config.model.dims().num_heads)
    if config.lora.rank:
        with seeded(config.seed, "lora"):
            use_lora(objective.model, config.lora.rank)
    averages = build_averages(objective.model, config)
    fused = [block.fuse_norm() for block in model.blocks if config.fused_norm and isinstance(block, Block)]
    if config.fused_norm and not any(fused):
        raise UserError("--fused-norm needs blocks with LayerNorm and adaLN, which this network lacks: leave it out.")
    # Not for the averages: sampling uses them in its own precision.
    if config.fp8:
        use_fp8(objective.model, config.precision, device)
    if config.parallel == "fsdp" and dist.active():
        shard(objective, [average.model for average in averages.values()], device, config.precision)
    optimizer = build_optimizer(objective, config)
    return TrainState(config, objective, averages, optimizer, Guard(config.precision, device), frozen)


def build_averages(model: Backbone, config: TrainConfig) -> dict[str, EMA]:
    """See `TrainState.averages`."""
    shares_of = {"ema": exponential(config.ema_decay)}
    shares_of |= {f"ema-{decay:g}": exponential(decay) for decay in config.ema_decays}
    shares_of |= {weights_name(width): power_function(width) for width in config.ema_widths}
    return {name: EMA(model, share) for name, share in shares_of.items()}


def build_optimizer(objective: Objective, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of network and projectors.

    Muon optimises the matrices that the network lists, those of attention and MLP. AdamW optimises the adaLN projections (which
    start at zero as gates), the embeddings, the final layer, the projectors and all vectors.
    """
    settings = config.optimizer
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    if settings.name == "adamw":
        return adamw([p for _, p in named], settings)
    hidden = {id(p) for p in objective.model.matrices()}
    matrices, others = ([p for _, p in named if (id(p) in hidden) == wanted] for wanted in (True, False))
    if not matrices:
        raise UserError("The optimizer muon needs matrices, but this network lists none: choose adamw.")
    return MuonAdamW(matrices, others, settings, resolved(config.precision, matrices[0].device))


def named_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """An optimizer's tensors by parameter, "PARAMETER/WHAT"; its settings come from the configuration."""
    return {
        f"{name}/{what}": value
        for name, p in module.named_parameters()
        for what, value in optimizer.state.get(p, {}).items()
    }


def load_named_state(optimizer: torch.optim.Optimizer, module: nn.Module, saved: Mapping[str, OwnedTensor]) -> None:
    """Load full tensors into an optimizer whose parameters may be sharded."""
    names = {p: name for name, p in module.named_parameters()}
    tensors: dict[str, dict[str, OwnedTensor]] = {}
    for key, value in saved.items():
        name, _, what = key.rpartition("/")
        tensors.setdefault(name, {})[what] = value
    # load_state_dict identifies parameters only by their index, in the order of the groups.
    order = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {what: distribute_like(v, p) for what, v in tensors[names[p]].items()} for i, p in enumerate(order)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class seeded:
    """Initialise modules from the random stream (seed, *keys), without changing the global generator."""

    def __init__(self, seed: int, *keys: int | str):
        self.seed = fold(seed, *keys)

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.before)
