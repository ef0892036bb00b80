"""Seeds to images. Image i depends on (seed, i) alone: not on its companions, process count, or restarts.

All draws are each image's own. What is left is arithmetic: matrix products of another batch size may round differently,
which shows as single grey levels (on a CPU only for a batch of one). `write_samples` cuts the same batches for any number
of processes and any restart, so its file is the same to the byte.
"""

import functools
import inspect
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.autoencoders import load_decoder
from repa.autoencoders.contract import not_finite
from repa.base import dist, files
from repa.base.arrays import load_npy, save_npy
from repa.base.errors import UserError
from repa.base.images import grid, save_png
from repa.base.precision import DTYPES, Float32Default, autocast, resolved
from repa.base.registry import parse_spec
from repa.base.rng import SampleStreams
from repa.diffusion import SAMPLERS
from repa.diffusion.denoiser import CountedCalls
from repa.diffusion.samplers import Callback
from repa.runs import LoadedRun, load_run
from repa.sampling.behind import OneBehind
from repa.sampling.conditions import draw_labels, drawn_classes, prompts_of, prompts_record
from repa.sampling.config import SampleConfig
from repa.sampling.folders import write_pngs
from repa.sampling.representation import guide_of
from repa.sampling.sharing import with_shared_encoder

GRID_IMAGES = 64  # in the picture next to the npz


class Samples(NamedTuple):
    """Images uint8 (N, 3, H, W) on the CPU, and how often the sampler asked the network for each (a guided call counts once)."""

    images: Tensor
    nfe: int


def prepared(run: LoadedRun, config: SampleConfig, device: torch.device | str = "cpu") -> LoadedRun:
    """The run with what else sampling needs: prompts, another decoder, a weaker run and an image to guide it."""
    own = run.autoencoder
    if config.decoder:
        decoder = load_decoder(config.decoder, own, weights=config.decoder_weights or None, device=device)
        run = replace(run, autoencoder=decoder)
    if config.weak:
        step = None if config.weak_checkpoint < 0 else config.weak_checkpoint
        run = run.with_weak(load_run(config.weak, config.weak_weights, step=step, autoencoder=own, device=device))
    if any(parse_spec(spec)[0] == "representation" for spec in config.guidance):
        run = replace(run, guide=guide_of(run, config, device))
    run = replace(run, prompts=prompts_of(run, config, device))
    if config.encoder_steps:
        run = with_shared_encoder(run, config, draw)
    if torch.device(device).type == "cuda":
        # cuDNN's layout: without it every convolution transposes its input and output
        run.autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return run


def generate(run: LoadedRun, config: SampleConfig, indices: Sequence[int], callback: Callback | None = None) -> Samples:
    """Images `indices` of the endless sequence that (run, config) defines; `run` as `prepared` gives it.

    `callback` is called at every step, with the state as `run.layout` packs it; a private sampler without such an argument tells nothing.
    """
    return decode(run, config, draw(run, config, indices, callback))


class Drawn(NamedTuple):
    """What a sampler made of the noise of images `indices`."""

    indices: Sequence[int]
    state: Tensor  # as `run.layout` packs it
    calls: "Watched"


@Float32Default()
@torch.inference_mode()
def draw(run: LoadedRun, config: SampleConfig, indices: Sequence[int], callback: Callback | None = None) -> Drawn:
    """The sampler's part of `generate`; on CUDA nothing waits for it."""
    run.diffusion.check_sampler(config.sampler)
    device = next(run.model.parameters()).device
    streams = SampleStreams(config.seed, indices, device)
    shapes = run.layout.shapes
    noise = {name: streams.randn(*shape) for name, shape in shapes.items()}  # (N, C, h, w); (N, F)
    labels = draw_labels(config.labels, indices, streams, run)
    sampler = SAMPLERS.build(config.sampler)
    text, negative = (run.prompts.of(indices), run.prompts.negative) if run.prompts else (None, None)
    denoiser = run.denoiser(labels, config.guidance, text=text, negative=negative, most=config.batch_size)
    calls = Watched(denoiser.predict)
    told = {"callback": callback} if callback and "callback" in inspect.signature(sampler).parameters else {}
    denoiser = replace(denoiser, predict=calls)
    with autocast(device, config.precision):
        state = sampler(denoiser, run.layout.pack(noise), config.steps, randn_like=streams.randn_like, **told)
    return Drawn(indices, state, calls)


