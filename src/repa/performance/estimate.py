"""Cost of a run before any download or training: FLOPs, memory, disk and time.

torch counts FLOPs on networks without weights; the time is those FLOPs at a rate that the caller passes.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from repa.alignment import Alignment, ProjectorContext
from repa.base.config import option
from repa.base.errors import UserError
from repa.base.registry import parse_spec
from repa.data.config import split_format
from repa.diffusion import GUIDANCES, sde_grid
from repa.diffusion.chain import Chain
from repa.models import Condition, build
from repa.models.cost import Cost, cost_of, model_cost
from repa.models.routing import tokens_at
from repa.performance.costs import AutoencoderCost, EncoderCost, autoencoder_cost, autoencoder_outline, encoder_cost
from repa.performance.counts import activation_bytes
from repa.runs.predictions import pass_of
from repa.training.config import TrainConfig
from repa.training.inputs import encoder_needs
from repa.training.resolve import require_equal_parts, steps_of_epochs, with_streams
from repa.training.scaling import faster

FORMS = ("fp16", "int8", "pca256", "pca256-int8")
"""Storage types of tokens that are compared."""
RECOMPUTED = 4 / 3
"""FLOPs of a step with activation checkpointing, which runs the forward pass twice, over one without: (1 + 1 + 2) / (1 + 2)."""


@dataclass(frozen=True)
class Estimate:
    """FLOPs are per image, bytes per image (disk) or per device (memory)."""

    config: TrainConfig
    num_images: int
    num_devices: int
    rate: float  # FLOP/s of a device, as used
    network: Cost  # of training, without the tokens that a route skips
    sampled: int  # of a forward pass of all tokens
    short: int  # of a forward pass without the routed blocks
    projectors: Cost
    encoders: dict[str, EncoderCost]
    autoencoder: AutoencoderCost
    activations: int  # bytes of one image for the backward pass
    tokens: int
    averaged: int  # of the averaged network's forward pass, if a term reads it
    storable: bool  # whether stored features replace every encoder

    @property
    def step_flops(self) -> float:
        """FLOPs of training on one image, without encoders."""
        once = self.network.training + self.projectors.training
        return once * (RECOMPUTED if self.config.checkpoint_activations else 1) + self.averaged

    @property
    def encoder_flops(self) -> int:
        """FLOPs of all encoders on one image."""
        return sum(encoder.cost.forward for encoder in self.encoders.values())

    @property
    def seen(self) -> int:
        """Number of images that the run processes, with repetitions."""
        return self.config.num_steps * self.config.batch_size

    def share(self, encoder: str) -> float:
        """FLOPs of an encoder's forward pass over those of training the network."""
        return self.encoders[encoder].cost.forward / self.network.training

    def training_seconds(self, *, cached: bool) -> float:
        flops = self.step_flops + (0 if cached else self.encoder_flops)
        return self.seen * flops / (self.rate * self.num_devices)

    def preparing_seconds(self, *, cached: bool) -> float:
        """FLOPs of encoding every image once: the autoencoder and, for stored tokens, the encoders."""
        flops = self.autoencoder.cost.forward + (self.encoder_flops if cached else 0)
        return self.num_images * flops / (self.rate * self.num_devices)

    def sampling_flops(self, passes: "Passes") -> int:
        """FLOPs per sample: the network's evaluations and one pass of the decoder."""
        return passes.whole * self.sampled + passes.short * self.short + self.autoencoder.decoding

    def samples_per_second(self, passes: "Passes") -> float:
        """Of all devices together."""
        return self.rate * self.num_devices / self.sampling_flops(passes)

    @property
    def parallel(self) -> str:
        """The strategy, for machines of at most eight devices."""
        if self.config.parallel != "auto":
            return self.config.parallel
        local = min(8, self.num_devices)  # devices of one machine, connected by a fast link
        flops, images = self.step_flops + self.encoder_flops, self.config.batch_size / self.num_devices
        return faster(self.network.parameters, flops, images, self.num_devices // local, local)

    def memory(self, *, cached: bool) -> dict[str, float]:
        """Bytes per device, by content."""
        # FSDP shards within a machine and replicates between machines: see training/parallel.py.
        divided = min(8, self.num_devices) if self.parallel == "fsdp" else 1
        trained = self.network.parameters + self.projectors.parameters
        averages = 1 + len(self.config.ema_decays) + len(self.config.ema_widths)
        images = self.config.batch_size / self.num_devices / self.config.accumulate
        half = self.config.precision != "fp32"
        encoders = sum(encoder.cost.parameters for encoder in self.encoders.values()) * (2 if half else 4)
        return {
            "weights": 4 * trained / divided,  # float32
            "gradients": 4 * trained / divided,
            # Two float32 moments of AdamW; Muon has one for matrices, so this is its upper bound.
            "optimizer": 8 * trained / divided,
            "averages": 4 * averages * self.network.parameters / divided,
            "weights in half precision": 2.0 * trained * half,  # autocast keeps its copies until the end of the step
            "activations": images * self.activations,
            "autoencoder": 4 * self.autoencoder.cost.parameters,
            "encoders": 0 if cached else encoders,
        }

    def moments_bytes(self) -> int:
        """Bytes on disk per image, in float16."""
        return 2 * self.autoencoder.stored_channels * self.config.model.latent_size**2 * self.autoencoder.stores_moments

    def forms(self, encoder: str) -> list[str]:
        """The elements of FORMS in which an encoder's tokens can be stored."""
        return [form for form in FORMS if split_format(form)[0] < self.encoders[encoder].dim]

    def tokens_bytes(self, encoder: str, form: str) -> int:
        """Bytes on disk per image."""
        directions, dtype = split_format(form)
        numbers = directions or self.encoders[encoder].dim
        return self.tokens * (numbers + 4 if dtype == "int8" else 2 * numbers)  # int8: and one float32 scale


def estimate(
    config: TrainConfig, *, num_images: int, num_devices: int, resolution: int, rate: float, num_classes: int
) -> Estimate:
    """Estimate the cost of a run.

    Args:
        config: the run; settings that come from the data are filled in from the other arguments.
        num_images: size of the data set.
        num_devices: number of devices that share the batch.
        resolution: side of the images in pixels.
        rate: FLOP/s of a device in use: its peak times the utilisation.
        num_classes: number of classes of the data set.

    Raises:
        UserError: sizes that do not match, or an encoder or autoencoder that must be loaded and cannot be.
    """
    require_equal_parts(config.batch_size, num_devices, config.accumulate)
    autoencoder = autoencoder_cost(config.autoencoder, resolution, config.autoencoder_weights or None)
    # Training reads these sizes from the data; here they follow from the autoencoder's shape.
    facts = {"latent_size": resolution // autoencoder.factor, "latent_channels": autoencoder.channels}
    for name, value in facts.items():
        if getattr(config.model, name) not in (0, value):
            raise UserError(
                f"{option(f'model.{name}')} is {getattr(config.model, name)}, but {config.autoencoder} encodes {resolution} pixels "
                f"to {value}: give another --resolution or --autoencoder."
            )
    model = config.model.override(**facts, num_classes=config.model.num_classes or num_classes)
    shape = (model.latent_channels, model.latent_size, model.latent_size)
    config = config.override(
        model=model, diffusion=config.diffusion.for_latents(shape), num_steps=steps_of_epochs(config, num_images)
    )
    grid = model.latent_size // model.dims().patch_size
    needs = encoder_needs(config)
    names = [need.encoder for need in needs]
    encoders = {name: encoder_cost(name, grid, config.feature_weights.get(name)) for name in names}
    dims = {name: encoder.dim for name, encoder in encoders.items()}
    config = with_streams(config, dims)
    each, has_route = config.diffusion.token_times > 0, bool(config.model.route)
    network = model_cost(config.model, token_times=each)
    # Without a route or token times all passes cost the same; each count takes seconds.
    sampled = model_cost(config.model, kept="all").forward if each or has_route else network.forward
    return Estimate(
        config=config, num_images=num_images, num_devices=num_devices, rate=rate,
        network=network, sampled=sampled,
        short=model_cost(config.model, kept="none").forward if has_route else sampled, averaged=_averaged_flops(config),
        storable=bool(needs) and not any(need.attention for need in needs),
        projectors=_projector_cost(config, dims), encoders=encoders, autoencoder=autoencoder,
        activations=activation_bytes(config, dims), tokens=grid**2,
    )  # fmt: skip


class Passes(NamedTuple):
    """Network evaluations per sample."""

    whole: int  # evaluations of all blocks
    short: int = 0  # evaluations that skip the routed blocks


def side_of(config: TrainConfig) -> int:
    """Side of the images for the configuration's latent size; 256 if the size comes from the data."""
    if not config.model.latent_size:
        return 256
    return config.model.latent_size * autoencoder_outline(config.autoencoder, config.autoencoder_weights or None).factor


def passes_of(steps: int, guidance: Sequence[str], shift: float = 1.0) -> Passes:
    """Evaluations of euler_maruyama: one per step, and those of the guidances at that time."""
    # One pass gives several predictions: the heads are computed with the conditional one.
    chain = Chain([GUIDANCES.build(spec) for spec in guidance])
    times = sde_grid(steps, shift=shift).tolist()[:-1]
    asked = Counter(name for t in times for name in {pass_of(name) for name in chain.needs(t)})
    return Passes(asked.total() - asked["routed"], asked["routed"])


def _averaged_flops(config: TrainConfig) -> int:
    """FLOPs of one forward pass of the averaged network, or two of a guided frozen one, shared by all terms that read it."""
    targets = [parse_spec(alignment.target) for alignment in config.alignments]
    found = [(name, settings) for name, settings in targets if name in ("ema", "run")]
    if not found:
        return 0
    name, settings = found[0]
    each = config.diffusion.token_times > 0 and not settings.get("cleanest")
    passes = 2 if name == "run" and settings.get("scale") != 1 else 1
    return passes * model_cost(config.model, token_times=each, kept="all").forward


def _projector_cost(config: TrainConfig, dims: dict[str, int]) -> Cost:
    """FLOPs of all alignments. A projector that only measures does not compute the gradient of its input."""
    total = Cost(0, 0, 0)
    width = config.model.dims().hidden_dim
    for alignment in config.alignments:
        with torch.device("meta"):
            model = build(config.model)
            term = Alignment.of(alignment, model, dims)
            if not list(term.parameters()):
                continue
            tokens = tokens_at(model.route, alignment.depth, model.grid)
            hidden = torch.empty(1, tokens, width, requires_grad=not alignment.measure_only)
            context = ProjectorContext(torch.empty(1), Condition(torch.empty(1, dtype=torch.int64)))
        cost = cost_of(term, functools.partial(term.project, hidden, context))
        # Shared: the parameters count for the owning term, the products for each term.
        if alignment.projector_of:
            cost = cost._replace(parameters=0)
        total = Cost(*map(sum, zip(total, cost, strict=True)))
    return total
