"""Inputs of a step besides the latents: encoder features, conditions, and the time spent waiting for them."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch

from repa.alignment import AlignmentConfig
from repa.alignment.targets import Need, merged_needs, needs_of
from repa.base.device import DTYPES, HALF, autocast
from repa.base.errors import UserError
from repa.base.registry import parse_spec
from repa.conditions import Text, load_text_encoder
from repa.conditions.contract import TextEncoder
from repa.data import Batch, DataSet
from repa.data.dataset import require_same_encoder
from repa.encoders import load_encoder
from repa.encoders.contract import Features, VisionEncoder
from repa.models import Condition
from repa.models.config import reads_text
from repa.training.config import TrainConfig

Item = TypeVar("Item")
Wanted = Callable[[int], Sequence[Need]]  # step -> encoder features that it needs


class EncoderFeatures:
    """Features by encoder name for a batch.

    Stored features are used if the data have all that the run needs of an encoder; otherwise the encoder runs on the
    images, in inference mode and in the precision of the run. On CUDA it runs one batch ahead on another stream.
    """

    def __init__(self, config: TrainConfig, data: DataSet, device: torch.device):
        self.wanted = wanted = encoder_needs(config)
        self.cached = tuple(need.encoder for need in wanted if _has_stored(data, need))
        self.pooled = any(need.pooled for need in wanted)
        missing = [need for need in wanted if need.encoder not in self.cached]
        if missing and not data.has_images:
            names = " ".join(need.encoder for need in wanted)
            raise UserError(_missing_sentence(data, missing[0], names))
        self.grid = config.model.latent_size // config.model.dims().patch_size
        self.notes = [
            f"The stored tokens of {name!r} have a grid of {data.features[name].grid} and are resampled to the network's "
            f"{self.grid}; `repa prepare --grid {self.grid}` stores them at that size."
            for name in self.cached
            if data.features[name].grid != self.grid
        ]
        self.device, self.precision, self.latents_of_images = device, config.precision, not data.has_moments
        self.encoders = {need.encoder: _load(need.encoder, config, data, device) for need in missing}
        for name, encoder in self.encoders.items():
            # Stored patches may be combined with computed attention: both need the same weights.
            require_same_encoder(data, name, encoder)
            if config.precision in HALF:
                encoder.round_weights(DTYPES[config.precision])
            # Compiles the inner network, because the encoder around it copies images to the device and checks their shape.
            if config.compile:
                encoder.net.compile()
        self.dims = {name: data.features[name].dim for name in self.cached} | {
            name: encoder.dim for name, encoder in self.encoders.items()
        }
        self.stream = torch.cuda.Stream(device) if self.encoders and device.type == "cuda" else None

    def stored(self, needs: Sequence[Need]) -> tuple[str, ...]:
        """Encoders among `needs` with stored features, which are read with the batch."""
        return tuple(need.encoder for need in needs if need.encoder in self.cached)

    def reads_images(self, needs: Sequence[Need]) -> bool:
        """Whether a step with these `needs` needs images too: for an encoder, or as latents."""
        return self.latents_of_images or self._runs_encoder(needs)

    def __call__(self, batch: Batch, needs: Sequence[Need]) -> dict[str, Features]:
        """Features of the encoders in `needs`; the others are not run."""
        found = {}
        for need in needs:
            if need.encoder in self.cached:
                found[need.encoder] = batch.features[need.encoder]
                continue
            with torch.inference_mode(), autocast(self.device, self.precision):
                computed = self.encoders[need.encoder](batch.images, self.grid, need.attention)
            # Copies made outside are ordinary tensors, which the alignment may save for its backward.
            found[need.encoder] = (computed if need.pooled else computed._replace(pooled=None)).map(torch.clone)
        return found

    def iterate(
        self, batches: Iterable[Batch], step: int, wanted: Wanted
    ) -> Iterator[tuple[Batch, dict[str, Features]]]:
        """Each batch of the steps `step`, `step` + 1, ... with the features that its step needs."""
        checked: set[str] = set()
        started = (self._start_features(batch, wanted(number)) for number, batch in enumerate(batches, step))
        for batch, features, computed in prefetched(started) if self.stream else started:
            if computed is not None:
                torch.cuda.current_stream(self.device).wait_event(computed)
            # Once per encoder, because it synchronises; later the guard skips a step that is not finite. An encoder whose weight
            # warms up from 0 is checked after the first step.
            for name in sorted(features.keys() - checked):
                self._require_finite(name, features[name])
            checked |= features.keys()
            yield batch, features

    def _require_finite(self, name: str, features: Features) -> None:
        tensors = (features.patches, features.pooled, *(features.attention or {}).values())
        if not all(bool(x.isfinite().all()) for x in tensors if x is not None):
            origin = "stored with the data" if name in self.cached else "computed now"
            raise UserError(
                f"Features of {name!r}, {origin}, are not finite: check the weights of the encoder, and run `repa check DATA --full`."
            )

    def _runs_encoder(self, needs: Sequence[Need]) -> bool:
        return any(need.encoder in self.encoders for need in needs)

    def _start_features(
        self, batch: Batch, needs: Sequence[Need]
    ) -> tuple[Batch, dict[str, Features], "torch.cuda.Event | None"]:
        """The features of a batch; on CUDA they are being computed, and the event marks their completion."""
        if self.stream is None or not self._runs_encoder(needs):
            return batch, self(batch, needs), None
        main = torch.cuda.current_stream(self.device)
        # The images are copied to the device on the main stream, so this stream must wait for the copy.
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            features = self(batch, needs)
        assert batch.images is not None  # which the encoders just saw
        # The allocator knows only the stream that created a tensor: recording the other one keeps it from reusing the memory
        # before both are done.
        batch.images.record_stream(self.stream)
        for found in features.values():
            for x in (found.patches, found.pooled, *(found.attention or {}).values()):
                if x is not None:
                    x.record_stream(main)
        return batch, features, self.stream.record_event()


def prefetched(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each requested before the previous one is returned."""
    items = iter(items)
    for front in items:
        for following in items:
            yield front
            front = following
        yield front


