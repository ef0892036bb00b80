"""Previews during `repa train`: samples from the EMA weights, and their distance to the training images."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repa.autoencoders import Autoencoder, load_decoder
from repa.base import dist, files
from repa.base.arrays import evenly_spaced, save_npz
from repa.base.images import grid, save_png
from repa.conditions import load_text_encoder
from repa.data import DataSet
from repa.evaluation import EvaluateConfig, evaluate, load_extractor, reference_of
from repa.evaluation.images import DataImages
from repa.evaluation.measure import check_number
from repa.evaluation.reference import checksum_of
from repa.runs import LoadedRun, layout
from repa.runs.loading import Prompts
from repa.sampling import SampleConfig, drawn_classes, generate
from repa.training import Hook, TrainConfig, TrainState

BATCH = 250
MOST_PROMPTS = 1000  # whose tokens are kept in memory while a run trains
LOGGED = {"fd": "frechet_distance"}  # names in metrics.jsonl where they differ from those of `repa evaluate`


def preview_hooks(
    run: Path,
    data: DataSet,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Callable[[TrainConfig, Autoencoder], Sequence[Hook]]:
    """Hooks for `train`: none when the configuration asks for no previews and no measurements.

    Args:
        progress: called with a word, how many samples are there, and how many there will be.
        say: called with a line that has the results and the file of the preview.
    """

    def make(config: TrainConfig, autoencoder: Autoencoder) -> Sequence[Hook]:
        preview = config.preview
        # Pictures and scores have different intervals; the hook runs at steps of either.
        every = math.gcd(preview.every, preview.scored_every)
        if not every:
            return ()
        if config.num_steps < preview.scored_every:
            say(
                f"note: these {config.num_steps:,} steps end before the first evaluation, at step {preview.scored_every:,}. After "
                f"them {preview.num_scored:,} samples are scored, which may take longer than the steps; --preview.num-scored 0 "
                "leaves this out."
            )
        if preview.decoder:
            weights = preview.decoder_weights or None
            autoencoder = load_decoder(preview.decoder, autoencoder, weights=weights, device=device)
        return (Hook(every, Previews(config, autoencoder, run, data, device, progress, say)),)

    return make


class Previews:
    """Samples of the EMA network, always from the same noise: some are saved, some scored, each at its interval."""

    def __init__(
        self, config: TrainConfig, autoencoder: Autoencoder, run: Path, data: DataSet, device: torch.device,
        progress: Callable[[str, int, int], None], say: Callable[[str], None],
    ):  # fmt: skip
        self.config, self.autoencoder, self.run, self.data = config, autoencoder, run, data
        self.progress, self.say = progress, say
        self.preview = preview = config.preview
        self.sampling = SampleConfig(
            sampler=preview.sampler, steps=preview.num_steps, guidance=preview.guidance, labels="balanced",
            seed=config.seed, precision=config.precision,
        )  # fmt: skip
        self.prompts = captions_as_prompts(config, data, max(preview.num_images, preview.num_scored), device)
        if preview.scored_every:
            self.metrics = EvaluateConfig(features=preview.features, metrics=preview.metrics).wanted
            check_number(preview.num_scored, self.metrics, "--preview.num-scored")
            weights = config.feature_weights.get(preview.features)
            self.extractor = load_extractor(preview.features, weights=weights, device=device)
            looking = functools.partial(progress, "features of the training images")
            self.reference = reference_of(data, self.extractor, preview.features, looking)
            self.reference_sha256 = checksum_of(DataImages(data))

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """Values of a log entry of kind "eval"."""
        drawn, scored = (self._due(every, state.step) for every in (self.preview.every, self.preview.scored_every))
        num_drawn, num_scored = drawn * self.preview.num_images, scored * self.preview.num_scored
        kept: list[tuple[int, Tensor]] = []
        nfe: set[int] = set()

        def made(num: int) -> Iterator[Tensor]:
            """This process's share of images 0 ... num - 1, batch by batch; only those of the preview stay in memory."""
            mine = range(dist.rank(), num, dist.world())
            for start in range(0, len(mine), BATCH):
                indices = mine[start : start + BATCH]
                batch = generate(loaded, self.sampling, indices)
                nfe.add(batch.nfe)
                kept.extend(
                    (index, image) for index, image in zip(indices, batch.images, strict=True) if index < num_drawn
                )
                yield batch.images
                doing = "generating and scoring samples" if num_scored else "making samples"
                self.progress(doing, min((start + len(indices)) * dist.world(), num), num)

        values: dict[str, Any] = {
            "weights": "ema", "sampler": self.preview.sampler, "steps": self.preview.num_steps, "labels": self.sampling.labels,
            "guidance": list(self.preview.guidance), "decoder": self.preview.decoder or self.autoencoder.name,
        }  # fmt: skip
        with state.full_average() as model:
            names = tuple(self.data.class_names)
            loaded = LoadedRun(
                model, self.config.diffusion, self.autoencoder, state.step, "ema", names, label_dropout=self.config.label_dropout,
                class_counts=tuple(self.data.manifest.class_counts), text=self.config.text, prompts=self.prompts,
            )  # fmt: skip
            images = made(max(num_drawn, num_scored))
            if scored:
                found = evaluate(_first(images, num_scored), self.extractor, self.reference, self.metrics)
                values |= {LOGGED.get(name, name): value for name, value in found.items()}
                values |= {
                    "features": self.preview.features,
                    "encoder": self.extractor.identity,
                    "num_samples": num_scored,
                }
                values |= {"reference": Path(self.data.folder).name, "reference_sha256": self.reference_sha256}
            # Samples are generated lazily: these are the ones that are saved but not scored.
            for _ in images:
                pass
        if drawn:
            classes = () if self.prompts else drawn_classes(self.sampling.labels, loaded)
            _save(self.run, state.step, kept, classes, self.prompts)
        self.say(self._sentence(state.step, values, drawn))
        return {**values, "nfe": max(nfe, default=None)}

    def _sentence(self, step: int, values: dict[str, Any], drawn: bool) -> str:
        """Line with the results and the file of the preview."""
        parts = []
        if "num_samples" in values:
            measured = ", ".join(f"{name} {values[LOGGED.get(name, name)]:.4g}" for name in self.metrics)
            parts.append(f"{measured} ({values['num_samples']:,} samples in the features of {values['features']})")
        if drawn:
            parts.append(f"preview in {layout.preview(self.run, step, '.png')}")
        return f"{self.run.name}, step {step:,}: {'; '.join(parts)}"

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.num_steps)


