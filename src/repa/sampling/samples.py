"""From seeds to images. Image i depends only on (seed, i), not on the batch, the number of processes, or restarts.

Each image has its own random stream. Only rounding remains: matrix products of another batch size may round differently,
which changes pixels by single grey levels (on a CPU only for a batch of one).
"""

import inspect
from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from repa.autoencoders import load_decoder
from repa.autoencoders.contract import not_finite
from repa.base.device import DTYPES, Float32Default, autocast
from repa.base.errors import UserError, require_type
from repa.base.registry import parse_spec
from repa.base.rng import SampleStreams
from repa.diffusion import SAMPLERS
from repa.diffusion.denoiser import CountedCalls
from repa.diffusion.samplers import Callback
from repa.runs import LoadedRun, load_run
from repa.sampling.config import SampleConfig
from repa.sampling.inputs import draw_labels, guide_of, prompts_of, with_shared_encoder


class Samples(NamedTuple):
    """Images uint8 (N, 3, H, W) on the CPU, and the NFE (a guided evaluation counts once)."""

    images: Tensor
    nfe: int


def prepared(run: LoadedRun, config: SampleConfig, device: torch.device | str = "cpu") -> LoadedRun:
    """The run with all inputs of sampling: prompts, another decoder, a weaker run and a guide image."""
    own = run.autoencoder  # the weak network uses the same latents, whichever decoder is chosen
    if config.decoder:
        decoder = load_decoder(config.decoder, own, weights=config.decoder_weights or None, device=device)
        run = replace(run, autoencoder=decoder)
    if config.decoder_precision != "fp32" and not any(True for _ in run.autoencoder.parameters()):
        raise UserError(
            f"--decoder-precision {config.decoder_precision} has no effect: {run.autoencoder.name} has no weights. Leave it out."
        )
    if config.weak:
        step = None if config.weak_checkpoint < 0 else config.weak_checkpoint
        run = run.with_weak(load_run(config.weak, config.weak_weights, step=step, autoencoder=own, device=device))
    if any(parse_spec(spec)[0] == "representation" for spec in config.guidance):
        run = replace(run, guide=guide_of(run, config, device))
    run = replace(run, prompts=prompts_of(run, config, device))
    # Last: it samples a few images, so everything else must be ready.
    if config.encoder_steps:
        run = with_shared_encoder(run, config, draw)
    if torch.device(device).type == "cuda":
        # cuDNN's layout: without it every convolution transposes its input and output
        run.autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return run


def generate(run: LoadedRun, config: SampleConfig, indices: Sequence[int], callback: Callback | None = None) -> Samples:
    """Images `indices` of the infinite sequence that (run, config) defines; `run` comes from `prepared`.

    `callback` is called at every step, with the state packed by `run.layout`; not by a private sampler without this argument.
    """
    return decode(run, config, draw(run, config, indices, callback))


class SampledState(NamedTuple):
    """The sampler's result for images `indices`."""

    indices: Sequence[int]
    state: Tensor  # packed by `run.layout`
    calls: "Watched"


@Float32Default()
@torch.inference_mode()
def draw(
    run: LoadedRun, config: SampleConfig, indices: Sequence[int], callback: Callback | None = None
) -> SampledState:
    """The sampler's part of `generate`; on CUDA it does not synchronise."""
    require_type(run, LoadedRun, "Sampling needs a run that repa.load_run loaded")
    require_type(config, SampleConfig, "The settings of samples are a SampleConfig")
    require_type(indices, Sized, "The indices are numbers of images such as range(64)")
    run.diffusion.check_sampler(config.sampler)
    device = next(run.model.parameters()).device
    # The order of random numbers is part of the meaning of a seed: noise, then labels, then the sampler's.
    streams = SampleStreams(config.seed, indices, device)
    shapes = run.layout.shapes
    noise = {name: streams.randn(*shape) for name, shape in shapes.items()}  # (N, C, h, w); (N, F)
    labels = draw_labels(config.labels, indices, streams, run)
    sampler = SAMPLERS.build(config.sampler)
    text, negative = (run.prompts.of(indices), run.prompts.negative) if run.prompts else (None, None)
    denoiser = run.denoiser(labels, config.guidance, text=text, negative=negative, most=config.batch_size)
    calls = Watched(denoiser.predict)
    watch = {"callback": callback} if callback and "callback" in inspect.signature(sampler).parameters else {}
    denoiser = replace(denoiser, predict=calls)
    # Only the network's products: autocast does not change the sampler's float64 state.
    with autocast(device, config.precision):
        start = run.layout.pack(noise)
        state = sampler(denoiser, start, config.steps, randn_like=streams.randn_like, **watch)
    return SampledState(indices, SAMPLERS.returned(config.sampler, state, start.shape, "latents"), calls)


@Float32Default()
@torch.inference_mode()
def decode(run: LoadedRun, config: SampleConfig, drawn: SampledState) -> Samples:
    """The decoder's part of `generate`: the images on the CPU. Raises UserError for images that are not finite."""
    drawn.calls.require_finite(drawn.state, drawn.indices, f"{run.folder or 'the run'}, step {run.step}")
    latents = run.layout.unpack(drawn.state)["x"]  # (N, C, h, w)
    dtype = DTYPES[config.decoder_precision]
    return Samples(run.autoencoder.decode(latents.float(), dtype).cpu(), drawn.calls.calls)


class Watched(CountedCalls):
    """A counted network that records at which call each image stopped being finite, on its device and without synchronisation."""

    def __init__(self, predict: Callable[..., Tensor]):
        super().__init__(predict)
        self.first: Tensor | None = None  # (N,) calls, counted from 1; 0: none

    def __call__(self, *arguments: object) -> Tensor:
        output = super().__call__(*arguments)
        # All on the device: reading a number here would synchronise at every step.
        bad = ~output.isfinite().flatten(1).all(1)  # (N,)
        first = torch.zeros_like(bad, dtype=torch.int32) if self.first is None else self.first
        self.first = torch.where((first == 0) & bad, self.calls, first)
        return output

    def require_finite(self, latents: Tensor, indices: Sequence[int], what: str) -> None:
        """Raises UserError with the first image of latents (N, C, h, w) that is not finite, and the call at which it began."""
        if not (bad := not_finite(latents)):
            return
        call = int(self.first[bad[0]]) if self.first is not None else 0
        when = f"from network call {call} of {self.calls} on" if call else "in the sampler's own arithmetic"
        raise UserError(
            f"Image {indices[bad[0]]} of {what} is not finite, {when}: {len(bad)} of {len(indices)} images are lost. Choose a smaller "
            "guidance scale, another sampler or precision fp32. If that does not help, the weights are damaged."
        )
