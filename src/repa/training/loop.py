"""The training loop. It waits for the device only on steps that log."""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repa.autoencoders import Autoencoder, load_autoencoder
from repa.autoencoders.contract import require_same_autoencoder
from repa.base import dist
from repa.base.device import autocast, checked_device
from repa.base.errors import require_type
from repa.base.launch import catch_signals
from repa.base.rng import generator
from repa.data import Batch, DataSet, Loader
from repa.encoders.contract import Features
from repa.models.contract import Condition, State
from repa.runs import MetricsLog, Writer, layout
from repa.runs.averaging import drop_later
from repa.training.acceleration import fastest_kernels
from repa.training.config import TrainConfig
from repa.training.initial_weights import is_new_run
from repa.training.inputs import EncoderFeatures, TextConditions, TimedIterator
from repa.training.log import TrainingLog
from repa.training.objective import Losses, select_samples
from repa.training.parallel import without_reduction, wrapped
from repa.training.resolve import (
    claim_folder,
    first_choices,
    require_agreement,
    require_equal_parts,
    resolve,
    strategy,
    with_streams,
)
from repa.training.state import TrainState, build_state
from repa.training.update import update

ASK_EVERY = 10  # steps between decisions of several processes to stop, because each decision synchronises


class Hook(NamedTuple):
    """An action at regular steps and at the end, passed by the caller (previews, metrics)."""

    every: int
    run: Callable[[TrainState], dict[str, Any]]  # values for a metrics row of kind "eval"


@dataclass(frozen=True)
class Finished:
    """The result of a call of `train`."""

    step: int
    interrupted: signal.Signals | None = None  # the signal that stopped it, after a checkpoint


def train(
    config: TrainConfig,
    data: DataSet,
    run: Path,
    *,
    device: torch.device,
    make_hooks: Callable[[TrainConfig, Autoencoder], Sequence[Hook]] = lambda config, autoencoder: (),
    progress: Callable[[TrainState], None] = lambda state: None,
    say: Callable[[str], None] = print,
) -> Finished:
    """Train or continue the run in folder `run` until config.num_steps.

    The same call continues a run bit for bit: all randomness is a function of (seed, step). `make_hooks` gets the resolved
    configuration and the autoencoder. `progress` is called after every step and must not touch the device.

    Raises:
        UserError: another process trains this run, or the processes have different configurations.
    """
    require_type(
        config, TrainConfig, "The settings of a training are a TrainConfig, such as repa.recipes.load_recipe(name)"
    )
    require_type(data, DataSet, "Training needs data that repa.open_data opened")
    run, device = Path(run), checked_device(device)
    with dist.locked(run, "repa train"):
        state, encoders, texts = _open_run(config, data, run, device)
        if state.step >= state.config.num_steps:
            say(f"{run} is complete: it has {state.step:,} steps, and {state.config.num_steps:,} are asked for.")
            return Finished(state.step)
        for note in encoders.notes:
            say(note)
        if state.config.num_steps < config.num_steps:
            say(
                f"{config.epochs:g} epochs of {len(data):,} images are {state.config.num_steps:,} steps; "
                f"--epochs 0 trains {config.num_steps:,}."
            )
        autoencoder, loader = _open_autoencoder_and_loader(state, data, encoders, texts, device)
        hooks = make_hooks(state.config, autoencoder)
        # Stored moments need only scale and shift, and only previews decode.
        if data.has_moments and not hooks:
            autoencoder.release_networks()
        # TF32 for float32 products that remain in half precision; fp32 means true float32, even after another run in
        # this process.
        torch.set_float32_matmul_precision("highest" if state.config.precision == "fp32" else "high")
        return _train(state, run, encoders, texts, autoencoder, loader, hooks, progress, say)


