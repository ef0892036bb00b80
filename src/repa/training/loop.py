"""The training loop: reads top to bottom, waits for the device only on steps that log."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repa.autoencoders import Autoencoder, load_autoencoder
from repa.base import dist
from repa.base.errors import UserError
from repa.base.precision import autocast
from repa.base.rng import generator
from repa.data import Batch, DataSet, Loader
from repa.runs import MetricsLog, layout
from repa.training.config import TrainConfig
from repa.training.resolve import claim_folder, resolve
from repa.training.starting import begins
from repa.training.state import TrainState, build_state
from repa.training.targets import Targets


class Hook(NamedTuple):
    """Something to do every so many steps and at the end, given by whoever starts the training (previews, metrics)."""

    every: int
    run: Callable[[TrainState], dict[str, Any]]  # values for a metrics row of kind "eval"


@dataclass(frozen=True)
class Finished:
    """How a call of `train` ended."""

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
    """Train, or continue, the run in folder `run` until config.num_steps.

    Continuing is the same call and bit-exact: all randomness is a function of (seed, step). `make_hooks` gets the resolved
    configuration and the autoencoder. `progress` is called after every step and must not touch the device.
    """
    config = resolve(config, data, device)
    new = begins(run)
    targets = Targets(config, data, device)
    state = build_state(config, targets.dims, device, begins=new)
    if dist.is_main():
        claim_folder(run, config, data)
    dist.barrier()
    state.resume(run)
    if state.step >= config.num_steps:
        say(f"{run} is complete: {state.step:,} of {config.num_steps:,} steps.")
        return Finished(state.step)

    for note in targets.notes:
        say(note)
    autoencoder = load_autoencoder(config.autoencoder, weights=config.autoencoder_weights or None, device=device)
    hooks = make_hooks(config, autoencoder)
    log = MetricsLog(run, state.step)
    started = f"from step {state.step} on {dist.world()} x {device}, {config.precision}, torch {torch.__version__}"
    log.line(started)
    log.row("event", state.step, message=started)
    loader = Loader(
        data, batch_size=config.batch_size, seed=config.seed, features=targets.cached, images=targets.needs_images(data),
        rank=dist.rank(), world=dist.world(), device=device,
    )  # fmt: skip
    objective = _wrap(state.objective, device)
    groups = state.objective.trained_groups()
    if config.precision == "bf16":
        torch.set_float32_matmul_precision("high")  # TF32 for the float32 products that remain; fp32 means float32
    finite = torch.ones((), dtype=torch.bool, device=device)
    since, since_step, images = time.perf_counter(), state.step, loader.iterate(state.step)

    with contextlib.closing(log), contextlib.closing(images), _signals() as caught:
        for batch in images:
            x = _latents(batch, autoencoder, config.seed, state.step)
            with autocast(device, config.precision):
                features = targets(batch, state.objective.targets(state.step))
                losses = objective(x, batch.labels, features, state.step)
            losses.total.mean().backward()
            norms = [nn.utils.clip_grad_norm_(group, config.optimizer.max_grad_norm) for group in groups]
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.ema.update()
            state.step += 1
            finite &= torch.isfinite(torch.stack(norms)).all()  # a non-finite loss makes its norm so; no wait here

            stop = _agree(bool(caught), state.step, device)
            last = state.step == config.num_steps
            hooks_due = [hook for hook in hooks if state.step % hook.every == 0 or last]
            save_due = last or stop or state.step % config.save_every == 0
            if state.step % config.log_every == 0 or save_due or hooks_due:
                row = _reduce(losses, norms[0], finite)  # waits for the device
                elapsed, since = time.perf_counter() - since, time.perf_counter()
                state.seconds += elapsed
                rate = config.batch_size * (state.step - since_step) / elapsed
                since_step = state.step
                _require_finite(row, state, run)
                state.metrics = {**row, "images_per_second": rate}
                log.line(
                    f"step {state.step}/{config.num_steps}: denoising loss {row['denoising']:.4f}, {rate:.1f} images/s"
                )
                log.row("train", state.step, seconds=state.seconds, **_nested(state.metrics),
                        learning_rate=config.optimizer.learning_rate)  # fmt: skip
            progress(state)
            for hook in hooks_due:
                values = hook.run(state)
                log.row("eval", state.step, **{"seconds": state.seconds, **values})
            if save_due:
                if dist.is_main():
                    state.save(run, config.keep_checkpoints)
                dist.barrier()
            if hooks_due or save_due:
                since = time.perf_counter()
            if last or stop:
                break
    return Finished(state.step, caught[0] if caught else None if last else signal.SIGTERM)


def _wrap(objective: nn.Module, device: torch.device) -> nn.Module:
    if not dist.active():
        return objective
    return DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


@torch.no_grad()
def _latents(batch: Batch, autoencoder: nn.Module, seed: int, step: int) -> Tensor:
    """Clean latents (N, C, h, w), sampled anew from the posterior at every step with draws of the global batch."""
    moments = batch.moments if batch.moments is not None else autoencoder.encode(batch.images)
    num, channels = len(moments), moments.shape[1] // 2
    stream = generator(seed, "posterior", step, device=moments.device)
    noise = torch.randn((dist.world() * num, channels, *moments.shape[2:]), generator=stream, device=moments.device)
    return autoencoder.sample(moments, noise=noise[dist.rank() * num : (dist.rank() + 1) * num])


def _reduce(losses: Any, norm: Tensor, finite: Tensor) -> dict[str, float]:
    """Means over the global batch as Python numbers: the one place that waits for the device."""
    names = ["loss", *losses.terms]
    means = torch.stack([losses.total.detach().mean(), *(term.mean() for term in losses.terms.values())])
    values = dist.mean_over(means).tolist()
    return {**dict(zip(names, values, strict=True)), "grad_norm": float(norm), "finite": float(finite)}


def _require_finite(row: dict[str, float], state: TrainState, run: Path) -> None:
    if row.pop("finite"):
        return
    steps = layout.checkpoint_steps(run)
    raise UserError(
        f"The loss or its gradient is not finite by step {state.step} (loss {row['loss']}, gradient norm {row['grad_norm']}): "
        f"training stopped and wrote nothing of it. {f'The checkpoint of step {steps[-1]} is good. ' if steps else ''}"
        "Look at the data, or start another --out with a lower --optimizer.learning-rate, --precision fp32 or --model.qk-norm."
    )


def _nested(values: dict[str, float]) -> dict[str, Any]:
    """'alignment/tiny@3' becomes {'alignment': {'tiny@3': ...}}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        room, _, rest = name.partition("/")
        if rest:
            out.setdefault(room, {})[rest] = value
        else:
            out[name] = value
    return out


def _agree(stop: bool, step: int, device: torch.device) -> bool:
    """Whether to stop now. Several processes ask each other every tenth step only: asking costs a wait."""
    if not dist.active():
        return stop
    return step % 10 == 0 and dist.any_process(stop, device)


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM instead of dying; a second Ctrl-C stops at once."""
    caught: list[signal.Signals] = []

    def remember(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook, a test): signals are not ours to handle
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
