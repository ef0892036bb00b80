"""`repa evaluate SAMPLES|RUN --reference REF ...` and `repa evaluate reference DATA --out ref.npz`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from repa.base import files, launch, lock
from repa.base.errors import UserError
from repa.cli import options
from repa.cli.console import Bars, ProgressBar, say
from repa.cli.sample import SamplesOfRun, open_run
from repa.evaluation.config import EvaluateConfig, ReferenceConfig
from repa.runs import layout


class EvaluateArguments(SamplesOfRun, EvaluateConfig):
    """Compute metrics of samples: an .npz with arr_0, a folder or zip of images, or a run folder, from which samples
    are generated with the options of `repa sample`. The reference is an .npz (ADM's, or from `repa evaluate
    reference`), prepared data, or images. `repa evaluate reference DATA --out ref.npz` makes a reference.
    """

    verb = "evaluate"
    positional = ("samples",)

    samples: options.Images
    """.npz, folder or zip of samples, or a run folder"""
    reference: options.Images
    """Reference .npz, prepared data, or images."""
    out: str = ""
    """Name of a .json for the results; empty: print them, and for a run folder also store them in it, for the report."""
    num_images: int = Field(0, ge=0)
    """Number of samples to generate from a run folder."""

    @property
    def is_run(self) -> bool:
        """Whether samples are generated from a run."""
        return (Path(self.samples) / layout.CONFIG).is_file()

    def idle(self) -> dict[str, str]:
        own = {*EvaluateConfig.model_fields, "samples", "reference", "out"}
        of_run = [name for name in type(self).model_fields if name not in own]
        return super().idle() | dict.fromkeys(
            () if self.is_run else of_run, f"here: {self.samples} is not a run folder"
        )


class ReferenceArguments(ReferenceConfig, options.Command):
    """Write the statistics of prepared data, a folder, a zip or an .npz of images as a reference in ADM's format."""

    verb = "evaluate reference"
    positional = ("data",)

    data: options.Images
    """prepared data, folder or zip of images, or .npz"""
    out: str
    """Name of the .npz."""


def arguments_of(word: str) -> type[options.Command] | None:
    """Class with the options of `repa evaluate reference`."""
    return ReferenceArguments if word == "reference" else None


def main(argv: list[str]) -> int:
    if argv[:1] == ["reference"]:
        return _reference(argv[1:])
    given = options.parse(EvaluateArguments, argv)
    if given.out:
        options.file_of("--out", given.out, ".json")
    if given.samples.endswith(".npz") and Path(given.out) == Path(given.samples).with_suffix(".json"):
        raise UserError(f"{given.out} is the record of `repa sample` for {given.samples}: choose another --out.")
    if given.is_run and not given.num_images:
        raise UserError(
            f"{given.samples} is a run folder: give the number of samples to generate, such as --num-images 50000."
        )
    if (Path(given.reference) / layout.CONFIG).is_file():
        raise UserError(f"--reference {given.reference} is a run folder: give its training data, or an .npz.")
    of_run = Path(given.samples) / layout.EVALUATIONS
    # The results of a run are written into its folder, in a file that is named by their settings.
    out = Path(given.out) if given.out else None
    output = out or (of_run if given.is_run else None)
    if output:
        if not out:
            files.refuse_links(Path(given.samples))
        files.require_writable(out or of_run / "results.json")
    if out:
        files.require_replaceable(out, ("metrics", "num_samples"))
    # The main process locks for all. The others join the group later, once torch is imported.
    locked = output if launch.place().rank == 0 else None
    with lock.exclusive(locked, "repa evaluate") if locked else contextlib.nullcontext():
        if locked and not out:
            files.remove_leftovers(of_run)
        results = (_of_run if given.is_run else _of_file)(given)
        if given.is_run and not out:
            out = of_run / _name(given, results)
        if locked and out:
            files.write_sealed(out, results)
    _say_results(results, given.features, out)
    return 0


def _say_results(results: dict[str, Any], features: str, out: Path | None) -> None:
    for name, value in results["metrics"].items():
        say(f"{name:<20} {value:.4f}")
    count = f"{results['num_reference']:,} images" if results["num_reference"] else "a reference of unknown size"
    say(f"in the features of {features}, {results['num_samples']:,} samples against {count}")
    if (real := results["distance_of_real"]) is not None:
        name = "fid" if "fid" in results["metrics"] else "fd"
        say(
            f"{results['num_samples']:,} random images of the reference itself have {name} {real:.4f}: about the least possible"
        )
    if out is not None:
        say(f"{out}: these results and their settings")
    for warning in results["warnings"]:
        say(f"note: {warning}")


def _name(given: EvaluateArguments, results: dict[str, Any]) -> str:
    """The file for these settings: the same evaluation replaces its file, and another reference or encoder has another."""
    measured = [results["made"], results["reference"], results["encoder"], results["arithmetic"], [*results["metrics"]]]
    return f"{layout.step_name(results['made']['step'])}-{given.weights}-{files.json_sha256(measured)[:8]}.json"


def _of_file(given: EvaluateArguments) -> dict[str, Any]:
    from repa.base import dist
    from repa.evaluation import evaluate_file

    device = dist.setup()
    with Bars() as bars:
        return evaluate_file(
            given.samples, given.reference, options.part(EvaluateConfig, given), device=device,
            progress=bars.of(f"features of {given.samples}"), reference_progress=bars.of(f"features of {given.reference}"),
        )  # fmt: skip


def _of_run(given: EvaluateArguments) -> dict[str, Any]:
    """Generate samples of a run and evaluate them batch by batch."""
    import torch

    from repa.base import dist
    from repa.evaluation import evaluate_stream
    from repa.sampling import drawn_classes, generate
    from repa.sampling.inputs import prompts_record

    given, sampling, run, device = open_run(given, given.samples)
    run.diffusion.check_sampler(sampling.sampler)
    made: dict[str, Any] = {
        **run.identity, "run": given.samples,
        "num": given.num_images, "autoencoder": run.autoencoder.name,
        "num_classes": len(set(drawn_classes(sampling.labels, run))), **sampling.model_dump(mode="json"),
        **prompts_record(run),
    }  # fmt: skip
    size, num = sampling.batch_size, given.num_images

    def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        bar = bars.of(f"sampling {given.samples}")
        bar(0, num)
        # Batches alternate between processes, so that their numbers differ by at most one.
        for start in range(dist.rank() * size, num, dist.world() * size):
            indices = range(start, min(start + size, num))
            samples = generate(run, sampling, indices)
            made["nfe"] = max(made.get("nfe", 0), samples.nfe)
            yield torch.tensor(indices), samples.images
            bar(min(start + dist.world() * size, num), num)

    with Bars() as bars:
        return evaluate_stream(
            stream(), num, run.latent_shape[1] * run.autoencoder.factor, given.reference, options.part(EvaluateConfig, given),
            device=device, samples=given.samples, made=made,
            prompts=run.prompts.texts_of(range(num)) if run.prompts else (), progress=bars.of(f"features of {given.reference}"),
        )  # fmt: skip


def _reference(argv: list[str]) -> int:
    given = options.parse(ReferenceArguments, argv)
    from repa.base import dist
    from repa.evaluation import make_reference

    device = dist.setup()
    with ProgressBar(f"features of {given.data}", "images") as bar:
        reference = make_reference(
            given.data, Path(given.out), options.part(ReferenceConfig, given), device=device, progress=bar
        )
    say(f"{given.out}: statistics of {reference.statistics.count:,} images in the features of {given.features}.")
    return 0