def encoder_needs(config: TrainConfig) -> tuple[Need, ...]:
    """All encoder features that a run needs."""
    return merged_needs([*needs_of(config.alignments), *(Need(s.source, pooled=True) for s in config.streams)])


def idle_with(config: TrainConfig, data: DataSet) -> dict[str, str]:
    """`config.idle` for settings that depend on the data: local weights of encoders that this run never computes."""
    running = [need.encoder for need in encoder_needs(config) if not _has_stored(data, need)]
    running += [config.preview.features] * bool(config.preview.scored_every)
    for name in config.feature_weights:
        if name not in running:
            why = f"whose tokens {data.folder} holds" if name in data.features else "which this run does not compute"
            return {"feature_weights": f"for {name}, {why}"}
    return {}


def _has_stored(data: DataSet, need: Need) -> bool:
    """Whether the data has all needed features of an encoder; attention is never stored."""
    facts = data.features.get(need.encoder)
    return facts is not None and not need.attention and (facts.pooled or not need.pooled)


def _load(name: str, config: TrainConfig, data: DataSet, device: torch.device) -> VisionEncoder:
    """An encoder whose tokens are not stored; if it cannot be loaded, the error names the encoders whose tokens are."""
    try:
        return load_encoder(name, weights=config.feature_weights.get(name), device=device)
    except UserError as error:
        terms = [k for k, term in enumerate(config.alignments) if parse_spec(term.target)[0] == name]
        if not (terms and data.features):
            raise
        change = f"--alignments.{terms[0]}.target {next(iter(data.features))}"
        stored = ", ".join(data.features)
        target = " If it is a target, set is_target = True on the function." if "." in name else ""
        raise UserError(f"{error}{target} Or align to stored tokens ({stored}): {change}.") from error


def _missing_sentence(data: DataSet, need: Need, names: str) -> str:
    if need.encoder in data.features:
        what = "attention" if need.attention else "vectors of whole images"
        return (
            f"A term needs {what} of {need.encoder!r}, but the data in {data.folder} has neither these nor images: "
            "run `repa prepare` with --store-images true."
        )
    return (
        f"The data in {data.folder} has neither tokens of {need.encoder!r} nor images: "
        f"run `repa prepare` with --features {names}."
    )


