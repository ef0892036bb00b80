"""What `repa train` does beside training: previews from the EMA weights and their distance to the training images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repa.autoencoders import Autoencoder, load_decoder
from repa.base import dist, files
from repa.base.images import grid, save_png
from repa.data import DataSet
from repa.encoders import load_encoder
from repa.encoders.loading import weights_for
from repa.evaluation import evaluate, reference_of
from repa.runs import LoadedRun, layout
from repa.sampling import SampleConfig, generate
from repa.training import Hook, TrainConfig, TrainState

BATCH = 250


def preview_hooks(
    run: Path, data: DataSet, device: torch.device
) -> Callable[[TrainConfig, Autoencoder], Sequence[Hook]]:
    """Hooks for `train`: none when the configuration asks for no previews."""

    def make(config: TrainConfig, autoencoder: Autoencoder) -> Sequence[Hook]:
        preview = config.preview
        if not preview.every:
            return ()
        sample = SampleConfig(
            sampler=preview.sampler, steps=preview.num_steps, guidance=preview.guidance, labels="balanced",
            seed=config.seed, precision=config.precision,
        )  # fmt: skip
        if preview.decoder:
            autoencoder = load_decoder(
                preview.decoder, autoencoder, weights=preview.decoder_weights or None, device=device
            )
        judge = reference = None
        if preview.num_scored:
            judge = load_encoder(
                preview.features, weights=weights_for(preview.features, config.feature_weights), device=device
            )
            reference = reference_of(data, judge, preview.features)

        def run_hook(state: TrainState) -> dict[str, Any]:
            loaded = LoadedRun(
                state.ema.model, config.diffusion, autoencoder, state.step, "ema", tuple(data.class_names)
            )
            num = max(preview.num_images, preview.num_scored)
            mine = range(dist.rank(), num, dist.world())
            batches = [generate(loaded, sample, mine[s : s + BATCH]) for s in range(0, len(mine), BATCH)]
            side = data.resolution
            none = torch.empty(
                0, 3, side, side, dtype=torch.uint8
            )  # of a process without any, when there are few images
            images = torch.cat([none, *(batch.images for batch in batches)])
            kept = [(index, image) for index, image in zip(mine, images, strict=True) if index < preview.num_images]
            _save(run, state.step, kept)
            values: dict[str, Any] = {
                "weights": "ema", "sampler": preview.sampler, "steps": preview.num_steps, "nfe": batches[0].nfe if batches else None,
                "guidance": preview.guidance.model_dump(mode="json"), "decoder": preview.decoder or autoencoder.name,
            }  # fmt: skip
            if judge is not None:
                distance = evaluate(images.split(BATCH), judge, reference)["fd"]
                values |= {"frechet_distance": distance, "features": judge.name, "num_samples": num}
            return values

        return (Hook(preview.every, run_hook),)

    return make


def _save(run: Path, step: int, kept: Sequence[tuple[int, torch.Tensor]]) -> None:
    """The kept images of every process, in index order, as .npz and .png."""
    rows = [pair for part in dist.gather_objects(list(kept)) for pair in part]
    if not dist.is_main():
        return
    images = torch.stack([image for _, image in sorted(rows, key=lambda row: row[0])])
    with files.atomic_path(layout.preview(run, step, ".npz")) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, arr_0=images.permute(0, 2, 3, 1).numpy())
    save_png(grid(images), layout.preview(run, step, ".png"))
