"""Measure how fast `prepare` turns images into shards and the loader turns shards into batches.

    python benchmarks/data.py                     everything: takes minutes and about 2 GB under --work
    python benchmarks/data.py --only loader
    python benchmarks/data.py --only loader memory
    python benchmarks/data.py --rows 2048 --token-rows 64 --prepare-images 16 --tiny     a trial on little data

loader    Shuffled batches of stored latents (8 x 32 x 32, float16), of latents with tokens (256 x 768) and of latents
          with images. All come from the page cache and are compared with a plain copy of the same bytes. They are also
          compared with one file per image: a PNG and a float32 .npy, found by os.walk and read by workers of torch's
          DataLoader, and the .npy files alone. "times one file" compares latents and images with both files, and
          latents with the .npy. "times PNG and .npy" compares latents with both files, because a run aligned to
          stored tokens reads no images.
memory    How much the loader's process grows over batches of ten thousand and of ten million images.
prepare   Decoding and cropping alone on all cores; then `repa prepare` without a network (decode, crop, write), with an
          autoencoder of Stable Diffusion's size, and with an encoder of DINOv2-S's size, both with random weights.
"""

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from repa.base.images import adm_centre_crop, decode_image
from repa.data import Loader, Manifest, PrepareConfig, open_data, prepare
from repa.data.config import array_name
from repa.data.records import ArrayFile, FeatureField, Shard
from repa.data.writing import ShardWriter

LATENTS, TOKENS = (8, 32, 32), (256, 768)
ENCODER = "dinov2-b"
PICTURES = 64


def manifest_of(num: int, shards: list[Shard], features: dict[str, FeatureField]) -> Manifest:
    return Manifest(
        source={"name": "benchmark"}, config=PrepareConfig(resolution=256, autoencoder="sd-vae-ft-mse"), num_images=num,
        class_names=("all",), class_counts=(num,), autoencoder={"name": "none"}, features=features, shards=tuple(shards),
    )  # fmt: skip


def write_shards(folder: Path, num: int, shard_size: int, tokens: bool, images: bool = False) -> None:
    """Write random latents, with tokens and images on request."""
    stream, shards = np.random.default_rng(0), []
    for number, start in enumerate(range(0, num, shard_size)):
        size = min(shard_size, num - start)
        with ShardWriter(folder, number) as writer:
            for at in range(0, size, 64):  # like `prepare`; small writes leave small pieces in the page cache
                num_rows = min(64, size - at)
                rows: dict[str, np.ndarray] = {
                    "labels": np.zeros(num_rows, np.int64),
                    "moments": stream.random((num_rows, *LATENTS), np.float32).astype(np.float16),
                }
                if tokens:
                    rows[f"features.{ENCODER}"] = stream.random((num_rows, *TOKENS), np.float32).astype(np.float16)
                if images:
                    rows["images"] = stream.integers(0, 256, (num_rows, 3, 256, 256), np.uint8)
                writer.append(rows)
        shards.append(Shard(num=size, files=writer.records()))
    facts = FeatureField(dim=TOKENS[1], grid=16, pooled=False, identity={})
    manifest_of(num, shards, {ENCODER: facts} if tokens else {}).save(folder)


def write_sparse(folder: Path, num: int, shard_size: int) -> None:
    """Write latents that are all zero, in sparse files that take no space on disk."""
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, num, shard_size)):
        size, records = min(shard_size, num - start), {}
        for field, dtype, row in (("labels", "int64", ()), ("moments", "float16", LATENTS)):
            path = folder / array_name(field, number)
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (size, *row)}
            with open(path, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + size * int(np.prod(row)) * np.dtype(dtype).itemsize)
            records[field] = ArrayFile(
                file=path.name, dtype=dtype, shape=(size, *row), size=path.stat().st_size, sha256="0" * 64
            )
        shards.append(Shard(num=size, files=records))
    manifest_of(num, shards, {}).save(folder)