def _open_run(
    config: TrainConfig, data: DataSet, run: Path, device: torch.device
) -> tuple[TrainState, EncoderFeatures, TextConditions]:
    """The state of the newest checkpoint, or of step 0; reports every mismatch with the folder."""
    first = dist.on_main(lambda: first_choices(config, run, device))
    # Applied to each process's own configuration, so that different commands are detected below.
    config = first.applied(config)
    with dist.together():
        config = resolve(config, data, device)
        require_equal_parts(config.batch_size, dist.world(), config.accumulate)
        if is_new := is_new_run(run):
            config.require_init()
        encoders = EncoderFeatures(config, data, device)
        texts = TextConditions(config, data, device)
        config = texts.completed(with_streams(config, encoders.dims))
        config = config.override(parallel=strategy(config, device))
    # Built before the folder is claimed: an invalid configuration must not leave a run behind.
    state = build_state(config, encoders.dims, device, is_new_run=is_new, empty_text=texts.empty)
    dist.on_main(lambda: claim_folder(run, config, data, texts.identity))
    state.resume(run)
    require_agreement(run, config, data, state.step)
    # A complete run stays unchanged; otherwise partial files of a kill, and snapshots and averages of later steps, are
    # removed.
    if state.step < config.num_steps:
        dist.on_main(lambda: layout.tidy(run))
        dist.on_main(lambda: drop_later(run, state.step))
    return state, encoders, texts


def _open_autoencoder_and_loader(
    state: TrainState, data: DataSet, encoders: EncoderFeatures, texts: TextConditions, device: torch.device
) -> tuple[Autoencoder, Loader]:
    """Sources of latents and batches. An encoder with weight 0 does not run, and its features are not read."""
    config, needs = state.config, state.objective.needs
    with dist.together():
        autoencoder = load_autoencoder(config.autoencoder, weights=config.autoencoder_weights or None, device=device)
        require_same_autoencoder(data.manifest.autoencoder, autoencoder, data.folder)
        loader = Loader(
            data, batch_size=config.batch_size, seed=config.seed, features=lambda step: encoders.stored(needs(step)),
            images=lambda step: encoders.reads_images(needs(step)),
            pooled=encoders.pooled, text=texts.reads, rank=dist.rank(), world=dist.world(), device=device,
        )  # fmt: skip
    return autoencoder, loader


def _train(
    state: TrainState, run: Path, encoders: EncoderFeatures, texts: TextConditions, autoencoder: Autoencoder,
    loader: Loader, hooks: Sequence[Hook], progress: Callable[[TrainState], None], say: Callable[[str], None],
) -> Finished:  # fmt: skip
    config, device, objective = state.config, loader.device, state.objective
    log = _open_log(state, run, device, say)
    module, groups = wrapped(objective, config, device), objective.clipping_groups()
    batches = TimedIterator(loader.iterate(state.step))
    writer = Writer(run, config.keep_checkpoints, config.keep_every, background=config.async_save)
    training_log, saved = TrainingLog(state, run, log, batches, device, say), time.monotonic()

    kernels = fastest_kernels(config, dist.world(), device)
    with contextlib.closing(log), contextlib.closing(batches), writer, catch_signals() as caught, kernels as timed:
        if timed:
            times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in timed.items())
            log.line(f"attention kernels in order, forward and backward of one block: {times}")
        for batch, features in encoders.iterate(batches, state.step, objective.needs):
            clean = objective.clean(_latents(batch, autoencoder, config.seed, state.step), features)
            losses = backward(state, module, clean, texts(batch), features)
            norms = update(state, groups)
            objective.observe(state.step, losses)

            # Signals and clocks differ between processes, so common decisions need communication.
            stop = time_is_up = False
            if not dist.active() or state.step % ASK_EVERY == 0:
                time_is_up = dist.is_main() and 0 < 60 * config.save_minutes <= time.monotonic() - saved
                stop, time_is_up = dist.any_process([bool(caught), time_is_up], device)
                if config.async_save:
                    writer.settle(device)
            last = state.step == config.num_steps
            due = _due(config, state.step, hooks, ends=last, saves=stop or time_is_up)
            # Log entry, previews, checkpoint, in this order: after a kill in between, the interrupted part is repeated.
            if due.anything or _is_due(config.log_every, state.step):
                training_log.write(losses, norms[0])
            progress(state)
            for hook in due.hooks:
                values = hook.run(state)
                log.row("eval", state.step, **{"seconds": state.seconds, **values})
            if due.snapshot:
                state.keep_snapshot(run)
            if due.checkpoint:
                if writers := writer.begin(state.step):
                    writer.write(state.snapshot(writers, copy=config.async_save))
                saved = time.monotonic()
            if last or stop:
                writer.wait()
                break
            # Previews and checkpoints do not count in the training rate.
            if due.anything:
                training_log.restart()
    return Finished(state.step, caught[0] if caught else None if last else signal.SIGTERM)