def text_encoder_of(config: TrainConfig, data: DataSet) -> str:
    """The text encoder of a run: the requested one, or else that of the stored tokens; "" for a network that reads no text.

    Raises:
        UserError: the network reads text but the data has none, or it reads no text but a text encoder is given.
    """
    stored = data.manifest.config.text if data.text else ""
    if not reads_text(config.model.backbone) and not config.text:
        return ""
    if not data.has_captions:
        raise UserError(
            f"The backbone {config.model.backbone!r} reads text, but the data in {data.folder} has no captions: prepare data "
            "with captions and --text NAME."
        )
    if not (config.text or stored):
        raise UserError(
            f"The backbone {config.model.backbone!r} reads text, but the data in {data.folder} has captions without tokens: run "
            f"`repa prepare {data.folder} --only text --text NAME`, or give --text NAME to encode them while training."
        )
    return config.text or stored


class TextConditions:
    """Conditions of batches. Tokens are read with the batch if the data has this encoder's; otherwise it encodes the captions.

    Attributes:
        reads: input from the loader: "" nothing, "tokens", or "captions".
        identity: identity of the text encoder, which the run records; None without text.
        empty: tokens of the empty text, the null condition; None without text, or if only targets read text.
        width: width of the tokens; 0 without text.
    """

    def __init__(self, config: TrainConfig, data: DataSet, device: torch.device):
        self.device, self.precision, self.width = device, config.precision, 0
        self.encoder: TextEncoder | None = None
        self.reads: Literal["", "tokens", "captions"] = ""
        self.identity: dict[str, Any] | None = None
        self.empty: Text | None = None
        if not config.text:
            if any(parse_spec(term.target)[0] == "text" for term in config.alignments):
                self._read_text_for_targets(data)
            return
        if data.text and data.manifest.config.text == config.text:
            self.reads, self.identity = "tokens", data.text.identity
            self.empty = data.texts.empty().unpacked().map(lambda x: x.to(device))
        else:
            self.encoder = load_text_encoder(config.text, weights=config.text_weights or None, device=device)
            self.reads, self.identity = "captions", self.encoder.identity
            if config.precision in HALF:
                self.encoder.round_weights(DTYPES[config.precision])
            self.empty = self._encode(self.encoder, [""])
        self.width = self.empty.tokens.shape[2]

    def completed(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the shape of the text, for the network and for terms with the target text."""
        if self.width:
            config = config.override(alignments=[_with_text_width(term, self.width) for term in config.alignments])
        if self.empty is None:
            return config
        found, asked = tuple(self.empty.tokens.shape[1:]), config.model.text_shape
        if asked != (0, 0) and asked != found:
            raise UserError(f"--model.text-shape is {asked}, but {config.text} gives {found}: leave it out.")
        return config.override(model=config.model.override(text_shape=found))

    def _read_text_for_targets(self, data: DataSet) -> None:
        """Stored tokens, for terms whose target is text, of a network that reads none."""
        if not data.text:
            raise UserError(
                f"A term has the target text, but the data in {data.folder} has no text tokens: run "
                f"`repa prepare {data.folder} --only text --text NAME`, or prepare data with captions."
            )
        self.reads, self.width = "tokens", data.texts.empty().unpacked().tokens.shape[2]

    def __call__(self, batch: Batch) -> Condition:
        """The condition of the images of a batch."""
        if not self.reads:
            return Condition(batch.labels)
        text = self._encode(self.encoder, batch.captions or ()) if self.encoder else batch.text
        assert text is not None  # the loader reads what `reads` says
        return Condition(batch.labels, text.tokens, text.mask)

    def _encode(self, encoder: TextEncoder, texts: Sequence[str]) -> Text:
        with autocast(self.device, self.precision):
            return encoder(texts)


def _with_text_width(term: AlignmentConfig, width: int) -> AlignmentConfig:
    """The target text with the width of the data's tokens."""
    name, settings = parse_spec(term.target)
    return term if name != "text" or "width" in settings else term.override(target=f"text:width={width}")


class TimedIterator(Generic[Item]):
    """Yields an iterator's items and adds up the time spent waiting for them."""

    def __init__(self, items: Generator[Item, None, None]):
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        begin = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - begin

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def close(self) -> None:
        self.items.close()