def _first(images: Iterator[Tensor], num: int) -> Iterator[Tensor]:
    """Batches of this process's share of the first `num` images."""
    left = len(range(dist.rank(), num, dist.world()))
    while left > 0:
        batch = next(images)[:left]
        left -= len(batch)
        yield batch


def captions_as_prompts(config: TrainConfig, data: DataSet, num: int, device: torch.device) -> Prompts | None:
    """First captions of evenly spaced images, at most MOST_PROMPTS, for a run that reads text; None for others."""
    if not config.text:
        return None
    rows = evenly_spaced(len(data.originals), min(num, MOST_PROMPTS))
    texts = [next(iter(captions), "") for captions in data.captions(rows)]
    if data.text and data.manifest.config.text == config.text:
        text = data.texts.gather(rows).unpacked()
    else:
        text = load_text_encoder(config.text, weights=config.text_weights or None, device=device)(texts)
    # On the CPU between previews, because training needs the memory of a thousand prompts' tokens.
    text = text.map(lambda x: x.cpu())
    return Prompts(texts, lambda numbers: text.map(lambda x: x[torch.tensor(numbers)].to(device)))


def _save(
    run: Path, step: int, kept: Sequence[tuple[int, Tensor]], classes: Sequence[int], prompts: Prompts | None
) -> None:
    """Write the preview images of all processes in index order as .npz and .png, with their classes, or their prompts once."""
    # Process i modulo world generates image i, so the shares are interleaved in the order of the indices.
    rows = [pair for part in dist.gather_objects(list(kept)) for pair in part]
    if not dist.is_main():
        return
    images = torch.stack([image for _, image in sorted(rows, key=lambda row: row[0])])
    if prompts:
        files.write_json(layout.prompts_file(run), prompts.texts_of(range(len(images))))
    labels = {"labels": np.resize(np.array(classes, np.int64), len(images))} if classes else {}
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy(), **labels}
    save_npz(layout.preview(run, step, ".npz"), arrays, compressed=True)
    save_png(grid(images), layout.preview(run, step, ".png"))
