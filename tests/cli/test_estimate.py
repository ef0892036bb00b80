"""`repa estimate` tells whether a run fits into memory, and which options would make it fit."""

import re
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from repa.cli.main import run
from repa.performance import fitting

SMALL = [
    "estimate",
    "quickstart",
    "--devices",
    "1",
    "--resolution",
    "32",
    "--images",
    "100",
    "--samples",
    "1",
    "--autoencoder",
    "pixels",
]


def test_a_run_that_does_not_fit_gets_suggestions(capsys):
    assert run([*SMALL, "--memory", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = next(line for line in lines if line.strip().startswith("sum")).split()[1:3]
    assert float(total[0]) > (0.1 if total[1] == "GB" else 100)
    first = lines.index(next(line for line in lines if "does not fit in the 0.1 GB" in line)) + 1
    ways = [line.split() for line in lines[first : lines.index("", first)]]
    assert any(way[0] == "--accumulate" for way in ways)
    for way in ways:
        number, unit = next((float(a), b) for a, b in pairwise(way) if b in ("MB", "GB"))
        assert number * {"MB": 1, "GB": 1000}[unit] <= 100, way
    # with the suggested options the run does fit
    options = next(way[:2] for way in ways if way[0] == "--accumulate")
    assert run([*SMALL, "--memory", "0.1", *options]) == 0
    assert "  fits in the 0.1 GB of a device" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("steps", "noted"), [("3000", False), ("4000", True)])
def test_more_than_a_thousand_passes_print_a_note(steps, noted, capsys):
    assert run([*SMALL, "--num-steps", steps]) == 0
    out = capsys.readouterr().out
    assert "fits in the 80 GB of one h100" in out
    assert ("passes over 100 images" in out) == noted


def test_divisors_of_a_huge_batch_are_found_quickly():
    """Trying every divisor of 10^10 images per device would take an hour."""
    found = SimpleNamespace(config=SimpleNamespace(batch_size=2 * 10**10, accumulate=4), num_devices=2)
    with patch.object(fitting, "_with_settings", lambda found, accumulate: accumulate):
        parts = [accumulate for _, accumulate in fitting._more_accumulation(found)]
    assert parts[:5] == [5, 8, 10, 16, 20]
    assert len(parts) == 11 * 11 - 3


@pytest.mark.parametrize(
    ("recipe", "latents", "tokens", "steps"),
    [
        ("own-images-64", "3 x 64 x 64 of pixels", 256, "23,438 steps, 300.0 epochs"),
        ("cifar10-repa", "3 x 32 x 32 of pixels", 256, "1,000 steps, 6.4 epochs"),
        pytest.param(
            "sit-xl2-512",
            "4 x 64 x 64 of sd-vae-ft-ema",
            1024,
            "3,000,000 steps, 153600.0 epochs",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_estimate_names_latents_tokens_and_training_length(recipe, latents, tokens, steps, capsys):
    assert run(["estimate", recipe, "--images", "5000", "--classes", "10"]) == 0
    out = capsys.readouterr().out
    assert f", latents {latents}, {tokens} tokens; batch " in out.splitlines()[0]
    assert steps in out.splitlines()[0]
    assert "time on 1 x h100" in out


def test_the_estimate_names_the_latents_of_a_configuration_file(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "autoencoder: pixels\nmodel: {name: SiT-S/4, latent_size: 32, latent_channels: 3}\n"
    )
    assert run(["estimate", str(tmp_path / "mine.yaml"), "--samples", "1"]) == 0
    assert "latents 3 x 32 x 32 of pixels, 64 tokens" in capsys.readouterr().out


def test_the_estimate_tells_whose_samples_it_counts(capsys):
    theirs = "(the paper's FID; --samples, --sample-steps or --sample-guidance for yours), on the same devices"
    for words, is_assumed in (([], True), (["--sample-steps", "250"], False), (["--samples", "64"], False)):
        assert run(["estimate", "quickstart-text", "--tflops", "1", *words]) == 0
        assert (theirs in capsys.readouterr().out) == is_assumed


def test_accumulation_is_not_advised_for_a_loss_that_compares_images(capsys):
    assert run([*SMALL, "--memory", "0.1", "--alignments.0.loss", "nt_xent"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("does not fit in the 0.1 GB" in line for line in lines)
    assert not any("--accumulate" in line for line in lines)


def test_the_number_of_images_comes_from_the_data_or_the_run(data_folder, random_run, capsys):
    def head(*argv):
        assert run(["estimate", *argv, "--samples", "1"]) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert "epochs of 40 images" in head(str(random_run))
    assert "epochs of 7 images" in head(str(random_run), "--images", "7")
    of_data = head("quickstart", "--data", str(data_folder), "--model.patch-overlap", "0")
    assert "latents 3 x 16 x 16 of pixels" in of_data
    assert "epochs of 40 images" in of_data


def test_disk_space_and_reading_use_the_prepared_images(data_folder, capsys):
    assert run(["estimate", "quickstart-repa", "--data", str(data_folder), "--samples", "1", "--tflops", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "disk for 40 images" in lines  # mirrored copies, if any, are included
    reading = next(line for line in lines if "tiny as fp16" in line)
    number, unit = re.search(r"read at ([\d.]+) (MB|GB)/s", reading).groups()
    assert float(number) > 0, reading
    assert unit == "MB"


def test_processes_on_a_cpu_share_one_device(capsys):
    words = [*SMALL, "--devices", "4", "--batch-size", "8"]
    assert run([*words, "--device", "cpu"]) == 2
    assert "--devices is 4, but --device cpu is this whole machine" in capsys.readouterr().err
    assert run([*words, "--tflops", "1"]) == 0


def test_the_cpu_of_this_machine_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("repa.base.device.quick_product_rate", lambda precision, device: 2.5e11)
    assert run([*SMALL, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "the decoder" not in out  # there is none for pixels
    assert "time on 1 x cpu of 0.25 TFLOP/s at 35% utilisation (assumed)" in out
    assert re.search(r"fits in the [\d.]+ GB of this machine", out)