@Float32Default()
@torch.inference_mode()
def decode(run: LoadedRun, config: SampleConfig, drawn: Drawn) -> Samples:
    """The decoder's part of `generate`: the images on the CPU. Raises UserError for images that are not finite."""
    drawn.calls.require_finite(drawn.state, drawn.indices, f"{run.folder or 'the run'}, step {run.step}")
    latents = run.layout.unpack(drawn.state)["x"]  # (N, C, h, w)
    dtype = DTYPES[config.decoder_precision]
    return Samples(run.autoencoder.decode(latents.float(), dtype).cpu(), drawn.calls.calls)


class Watched(CountedCalls):
    """A counted network that remembers, on its device and without waiting for it, at which call each image was no longer finite."""

    def __init__(self, predict: Callable[..., Tensor]):
        super().__init__(predict)
        self.first: Tensor | None = None  # (N,) calls, counted from 1; 0: none

    def __call__(self, *arguments: object) -> Tensor:
        output = super().__call__(*arguments)
        bad = ~output.isfinite().flatten(1).all(1)  # (N,)
        first = torch.zeros_like(bad, dtype=torch.int32) if self.first is None else self.first
        self.first = torch.where((first == 0) & bad, self.calls, first)
        return output

    def require_finite(self, latents: Tensor, indices: Sequence[int], what: str) -> None:
        """Raises UserError that names the first image of latents (N, C, h, w) that is not finite, and when that began."""
        if not (bad := not_finite(latents)):
            return
        call = int(self.first[bad[0]]) if self.first is not None else 0
        when = f"from call {call} of {self.calls} of the network on" if call else "in the sampler's own arithmetic"
        raise UserError(
            f"Image {indices[bad[0]]} of {what} is not finite, {when}: {len(bad)} of {len(indices)} images are lost. Choose a smaller "
            "scale of guidance, another sampler or precision fp32; if that does not help, its weights are damaged."
        )


def write_samples(
    run: LoadedRun,
    config: SampleConfig,
    num: int,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    count: Callable[[int, int], None] = lambda nfe, num: None,
    callback: Callback | None = None,
) -> Path:
    """Write `num` samples as `out` (.npz, arr_0 uint8 NHWC, ADM's format; a name without an ending: a folder of PNG files)
    and a PNG grid next to it.

    Finished batches lie in `out`.parts until all are there: the same command continues. Batches are shared over processes.
    `out` with suffix .json says how it was made, .jsonl of which prompt each image is. The same job is not done twice, and
    samples of another are not overwritten.
    `count` is told the network calls per image, and the images, of every batch that this process makes; `callback` each
    of its steps.
    """
    out = Path(out)
    if out.name in ("", ".."):  # the current folder and those above, which have no name to put another ending to
        out = out.resolve()
    if out.suffix not in (".npz", "") or not out.name:
        raise UserError(
            f"Samples are written as one .npz file or as PNG files in a folder, but --out is {out}: give a name such as "
            "samples.npz, or samples for a folder."
        )
    with dist.locked(out, "repa sample"):
        beside = [out.with_suffix(ending).name for ending in (".json", ".jsonl", ".png")]
        dist.on_main(lambda: files.remove_leftovers(out.parent, beside.__contains__))
        return _write_samples(run, config, num, out, progress, count, callback)


def _write_samples(
    run: LoadedRun, config: SampleConfig, num: int, out: Path, progress: Callable[[int, int], None],
    count: Callable[[int, int], None], callback: Callback | None,
) -> Path:  # fmt: skip
    parts, device = out.with_suffix(".parts"), next(run.model.parameters()).device
    config = config.override(precision=dist.on_main(lambda: _precision(config, out, parts, device)))
    job = _job(run, config, num)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        _require_same(job, out.with_suffix(".json"), f"{out} exists and is of another job")
        dist.on_main(lambda: shutil.rmtree(parts, ignore_errors=True))  # of a process that was killed at its last step
        return out
    other = out.with_suffix("" if out.suffix else ".npz")
    if other.exists() and out.with_suffix(".json").exists():  # which says how both were made
        _require_same(job, out.with_suffix(".json"), f"{other} is next to {out} and belongs to another job")
    _claim(job, run, num, out, parts)
    starts = range(0, num, config.batch_size)
    mine = starts[dist.rank() :: dist.world()]
    with OneBehind(device) as behind:
        for done, start in enumerate(mine):
            if _found(parts, start) is None:
                drawn = draw(run, config, range(start, min(start + config.batch_size, num)), callback)
                behind(functools.partial(_decode_and_save, run, config, drawn, parts, count))
            progress(min((done + 1) * config.batch_size * dist.world(), num), num)
    dist.barrier()
    if dist.is_main():
        paths = [path for start in starts if (path := _found(parts, start))]
        if len(paths) < len(starts):
            raise UserError(
                f"{parts} holds {len(paths)} of {len(starts)} parts: let all processes write to one folder, and repeat the command."
            )
        nfe = max(int(path.stem.partition("-")[2]) for path in paths)
        files.write_json(out.with_suffix(".json"), job | {"nfe": nfe})
        if run.prompts:
            _write_prompts(run.prompts.texts_of(range(num)), out.with_suffix(".jsonl"))
        save_png(grid(_first_of(paths)), out.with_suffix(".png"))
        if out.suffix:
            _assemble(paths, num, out)
        else:
            write_pngs((_part(path) for path in paths), out)
        shutil.rmtree(parts, ignore_errors=True)
    dist.barrier()
    return out