class OneFilePerImage(Dataset):
    """Folders of PNG and .npy files, paired by sorted path; without `pixels` only the .npy files are read."""

    def __init__(self, root: Path, pixels: bool = True):
        self.pixels = pixels
        self.images, self.latents = (
            sorted(os.path.join(where, name) for where, _, names in os.walk(root / part) for name in names)
            for part in ("png", "npy")
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        if not self.pixels:
            return (torch.from_numpy(np.load(self.latents[index])),)
        pixels = np.array(Image.open(self.images[index]).convert("RGB")).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(np.load(self.latents[index]))


def write_files(root: Path, num: int) -> None:
    """Write a few pictures many times over: generating all of them would take longer than reading."""
    stream, pngs = np.random.default_rng(0), []
    for _ in range(PICTURES):
        photograph(stream, 256, 256).save(packed := io.BytesIO(), format="png")
        pngs.append(packed.getvalue())
    for index in range(num):
        png, npy = (root / part / f"{index // 1000:05}" / f"{index:08}.{part}" for part in ("png", "npy"))
        for path in (png, npy):
            path.parent.mkdir(parents=True, exist_ok=True)
        png.write_bytes(pngs[index % PICTURES])
        np.save(npy, stream.random(LATENTS, np.float32))


def photograph(stream: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth image with some noise: about as hard to decode as a photograph."""
    coarse = Image.fromarray(stream.integers(0, 256, (height // 16, width // 16, 3), np.uint8)).resize(
        (width, height), 3
    )
    noise = stream.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def per_second(batches: Iterable, size: int, seconds: float, warm: int = 2) -> float:
    """Images per second, measured for about `seconds` after `warm` batches."""
    iterator, num = iter(batches), 0
    for _ in itertools.islice(iterator, warm):
        pass
    begin = time.perf_counter()
    for _ in iterator:
        num += size
        if time.perf_counter() - begin > seconds:
            break
    return num / (time.perf_counter() - begin)


def copy_rate(row_bytes: int, size: int, seconds: float) -> float:
    """Images per second that one thread copies from memory outside the processor's caches."""
    num = max(2, (1 << 28) // (row_bytes * size))
    source, target = np.ones((num, size * row_bytes), np.uint8), np.zeros((num, size * row_bytes), np.uint8)

    def copies() -> Iterable[None]:
        for index in itertools.cycle(range(num)):
            np.copyto(target[index], source[index])
            yield

    return per_second(copies(), size, seconds, warm=num)


def measure_loader(args: argparse.Namespace, work: Path) -> list[dict]:
    rows = []
    for what, num, tokens, images, size in (
        ("latents", args.rows, False, False, 256),
        ("latents and tokens", args.token_rows, True, False, 32),
        ("latents and images", args.file_rows, False, True, 64),
    ):
        folder = work / what.replace(" ", "-")
        write_shards(folder, num, max(num // 32, 1), tokens, images)
        data = open_data(folder)
        row_bytes = sum(file.size for shard in data.manifest.shards for file in shard.files.values()) // num
        loader = Loader(data, batch_size=size, seed=0, features=[ENCODER] if tokens else [], images=images)
        for values in data.manifest.fields:
            list(data.reader.batches(values, size))  # fill the page cache
        turns = [
            (loader_rate(loader, size, args.seconds), copy_rate(row_bytes, size, args.seconds))
            for _ in range(args.rounds)
        ]
        rate, floor = (statistics.median(turn) for turn in zip(*turns, strict=True))
        rows.append(
            {"what": f"ours, {what}", "images/s": rate, "GB/s": rate * row_bytes / 1e9, "of the copy": rate / floor}
        )
        rows.append(
            {"what": f"plain copy, {what}", "images/s": floor, "GB/s": floor * row_bytes / 1e9, "of the copy": 1.0}
        )
    write_files(work / "files", args.file_rows)
    begin = time.perf_counter()
    files = OneFilePerImage(work / "files")
    walk = time.perf_counter() - begin
    both, alone = one_file_rate(files, args), one_file_rate(OneFilePerImage(work / "files", pixels=False), args)
    rows.append(
        {"what": f"one PNG and one .npy for each image (os.walk of {len(files)}: {walk:.2f} s)", "images/s": both}
    )
    rows.append({"what": "one .npy for each image", "images/s": alone})
    ours = {row["what"]: row for row in rows}
    for what, other, column in (
        ("ours, latents and images", both, "times one file, like for like"),
        ("ours, latents", alone, "times one file, like for like"),
        ("ours, latents", both, "times PNG and .npy"),
    ):
        ours[what][column] = ours[what]["images/s"] / other
    return rows


def one_file_rate(files: OneFilePerImage, args: argparse.Namespace) -> float:
    """Images per second from the DataLoader's workers."""
    worker = DataLoader(files, 64, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
    return statistics.median(
        per_second(itertools.chain.from_iterable(itertools.repeat(worker, 100)), 64, args.seconds)
        for _ in range(args.rounds)
    )


def loader_rate(loader: Loader, size: int, seconds: float) -> float:
    stream = loader.iterate()
    try:
        return per_second(stream, size, seconds)
    finally:
        stream.close()


def measure_memory(args: argparse.Namespace, work: Path) -> list[dict]:
    rows = []
    for num in (10_000, 10_000_000):
        folder = work / f"sparse-{num}"
        write_sparse(folder, num, 4096)
        command = [sys.executable, __file__, "--child", str(folder)]
        rows.append(
            {
                "what": f"loader over {num:,} images",
                **json.loads(subprocess.run(command, check=True, capture_output=True).stdout),
            }
        )
    return rows


def child(folder: Path) -> None:
    """Print how much memory opening and reading adds to this fresh process."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    begin = resident()
    data = open_data(folder)
    opened = resident()
    stream = Loader(data, batch_size=256, seed=0).iterate()
    sizes = [(next(stream), resident())[1] for _ in range(200)]
    stream.close()
    print(json.dumps({"MiB before": begin, "MiB opened": opened - begin, "MiB reading": max(sizes) - opened}))


def crops(paths: list[str]) -> int:
    for path in paths:
        adm_centre_crop(decode_image(Path(path).read_bytes(), path), 256)
    return len(paths)


def measure_prepare(args: argparse.Namespace, work: Path) -> list[dict]:
    from diffusers import AutoencoderKL
    from transformers import Dinov2Config, Dinov2Model

    cores, source, stream = os.cpu_count() or 1, work / "pictures", np.random.default_rng(0)
    source.mkdir()
    for index in range(args.decode_images):
        photograph(stream, 500, 375).save(source / f"{index:05}.jpg", quality=92)
    paths = [str(path) for path in sorted(source.iterdir())]
    few = work / "few"
    few.mkdir()
    for path in paths[: args.prepare_images]:
        shutil.copy(path, few)
    width = (8, 8) if args.tiny else (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=width, down_block_types=("DownEncoderBlock2D",) * len(width), layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * len(width), norm_num_groups=min(width[0], 32),
    )  # fmt: skip
    vae.save_pretrained(work / "vae-weights")
    size: dict[str, Any] = (
        {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        if args.tiny
        else {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
    )
    Dinov2Model(Dinov2Config(patch_size=14, image_size=224, **size)).save_pretrained(work / "encoder-weights")
    shared = {"resolution": 256, "num_workers": cores, "batch_size": 8, "shard_size": 1024}
    encoder = {"features": ("dinov2-s",), "feature_weights": {"dinov2-s": str(work / "encoder-weights")}}
    autoencoder = {"autoencoder": "kl", "autoencoder_weights": str(work / "vae-weights"), "store_images": False}
    sizes = ("of toy size",) * 2 if args.tiny else ("of Stable Diffusion's size", "of DINOv2-S's size")
    parts = [paths[index::cores] for index in range(cores)]

    def decode() -> None:
        with ProcessPoolExecutor(cores) as pool:
            assert sum(pool.map(crops, parts)) == len(paths)

    def prepared(name: str, folder: Path, settings: dict) -> Callable[[], object]:
        return lambda: prepare(folder, work / f"prepared-{name}", PrepareConfig(**shared, **settings))

    jobs = [
        ("decode and crop alone, every core", decode, len(paths)),
        ("prepare: images only", prepared("images", source, {}), len(paths)),
        (f"prepare: autoencoder {sizes[0]}", prepared("latents", few, autoencoder), args.prepare_images),
        (f"prepare: encoder {sizes[1]}", prepared("tokens", few, encoder), args.prepare_images),
    ]
    rows = []
    for what, job, num in jobs:
        begin = time.perf_counter()
        job()
        rows.append({"what": what, "images": num, "images/s": num / (time.perf_counter() - begin)})
    rows[1]["of decoding alone"] = rows[1]["images/s"] / rows[0]["images/s"]
    return rows


def table(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    lines = [keys, ["---", *["---:"] * (len(keys) - 1)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return (f"{value:,.0f}" if value >= 100 else f"{value:.2f}") if isinstance(value, float) else f"{value}"


PARTS = {"loader": measure_loader, "memory": measure_memory, "prepare": measure_prepare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=32768, help="number of latents, 16 KiB each")
    parser.add_argument("--token-rows", type=int, default=2048, help="number of latents with tokens, 400 KiB each")
    parser.add_argument("--file-rows", type=int, default=2000, help="number of images stored as one file each")
    parser.add_argument("--decode-images", type=int, default=1000)
    parser.add_argument("--prepare-images", type=int, default=64, help="images for the autoencoder and the encoder")
    parser.add_argument("--tiny", action="store_true", help="use toy networks")
    parser.add_argument("--seconds", type=float, default=1.5, help="duration of each loader measurement")
    parser.add_argument("--rounds", type=int, default=3, help="loader measurements per row; the table shows medians")
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    print(
        f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads, NumPy {np.__version__}"
    )
    found = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for part in args.only:
            (work := Path(folder) / part).mkdir()
            found[part] = PARTS[part](args, work)
            shutil.rmtree(work)
            print(f"\n{part}\n\n{table(found[part])}")
    if args.json:
        args.json.write_text(
            json.dumps({"cores": os.cpu_count(), "torch": torch.__version__, **found}, indent=1) + "\n"
        )
    return None


if __name__ == "__main__":
    main()