def _open_log(state: TrainState, run: Path, device: torch.device, say: Callable[[str], None]) -> MetricsLog:
    """The run's log, with an event that says where and how the training starts."""
    config = state.config
    log = MetricsLog(run, state.step, project=config.wandb, config=config.model_dump(mode="json"))
    started = f"from step {state.step} on {dist.world()} x {device}, {config.precision}, torch {torch.__version__}"
    log.line(started)
    log.row("event", state.step, message=started)
    if log.lost:
        say(f"{run}: {log.lost}")
        log.row("event", state.step, message=log.lost)
    return log


def backward(
    state: TrainState, module: nn.Module, clean: State, condition: Condition, features: Mapping[str, Features]
) -> Losses:
    """Add the gradient of a step's mean loss over N samples to the parameters; returns the detached losses of all of them.

    The samples are split into `accumulate` equal micro-batches to save memory. Each adds its share of the mean, so the gradient
    is that of all samples.

    Args:
        module: the objective as it runs, see `wrapped`.
        clean, condition, features: of this process's N images.
    """
    objective, config, device = state.objective, state.config, clean["x"].device
    draws, weights = objective.draw(clean, state.step), objective.weights(state.step, device)
    # Outputs of other networks that terms read; computed outside of DDP and torch.compile, which wrap only the trained network.
    network = (state.frozen or state.ema.model) if objective.averages(state.step) else None
    whole, size = (clean, condition, features, draws), len(clean["x"]) // config.accumulate
    parts = [slice(i * size, (i + 1) * size) for i in range(config.accumulate)]
    micro_batches = [[select_samples(each, part) for each in whole] for part in parts]
    found: list[Losses] = []
    for clean, condition, features, draws in micro_batches:
        last = len(found) + 1 == len(micro_batches)
        with contextlib.nullcontext() if last else without_reduction(module):
            with autocast(device, config.precision):
                averaged = None if network is None else objective.averaged(network, clean, condition, draws)
                losses = module(clean, condition, features, draws, weights, averaged)
            state.guard.scaled(losses.total.mean() / config.accumulate).backward()
        # Detached; otherwise the graphs of all micro-batches would stay in memory.
        found.append(Losses(losses.total.detach(), losses.terms))
    return Losses(
        torch.cat([losses.total for losses in found]),
        {name: torch.cat([losses.terms[name] for losses in found]) for name in found[0].terms},
    )


@torch.no_grad()
def _latents(batch: Batch, autoencoder: Autoencoder, seed: int, step: int) -> Tensor:
    """Clean latents (N, C, h, w), sampled again from the posterior at every step with draws of the global batch."""
    moments = batch.moments
    if moments is None:
        assert batch.images is not None  # the loader reads one of them
        moments = autoencoder.encode(batch.images)
    if not autoencoder.stochastic:
        return autoencoder.sample(moments)
    # Sampled for the global batch; each process uses its part, so the result does not depend on the number of processes.
    num, shape = len(moments), (autoencoder.channels, *moments.shape[2:])
    stream = generator(seed, "posterior", step, device=moments.device)
    noise = torch.randn((dist.world() * num, *shape), generator=stream, device=moments.device)
    return autoencoder.sample(moments, noise=noise[dist.rank() * num : (dist.rank() + 1) * num])


class Due(NamedTuple):
    """What follows a step, besides its log entry."""

    hooks: list[Hook]
    snapshot: bool
    checkpoint: bool

    @property
    def anything(self) -> bool:
        return bool(self.hooks) or self.snapshot or self.checkpoint


def _due(config: TrainConfig, step: int, hooks: Sequence[Hook], *, ends: bool, saves: bool) -> Due:
    """`ends`: this is the last step; `saves`: a signal or the clock asks for a checkpoint."""
    return Due(
        hooks=[hook for hook in hooks if ends or _is_due(hook.every, step)],
        snapshot=_is_due(config.snapshot_every, step),
        checkpoint=ends or saves or _is_due(config.save_every, step) or _is_due(config.keep_every, step),
    )


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