def _write_prompts(texts: Sequence[str], path: Path) -> None:
    """A line for each image, for those who score them."""
    lines = (json.dumps({"index": index, "prompt": text}, ensure_ascii=False) for index, text in enumerate(texts))
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def _decode_and_save(
    run: LoadedRun, config: SampleConfig, drawn: Drawn, parts: Path, count: Callable[[int, int], None]
) -> None:
    images, nfe = decode(run, config, drawn)
    count(nfe, len(images))
    # the calls are part of the name, so that whoever assembles the parts knows those of all
    save_npy(parts / f"{drawn.indices[0]:09d}-{nfe}.npy", images.permute(0, 2, 3, 1).numpy())  # (n, H, W, 3)


def _job(run: LoadedRun, config: SampleConfig, num: int) -> dict[str, Any]:
    """What the samples are a function of."""
    return {
        **run.identity,
        "num": num,
        "autoencoder": run.autoencoder.name,
        "num_classes": len(set(drawn_classes(config.labels, run))),
        **config.model_dump(mode="json"),
        **prompts_record(run),
    }


def _precision(config: SampleConfig, out: Path, parts: Path, device: torch.device) -> str:
    """That of the samples that are there, where the choice is the machine's: another time it may choose otherwise."""
    record = out.with_suffix(".json") if out.exists() else parts / "job.json"
    if config.precision != "auto" or not record.is_file():
        return resolved(config.precision, device)
    before = files.read_object(record).get("precision")
    return before if before in DTYPES else resolved("auto", device)


def _require_same(job: dict[str, Any], record: Path, what: str) -> None:
    if not record.exists():
        raise UserError(f"{what}: there is no {record} that says how it was made. Remove it or choose another --out.")
    before = files.read_json(record)
    if changed := [f"{key}: {before.get(key, 'unknown')} -> {job[key]}" for key in job if before.get(key) != job[key]]:
        raise UserError(f"{what} ({'; '.join(changed)}): remove it or choose another --out.")


def _claim(job: dict[str, Any], run: LoadedRun, num: int, out: Path, parts: Path) -> None:
    """Refuse to mix the parts of two different jobs; a job that has no part yet may change."""
    if dist.is_main():
        marker = parts / "job.json"
        if marker.exists() and any(parts.glob("*.npy")):
            _require_same(job, marker, f"{parts} holds part of another job")
        side = run.latent_shape[1] * run.autoencoder.factor
        files.require_space(out.parent, 2 * num * side * side * 3, f"Writing {num:,} samples")
        files.write_json(marker, job)
    dist.barrier()


def _found(parts: Path, start: int) -> Path | None:
    """The part that begins with image `start`, when it is there."""
    return next(iter(parts.glob(f"{start:09d}-*.npy")), None)


def _part(path: Path) -> np.ndarray:
    return load_npy(path, "a part of the samples", "Remove it, and the same command makes it again.")


def _first_of(paths: Sequence[Path]) -> Tensor:
    """Some images (n, 3, H, W) for the grid."""
    enough = paths[: -(-GRID_IMAGES // len(_part(paths[0])))]
    few = np.concatenate([_part(path) for path in enough])[:GRID_IMAGES]
    return torch.from_numpy(few).permute(0, 3, 1, 2)


def _assemble(paths: Sequence[Path], num: int, out: Path) -> None:
    """All in an npz, without holding more than one part in memory. It comes last: it says that all is there."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *_part(paths[0]).shape[1:])}
    with (
        files.atomic_path(out) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for path in paths:
            file.write(_part(path).tobytes())
