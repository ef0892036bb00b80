"""Samples to files: an .npz in ADM's format, PNG files in a folder, or the folders of prompt benchmarks.

Every process writes its batches to OUT.parts, where a restart finds them; the main process assembles the file. Batches do
not depend on the number of processes or on restarts, so the file is identical to the byte.

Layout for prompt benchmarks such as GenEval:

OUT/00000/metadata.jsonl       the prompt's line of the file of prompts, or {"prompt": ...}
OUT/00000/samples/00000.png    its samples, in the order of their seeds
"""

import contextlib
import functools
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from repa.base import dist, faults, files
from repa.base.arrays import load_npy, load_npz, save_npy, write_images
from repa.base.device import DTYPES, resolved
from repa.base.errors import UserError, require_type
from repa.base.images import grid, save_png
from repa.base.reporting import Progress, silent
from repa.diffusion.samplers import Callback
from repa.runs import LoadedRun
from repa.runs.loading import Prompts
from repa.sampling.config import SampleConfig
from repa.sampling.inputs import drawn_classes, prompts_record
from repa.sampling.samples import SampledState, decode, draw

GRID_IMAGES = 64  # in the overview picture next to the npz
PART = re.compile(r"\d{9,}-\d{1,9}-[0-9a-f]{8}\.npy")  # first image, NFE, checksum
LIMIT = 2**36  # largest size in bytes of samples in memory


class BackgroundWorker:
    """A thread that runs one task at a time; a second task waits for the first, so memory holds at most two batches.

    On CUDA the thread has its own stream, which starts after the caller's queued work. Elsewhere tasks run immediately,
    because a thread would compete with the sampler for cores.

    Args:
        device: the sampler's device.
        threaded: None: only on CUDA.
    """

    def __init__(self, device: torch.device, *, threaded: bool | None = None):
        on_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._pool = ThreadPoolExecutor(1) if (on_cuda if threaded is None else threaded) else None
        self._last: Future[None] | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Run `work`; raises the exception of an earlier task."""
        if self._pool is None:
            work()
            return
        # The thread's stream may start once the sampler's queued work is done.
        ready = torch.cuda.current_stream().record_event() if self._stream else None
        self.wait()
        self._last = self._pool.submit(self._run, work, ready)

    def wait(self) -> None:
        """Wait until all tasks are done."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def _run(self, work: Callable[[], None], ready: "torch.cuda.Event | None") -> None:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            work()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()  # also after an interrupt: the current batch is still written


def write_samples(
    run: LoadedRun,
    config: SampleConfig,
    num: int,
    out: Path,
    progress: Progress = silent,
    count: Callable[[int, int], None] = silent,
    callback: Callback | None = None,
) -> Path:
    """Write `num` samples to `out` (.npz, arr_0 uint8 NHWC, ADM's format; without a suffix: a folder of PNG files), and a PNG
    grid next to it.

    Finished batches are kept in `out`.parts until all are complete, so the same command resumes. Processes share the batches.
    `out` with suffix .json records how the samples were made, .jsonl the prompt of each image. A finished job is not repeated,
    and samples of another job are not overwritten.
    `count` receives the NFE and the images of every batch of this process; `callback` receives each of its steps.
    """
    out = Path(out)
    if out.name in ("", ".."):  # the current folder and its parents, which have no name for another suffix
        out = out.resolve()
    require_type(run, LoadedRun, "Sampling needs a run that repa.load_run loaded")
    require_type(num, int, "The number of samples is a whole number")
    out = Path(out)
    if out.suffix not in (".npz", "") or not out.name:
        raise UserError(
            f"Samples are written as one .npz file or as PNG files in a folder, but --out is {out}: give a name such as "
            "samples.npz, or samples for a folder."
        )
    with dist.locked(out, "repa sample"):  # two commands would write to the same parts
        beside = [out.with_suffix(ending).name for ending in (".json", ".jsonl", ".png")]
        dist.on_main(lambda: files.remove_leftovers(out.parent, beside.__contains__))
        return _write_samples(run, config, num, out, progress, count, callback)


