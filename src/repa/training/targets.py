"""Where the target tokens of a step come from: the shards, or the encoder run on the batch's images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from repa.base.errors import UserError
from repa.base.precision import DTYPES, autocast
from repa.data import Batch, DataSet
from repa.encoders import load_encoder
from repa.encoders.contract import Features
from repa.encoders.loading import weights_for
from repa.training.config import TrainConfig

Item = TypeVar("Item")
Wanted = Callable[[int], Sequence[str]]  # step -> encoders whose tokens it needs


class Targets:
    """Tokens by encoder name for a batch.

    Cached tokens are used where the data has them; otherwise the encoder is loaded and run on the images, under inference
    mode and in the precision of the run. On CUDA it runs one batch ahead, on a stream of its own.
    """

    def __init__(self, config: TrainConfig, data: DataSet, device: torch.device):
        wanted = list(dict.fromkeys(a.target for a in config.alignments))
        self.cached = tuple(name for name in wanted if name in data.features)
        missing = [name for name in wanted if name not in self.cached]
        if missing and not data.has_images:
            raise UserError(
                f"The data in {data.folder} has neither tokens of {missing[0]!r} nor images to make them from: "
                f"run `repa prepare` with --features {' '.join(wanted)}."
            )
        self.grid = config.model.latent_size // config.model.dims().patch_size
        self.notes = [
            f"The stored tokens of {name!r} form a grid of {data.features[name].grid} and are resampled to the network's "
            f"{self.grid}; `repa prepare --grid {self.grid}` stores them at that size."
            for name in self.cached
            if data.features[name].grid != self.grid
        ]
        self.device, self.precision, self.latents_of_images = device, config.precision, not data.has_moments
        self.encoders = {
            name: load_encoder(name, weights=weights_for(name, config.feature_weights), device=device)
            for name in missing
        }
        for encoder in self.encoders.values():
            if config.precision in DTYPES:
                encoder.round_weights(DTYPES[config.precision])
            if config.compile:
                encoder.net.compile()
        self.dims = {name: data.features[name].dim for name in self.cached} | {
            name: encoder.dim for name, encoder in self.encoders.items()
        }
        self.stream = torch.cuda.Stream(device) if self.encoders and device.type == "cuda" else None

    def stored(self, names: Sequence[str]) -> tuple[str, ...]:
        """Encoders among `names` whose tokens are to be read with the batch."""
        return tuple(name for name in names if name in self.cached)

    def reads_images(self, names: Sequence[str]) -> bool:
        """Whether a step that needs the tokens of `names` needs images too: for an encoder, or as latents."""
        return self.latents_of_images or self._computes(names)

    def __call__(self, batch: Batch, names: Sequence[str]) -> dict[str, Features]:
        """Tokens of the encoders in `names`; the others are not run."""
        with torch.inference_mode(), autocast(self.device, self.precision):
            computed = {
                name: self.encoders[name](batch.images, self.grid).patches for name in names if name not in self.cached
            }
        # copies made outside are ordinary tensors, which the alignment may save for its backward
        fresh = {name: Features(patches.clone(), None) for name, patches in computed.items()}
        return {name: batch.features[name] if name in self.cached else fresh[name] for name in names}

    def along(self, batches: Iterable[Batch], step: int, wanted: Wanted) -> Iterator[tuple[Batch, dict[str, Features]]]:
        """Each batch of the steps `step`, `step` + 1, ... with the tokens that its step needs."""
        started = (self._start(batch, wanted(number)) for number, batch in enumerate(batches, step))
        for batch, features, computed in one_ahead(started) if self.stream else started:
            if computed is not None:
                torch.cuda.current_stream(self.device).wait_event(computed)
            yield batch, features

    def _computes(self, names: Sequence[str]) -> bool:
        return any(name in self.encoders for name in names)

    def _start(
        self, batch: Batch, names: Sequence[str]
    ) -> tuple[Batch, dict[str, Features], "torch.cuda.Event | None"]:
        """The tokens of a batch, or on CUDA the promise of them: the event tells when they are there."""
        if self.stream is None or not self._computes(names):
            return batch, self(batch, names), None
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)  # the images must have arrived
        with torch.cuda.stream(self.stream):
            features = self(batch, names)
        batch.images.record_stream(self.stream)  # no memory is reused before the other stream is done with it
        for patches, _ in features.values():
            patches.record_stream(main)
        return batch, features, self.stream.record_event()


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each asked for before the one in front of it is handed out."""
    items = iter(items)
    for front in items:
        for following in items:
            yield front
            front = following
        yield front