def _write_samples(
    run: LoadedRun, config: SampleConfig, num: int, out: Path, progress: Progress,
    count: Callable[[int, int], None], callback: Callback | None,
) -> Path:  # fmt: skip
    parts, device = out.with_suffix(".parts"), next(run.model.parameters()).device
    # Before comparing jobs: the record has the precision that "auto" resolved to.
    config = config.override(precision=dist.on_main(lambda: _precision(config, out, parts, device)))
    job = _job(run, config, num)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        _require_same(job, out.with_suffix(".json"), f"{out} exists and belongs to another job")
        dist.on_main(lambda: _require_intact(out, num))
        dist.on_main(lambda: shutil.rmtree(parts, ignore_errors=True))  # left by a killed process
        return out
    other = out.with_suffix("" if out.suffix else ".npz")
    if other.exists() and out.with_suffix(".json").exists():  # the record of both
        _require_same(job, out.with_suffix(".json"), f"{other} is beside {out} and belongs to another job")
    if dist.is_main():
        _claim(job, run, num, out, parts)
    dist.barrier()
    starts = range(0, num, config.batch_size)
    # Processes share complete batches of fixed size, because rounding depends on the size of a batch.
    mine = starts[dist.rank() :: dist.world()]
    before = _found(parts)
    try:
        with BackgroundWorker(device) as behind:
            for done, start in enumerate(mine):
                if start not in before:
                    drawn = draw(run, config, range(start, min(start + config.batch_size, num)), callback)
                    behind(functools.partial(_decode_and_save, run, config, drawn, parts, count))
                progress(min((done + 1) * config.batch_size * dist.world(), num), num)
    except UserError:
        if not dist.active() and not _found(parts):  # refused settings: nothing was made that could be continued
            shutil.rmtree(parts, ignore_errors=True)
        raise
    dist.barrier()
    if dist.is_main():
        _finish(run, job, starts, parts, out)
    dist.barrier()
    return out


def _finish(run: LoadedRun, job: dict[str, Any], starts: Sequence[int], parts: Path, out: Path) -> None:
    """Assemble the samples and the files next to them from the parts, then delete the parts."""
    found, num = _found(parts), job["num"]
    paths = [found[start] for start in starts if start in found]
    if len(paths) < len(starts):  # machines without a shared file system
        raise UserError(
            f"{parts} contains {len(paths)} of {len(starts)} parts: let all processes write to a shared folder, and run the command again."
        )
    # The NFE of dopri5 differs between batches.
    nfe = max(int(path.name.split("-")[1]) for path in paths)
    record = job | {"nfe": nfe}
    if run.prompts:  # one line per image, for scoring
        texts = enumerate(run.prompts.texts_of(range(num)))
        lines = [json.dumps({"index": index, "prompt": text}, ensure_ascii=False) + "\n" for index, text in texts]
        files.write_text(out.with_suffix(".jsonl"), "".join(lines))
    save_png(grid(_first_of(paths)), out.with_suffix(".png"))
    if out.suffix:
        _assemble(paths, num, out, record)
    else:
        files.write_sealed(out.with_suffix(".json"), record)
        write_pngs(map(_part, paths), out)
    shutil.rmtree(parts, ignore_errors=True)


def _decode_and_save(
    run: LoadedRun, config: SampleConfig, drawn: SampledState, parts: Path, count: Callable[[int, int], None]
) -> None:
    images, nfe = decode(run, config, drawn)
    count(nfe, len(images))
    # the name has the NFE, for the process that assembles the parts, and a checksum
    array = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())  # (n, H, W, 3)
    save_npy(parts / f"{drawn.indices[0]:09d}-{nfe}-{zlib.crc32(array.data):08x}.npy", array)


def _job(run: LoadedRun, config: SampleConfig, num: int) -> dict[str, Any]:
    """All inputs that determine the samples."""
    return {
        **run.identity,
        "num": num,
        "autoencoder": run.autoencoder.name,
        "num_classes": len(set(drawn_classes(config.labels, run))),
        **config.model_dump(mode="json"),
        **prompts_record(run),
    }


def _precision(config: SampleConfig, out: Path, parts: Path, device: torch.device) -> str:
    """The precision of existing samples if it is auto, because the machine may choose another one now."""
    record = out.with_suffix(".json") if out.exists() else parts / "job.json"
    if config.precision != "auto" or not record.is_file():
        return resolved(config.precision, device)
    before = files.read_object(record).get("precision")
    return before if before in DTYPES else resolved("auto", device)


def _require_same(job: dict[str, Any], record: Path, what: str) -> None:
    if not record.exists():
        raise UserError(f"{what}: its record {record} is missing. Delete it or choose another --out.")
    before = files.read_json(record)
    if changed := [f"{key}: {before.get(key, 'unknown')} -> {job[key]}" for key in job if before.get(key) != job[key]]:
        raise UserError(f"{what} ({'; '.join(changed)}): delete it or choose another --out.")


def _claim(job: dict[str, Any], run: LoadedRun, num: int, out: Path, parts: Path) -> None:
    """Refuse to mix parts of two jobs; a job without parts may change."""
    marker = parts / "job.json"
    if marker.exists() and any(parts.glob("*.npy")):
        _require_same(job, marker, f"{parts} belongs to another job")
    if not marker.exists():
        files.require_replaceable(out.with_suffix(".json"), ("num", "weights_sha256"), (".jsonl", ".png"))
        for path in _found(parts).values():  # of a job that nothing records
            path.unlink()
    side = run.latent_shape[1] * run.autoencoder.factor
    # Twice: the parts exist next to the file until it is complete.
    files.require_space(out.parent, 2 * num * side * side * 3, f"Writing {num:,} samples")
    files.write_sealed(marker, job)


def _found(parts: Path) -> dict[int, Path]:
    """The existing parts, by their first image."""
    return {int(path.name.partition("-")[0]): path for path in parts.glob("*.npy") if PART.fullmatch(path.name)}


def _part(path: Path) -> np.ndarray:
    again = "Delete it and run the same command again."
    array = load_npy(path, "a part of the samples", again)
    if f"{zlib.crc32(np.ascontiguousarray(array).data):08x}" != path.stem.rpartition("-")[2]:
        raise UserError(f"{path} is damaged: its images are not the ones that were written. {again}")
    return array


def _require_intact(out: Path, num: int) -> None:
    """Raises UserError for samples that are there, but not as they were written."""
    again = "Delete it and run the same command again."
    if out.is_dir():
        if (found := sum(1 for _ in out.glob("*.png"))) != num:
            raise UserError(f"{out} holds {found:,} images of {num:,}. {again}")
        return
    with faults.reading(out, "samples", again), zipfile.ZipFile(out) as archive:
        if (name := archive.testzip()) is not None:
            raise UserError(f"{out} is damaged: its {name} has another checksum than when it was written. {again}")
        checksum = archive.getinfo("arr_0.npy").CRC
    if files.read_object(record := out.with_suffix(".json")).get("crc32") != checksum:
        raise UserError(f"{out} holds other samples than those of its record {record}. {again}")


def _first_of(paths: Sequence[Path]) -> Tensor:
    """Some images (n, 3, H, W) for the grid."""
    enough = paths[: -(-GRID_IMAGES // len(_part(paths[0])))]
    few = np.concatenate([_part(path) for path in enough])[:GRID_IMAGES]
    return torch.from_numpy(few).permute(0, 3, 1, 2)


def _assemble(paths: Sequence[Path], num: int, out: Path, record: dict[str, Any]) -> None:
    """All in an npz, without holding more than one part in memory. It comes last: it says that all is there.

    Its checksum goes into the record, so that other samples of this name are not taken for these.
    """
    with files.atomic_path(out) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            write_images(archive, (num, *_part(paths[0]).shape[1:]), map(_part, paths))
        checksum = archive.getinfo("arr_0.npy").CRC
        files.write_sealed(out.with_suffix(".json"), record | {"crc32": checksum})


def write_pngs(parts: Iterable[np.ndarray], out: Path) -> None:
    """Image i of all parts, uint8 (n, H, W, 3), as out/00000i.png; the folder appears when all are there."""
    with files.atomic_folder(out) as temporary:
        for index, image in enumerate(image for part in parts for image in part):
            save_png(image, temporary / f"{index:06d}.png")


def require_folders(out: Path) -> None:
    """Raises UserError where `write_folders` would not write."""
    if out.exists() and not (out.is_dir() and all(re.fullmatch(r"\d{5,}", path.name) for path in out.iterdir())):
        raise UserError(f"{out} holds something other than folders of samples: choose another --folders.")
    files.require_place(out, out)


def write_folders(samples: Path, prompts: Prompts, prompt_file: str, out: Path) -> None:
    """Lay the images of an .npz by `repa sample` out by prompt; the same call again writes the same.

    Args:
        samples: image i is of prompt i modulo their number.
        prompt_file: where the prompts came from, or "".
        out: a new or empty folder, or one that this function wrote.

    Raises:
        UserError: the folder holds other things.
    """
    require_folders(out)
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts.texts]
    if prompt_file.endswith(".jsonl"):  # scorers find there what they need besides the prompt
        lines = [line for line in Path(prompt_file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    images = load_npz(samples, "samples", ("arr_0",), limit=LIMIT)["arr_0"]
    for index, image in enumerate(images):
        number, place = index % len(prompts.texts), index // len(prompts.texts)
        folder = out / f"{number:05d}"
        save_png(image, folder / "samples" / f"{place:05d}.png")
        if not place:
            files.write_text(folder / "metadata.jsonl", lines[number] + "\n")
