"""Image i depends only on (run, configuration, i), not on the process, the batch or an interruption."""

import functools
import hashlib
import json
import shutil
import threading
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from repa.autoencoders import Autoencoder, load_autoencoder
from repa.base import dist
from repa.base.device import best_precision
from repa.base.errors import UserError
from repa.base.files import read_json
from repa.base.images import grid
from repa.base.rng import SampleStreams
from repa.diffusion.config import DiffusionConfig
from repa.models import build_model
from repa.runs import LoadedRun, layout, load_checkpoint, load_run, save_checkpoint
from repa.sampling import SampleConfig, about_classes, drawn_classes, generate, write_samples, writing
from repa.sampling.inputs import classes_named
from repa.sampling.samples import prepared
from tests.calls import call

ODE = SampleConfig(sampler="heun", steps=3, guidance=("cfg:scale=1.5",), batch_size=4, seed=1, precision="fp32")
SDE = ODE.override(sampler="euler_maruyama", steps=5)
both = pytest.mark.parametrize("config", [ODE, SDE], ids=["ode", "sde"])


@pytest.fixture(scope="module")
def run(random_run):
    return load_run(random_run)


def read(path):
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        return archive["arr_0"]


@both
def test_an_image_does_not_depend_on_its_batch(config, run):
    whole = generate(run, config, range(12)).images
    assert (whole.dtype, whole.shape) == (torch.uint8, (12, 3, 16, 16))
    for size in (1, 2, 5):
        parts = [generate(run, config, range(s, min(s + size, 12))).images for s in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), whole), size
    assert torch.equal(generate(run, config, [7, 2]).images, whole[[7, 2]])
    assert len({image.numpy().tobytes() for image in whole}) == 12
    assert not torch.equal(generate(run, config.override(seed=2), range(12)).images, whole)


@both
def test_in_a_wider_network_the_batch_changes_only_rounding(config):
    """A batch of one uses another matrix routine, which changes 1e-4 of the pixels by one grey level."""
    torch.manual_seed(0)
    model = build_model(
        "SiT-S/4", latent_size=16, latent_channels=3, num_classes=2, hidden_dim=192, depth=4, num_heads=3
    )
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.08)
    run = LoadedRun(model.eval(), DiffusionConfig(), load_autoencoder("pixels"), 0, "ema")
    whole = generate(run, config, range(8)).images.int()
    assert torch.equal(torch.cat([generate(run, config, range(s, s + 2)).images for s in range(0, 8, 2)]), whole)
    alone = torch.cat([generate(run, config, [i]).images for i in range(8)]).int()
    assert (alone - whole).abs().max() <= 1
    assert (alone != whole).float().mean() < 1e-3


def test_euler_sampling_equals_the_equation_written_out(run):
    """dx = v dt from t = 1 to 0 in 4 steps with guided v, from the noise of each image's stream."""
    config = ODE.override(sampler="euler", steps=4, labels="1")
    images = generate(run, config, [3, 8]).images
    for index, image in zip((3, 8), images, strict=True):
        x = SampleStreams(1, [index]).randn(3, 16, 16).double()
        for t in (1.0, 0.75, 0.5, 0.25):
            v = [
                call(run.model, x.float(), torch.tensor([t]), torch.tensor([label])).prediction.double()
                for label in (1, 2)
            ]
            x = x - 0.25 * (v[1] + 1.5 * (v[0] - v[1]))
        wanted = (127.5 * x[0] + 127.5).round().clamp(0, 255)
        assert (image - wanted).abs().max() <= 1
        assert (image != wanted).double().mean() < 1e-2


def no_latents(denoiser, noise, num_steps, randn_like):
    """A sampler without a return statement."""


def half_the_latents(denoiser, noise, num_steps, randn_like):
    return noise[:1]


@pytest.mark.parametrize(("name", "given"), [("no_latents", "NoneType"), ("half_the_latents", r"\(1, 3, 16, 16\)")])
def test_a_sampler_must_return_the_latents_of_all_images(run, name, given):
    config = SampleConfig(sampler=f"{__name__}.{name}", steps=1, precision="fp32")
    with pytest.raises(
        UserError, match=rf"{name}' must return latents of shape \(2, 3, 16, 16\), but returned {given}"
    ):
        generate(run, config, [0, 1])


def test_an_untrained_network_returns_its_initial_noise(run):
    """It predicts 0, so the samples are the noise, which is the same in every run for one index."""
    model = build_model(
        "SiT-S/4", latent_size=16, latent_channels=3, num_classes=2, hidden_dim=32, depth=1, num_heads=2
    )
    untrained = LoadedRun(model.eval(), run.diffusion, run.autoencoder, 0, "ema")
    noise = SampleStreams(1, range(5)).randn(3, 16, 16)
    assert torch.equal(generate(untrained, ODE, range(5)).images, run.autoencoder.decode(noise))


@pytest.mark.parametrize(
    ("sampler", "nfe"), [("euler", 6), ("heun", 11), ("euler_maruyama", 6), ("euler_maruyama:last=0.2", 6)]
)
def test_network_calls_are_counted(sampler, nfe, run):
    for scale in (1.0, 2.0):
        config = ODE.override(sampler=sampler, steps=6, guidance=[f"cfg:scale={scale}"])
        assert generate(run, config, range(2)).nfe == nfe


def test_guidance_changes_samples_and_keeps_to_its_interval(run):
    def images(*guidance):
        return generate(run, ODE.override(guidance=guidance, steps=6), range(4)).images

    plain = images()
    assert not torch.equal(images("cfg:scale=2"), plain)
    assert not torch.equal(images("cfg:scale=2"), images("cfg:scale=2,high=0.5"))
    assert not torch.equal(images("cfg:scale=2,channels=1"), images("cfg:scale=2"))
    assert torch.equal(images("cfg:scale=2,low=0.9,high=0.95"), plain)  # no time of the grid is in the interval


def test_the_batch_is_doubled_only_inside_the_interval(run, monkeypatch):
    seen = []
    forward = type(run.model).forward

    def watched(self, state, t, condition, *rest):
        seen.append((round(float(t[0]), 6), len(state["x"]), condition.labels.tolist()))
        return forward(self, state, t, condition, *rest)

    monkeypatch.setattr(type(run.model), "forward", watched)
    config = ODE.override(sampler="euler", steps=5, labels="1,0", guidance=["cfg:scale=2,low=0.2,high=0.6"])
    generate(run, config, range(2))
    null = run.model.null_label
    alone, double = (2, [1, 0]), (4, [1, 0, null, null])
    assert seen == [(1.0, *alone), (0.8, *alone), (0.6, *double), (0.4, *double), (0.2, *double)]


def test_every_pass_fills_the_batch(run):
    """Without guidance a batch holds twice as many images, and the images are the same."""
    # active at 3 of the 5 steps
    guided = ODE.override(sampler="euler", steps=5, guidance=["cfg:scale=2,low=0.2,high=0.6"])
    found, passes = {}, {}
    for size, at_once in ((16, 8), (16, 16), (12, 12)):  # the doubled batch of 8 images just fits
        rows = []
        handle = run.model.register_forward_pre_hook(lambda model, inputs, rows=rows: rows.append(len(inputs[0]["x"])))
        config = guided.override(batch_size=size)
        parts = [generate(run, config, range(s, min(s + at_once, 32))).images for s in range(0, 32, at_once)]
        handle.remove()
        found[size, at_once], passes[size, at_once] = torch.cat(parts), Counter(rows)
    assert passes == {
        (16, 8): {8: 4 * 2, 16: 4 * 3},  # 20 passes
        (16, 16): {16: 2 * (2 + 2 * 3)},  # 16
        (12, 12): {12: 2 * (2 + 2 * 3), 8: 2 + 2 * 3},
    }
    assert torch.equal(found[16, 16], found[16, 8])
    assert torch.equal(found[12, 12], found[16, 8])


def test_labels_follow_the_setting(run, monkeypatch):
    asked = []
    denoiser = LoadedRun.denoiser
    monkeypatch.setattr(
        LoadedRun, "denoiser", lambda self, y, g=None, **_: asked.append(y.tolist()) or denoiser(self, y, g)
    )

    def labels(protocol, indices):
        generate(run, ODE.override(labels=protocol, steps=1), indices)
        return asked.pop()

    assert labels("balanced", range(1, 6)) == [1, 0, 1, 0, 1]
    assert labels("1", range(3)) == [1, 1, 1]
    assert labels("0,1,1", range(5)) == [0, 1, 1, 0, 1]
    drawn = labels("uniform", range(200))
    assert 60 < sum(drawn) < 140
    assert labels("uniform", [150, 3]) == [drawn[150], drawn[3]]


@pytest.mark.parametrize("labels", ["2", "0,7", "0, 7"])
def test_a_class_number_out_of_range_is_refused(labels, run):
    with pytest.raises(UserError, match=r"Class [27] does not exist: the model has 2 classes, numbered from 0"):
        generate(run, ODE.override(labels=labels), range(2))


@pytest.mark.parametrize("labels", ["", "1,", " "])
def test_invalid_labels_are_refused(labels):
    with pytest.raises(UserError, match="must be uniform, balanced, or classes"):
        ODE.override(labels=labels)


@pytest.mark.parametrize("labels", ["cow", "-1", "1.5", "²", "9" * 5000])
def test_unknown_class_names_and_numbers_are_refused(labels, run):
    with pytest.raises(UserError, match="does not exist"):
        generate(run, ODE.override(labels=labels), range(2))


def test_a_name_of_two_classes_is_refused_with_their_numbers(run):
    twins = replace(run, class_names=("crane", "crane"), class_counts=(1, 1))
    with pytest.raises(UserError, match="2 classes have the name crane: choose by number, #0 or #1"):
        classes_named("crane", twins)
    assert classes_named("#1", twins) == [("#1", 1)]


def test_classes_are_chosen_by_name_among_those_with_images(run, monkeypatch):
    asked = []
    denoiser = LoadedRun.denoiser
    monkeypatch.setattr(
        LoadedRun, "denoiser", lambda self, y, g=None, **_: asked.append(y.tolist()) or denoiser(self, y, g)
    )
    named = replace(run, class_names=("1", "tench, Tinca tinca"))
    for text, wanted in (("1", [0, 0]), ("tench, Tinca tinca", [1, 1]), ("0,1", [0, 0])):
        generate(named, ODE.override(labels=text, steps=1), range(2))
        assert asked.pop() == wanted
    gap = replace(run, class_counts=(0, 7))
    for protocol in ("uniform", "balanced"):
        generate(gap, ODE.override(labels=protocol, steps=1), range(3))
        assert asked.pop() == [1, 1, 1]
    with pytest.raises(UserError, match="no training images"):
        generate(gap, ODE.override(labels="0", steps=1), range(2))


def test_ambiguous_class_choices_are_explained(run):
    named = replace(run, class_names=("1", "caf\u00e9"), class_counts=(3, 4))
    assert [drawn_classes(text, named) for text in ("1", "#1", "0", "0,1,#1", " cafe\u0301")] == [
        (0,),
        (1,),
        (0,),
        (0, 0, 1),
        (1,),
    ]
    assert "#1" in about_classes("1", named)
    assert about_classes("#1", named) == about_classes("#0", named) == about_classes("uniform", named) == ""
    assert "named 1:" in about_classes("0", named)
    assert about_classes("10", replace(named, class_names=("10", "11"))) == ""  # there is no class number 10
    # a number, while names are numbers too
    assert "named 11" in about_classes("1", replace(named, class_names=("10", "11")))
    assert about_classes("balanced", replace(named, class_counts=(0, 4))).startswith("1 of 2 classes")
    # a network with more classes than its data
    assert drawn_classes("uniform", replace(run, class_counts=(5,))) == (0,)


def test_class_counts_of_a_run_come_from_its_data(run, random_run, tmp_path):
    assert (run.class_names, run.class_counts) == (("dark", "light"), (20, 20))
    folder = shutil.copytree(random_run, tmp_path / "run")
    facts = read_json(folder / layout.DATA)
    for counts in ("2", [1.0, 2], [-1, 3], [0, 0], [True, 1], [3]):
        (folder / layout.DATA).write_text(json.dumps(facts | {"class_counts": counts}))
        with pytest.raises(UserError, match="class_counts"):
            load_run(folder)


def test_the_file_has_the_format_of_evaluators(run, tmp_path):
    done = []
    out = write_samples(run, ODE, 10, tmp_path / "new" / "samples.npz", lambda *counts: done.append(counts))
    images = read(out)
    assert (images.dtype, images.shape, images.flags.c_contiguous) == (np.uint8, (10, 16, 16, 3), True)
    assert np.array_equal(images, generate(run, ODE, range(10)).images.permute(0, 2, 3, 1).numpy())
    assert zipfile.ZipFile(out).testzip() is None
    assert done == [(4, 10), (8, 10), (10, 10)]
    assert sorted(path.name for path in out.parent.iterdir()) == ["samples.json", "samples.npz", "samples.png"]
    sheet = np.asarray(Image.open(out.with_suffix(".png")))  # a sheet of all ten, although a part has four
    assert np.array_equal(sheet, grid(torch.from_numpy(images).permute(0, 3, 1, 2)))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@both
def test_an_interrupted_job_continues_to_the_same_bytes(config, run, tmp_path, monkeypatch):
    whole = write_samples(run, config, 11, tmp_path / "whole.npz").read_bytes()

    def stop(done, total):
        if done >= 8:
            raise KeyboardInterrupt

    out = tmp_path / "again.npz"
    with pytest.raises(KeyboardInterrupt):
        write_samples(run, config, 11, out, stop)
    parts = out.with_suffix(".parts")
    nfe = generate(run, config, range(2)).nfe
    assert not out.exists()
    first, second = sorted(parts.glob("*.npy"))
    assert (first.name[:-12], second.name[:-12]) == (f"000000000-{nfe}-", f"000000004-{nfe}-")
    kept = second.stat().st_mtime_ns
    first.unlink()
    (parts / "000000000-x.npy").write_bytes(b"of a stranger")
    (parts / ".000000000.npy.killed.tmp").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        write_samples(run, config, 11, out, stop)
    assert second.stat().st_mtime_ns == kept  # it was not made again
    write_samples(run, config, 11, out)
    assert out.read_bytes() == whole
    assert not parts.exists()


def test_a_flipped_bit_of_a_part_or_of_the_samples_is_found(run, tmp_path):
    out = tmp_path / "s.npz"
    with pytest.raises(ZeroDivisionError):
        write_samples(run, ODE, 8, out, lambda done, total: 1 / (8 - done))
    part = next(iter(out.with_suffix(".parts").glob("*.npy")))
    flip(part, -5)
    with pytest.raises(UserError, match=f"{part.name} is damaged: .* Delete it and run the same command again"):
        write_samples(run, ODE, 8, out)
    part.unlink()
    write_samples(run, ODE, 8, out)
    flip(out, out.stat().st_size // 2)
    with pytest.raises(UserError, match="another checksum than when it was written"):
        write_samples(run, ODE, 8, out)
    out.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as samples"):
        write_samples(run, ODE, 8, out)
    folder = write_samples(run, ODE, 8, tmp_path / "folder")
    (folder / "000003.png").unlink()
    with pytest.raises(UserError, match="holds 7 images of 8"):
        write_samples(run, ODE, 8, folder)


@both
def test_processes_share_the_work_and_the_file_is_the_same(config, run, tmp_path, monkeypatch):
    """Three processes run one after the other; the main one claims the job first, and assembles it last."""
    whole = write_samples(run, config, 11, tmp_path / "whole.npz").read_bytes()
    out = tmp_path / "shared.npz"
    monkeypatch.setattr(dist, "world", lambda: 3)
    made = []
    with pytest.raises(UserError, match="contains 1 of 3 parts"):
        write_samples(run, config, 11, out)
    for rank in (2, 1, 0):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        write_samples(run, config, 11, out, lambda done, total: made.append(done))
        assert out.exists() == (rank == 0)
    assert len(made) == 3
    assert out.read_bytes() == whole


def test_missing_parts_of_another_process_are_reported(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 3)
    with pytest.raises(UserError, match="contains 1 of 3 parts"):
        write_samples(run, ODE, 11, tmp_path / "samples.npz")
    assert not (tmp_path / "samples.npz").exists()


def test_another_job_is_refused_and_the_parts_stay(run, random_run, tmp_path):
    out = tmp_path / "samples.npz"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(run, ODE, 8, out, stop)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for config, num, change in (
        (ODE.override(seed=9), 8, "seed: 1 -> 9"),
        (ODE.override(guidance=["cfg:scale=3"]), 8, r"guidance: .*1\.5.* -> .*cfg:scale=3.*"),
        (ODE.override(batch_size=2), 8, "batch_size: 4 -> 2"),
        (ODE, 12, "num: 8 -> 12"),
    ):
        with pytest.raises(UserError, match=f"belongs to another job .{change}.: delete it or choose another --out"):
            write_samples(run, config, num, out)
    with pytest.raises(UserError, match="step: 20 -> 10"):
        write_samples(load_run(random_run, step=10), ODE, 8, out)
    with pytest.raises(UserError, match="weights: ema -> model"):
        write_samples(load_run(random_run, "model"), ODE, 8, out)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_corrected_command_runs_after_a_late_error(run, tmp_path):
    out = tmp_path / "samples.npz"
    for wrong in ({"labels": "5"}, {"sampler": "euler_maruyama:last=7"}, {"sampler": "ddpm"}):
        with pytest.raises(UserError):
            write_samples(run, ODE.override(**wrong), 4, out)
    assert len(read(write_samples(run, ODE, 4, out))) == 4


def test_an_output_name_without_npz_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"--out is .*samples\.png: give a name such as samples\.npz"):
        write_samples(run, ODE, 4, tmp_path / "samples.png")
    assert not any(tmp_path.iterdir())


def test_too_little_disk_space_is_found_before_sampling(run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5000})())
    with pytest.raises(UserError, match=r"Writing 11 samples needs 16\.5 KiB, but .* has 4\.9 KiB free"):
        write_samples(run, ODE, 11, tmp_path / "samples.npz")


def test_the_settings_of_the_job_are_recorded(run, tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_samples(run, ODE, 8, tmp_path / "s.npz", lambda done, total: 1 / 0)
    job = json.loads((tmp_path / "s.parts" / "job.json").read_text())
    assert SampleConfig.parse({name: job[name] for name in SampleConfig.model_fields}) == ODE
    assert (job["step"], job["weights"], job["num"]) == (20, "ema", 8)
    ema = layout.checkpoint_folder(run.folder, 20) / layout.EMA_FILE
    assert job["weights_sha256"] == hashlib.sha256(ema.read_bytes()).hexdigest()


def test_a_retrained_step_is_another_job(random_run, tmp_path):
    """Run, step and settings are equal, but the weights differ."""
    folder = shutil.copytree(random_run, tmp_path / "run")
    out = write_samples(load_run(folder), ODE, 5, tmp_path / "s.npz")
    checkpoint = load_checkpoint(folder, 10)
    shutil.rmtree(layout.checkpoint_folder(folder, 20))
    save_checkpoint(folder, checkpoint._replace(step=20))
    with pytest.raises(UserError, match=r"belongs to another job \(weights_sha256: .* -> "):
        write_samples(load_run(folder), ODE, 5, out)


def test_a_finished_job_is_not_repeated_or_replaced(run, tmp_path, monkeypatch):
    out = write_samples(run, ODE, 5, tmp_path / "s.npz")
    before = out.read_bytes()
    monkeypatch.setattr("repa.sampling.writing.draw", lambda *a: pytest.fail("sampled again"))
    assert write_samples(run, ODE, 5, out) == out
    with pytest.raises(UserError, match=r"s\.npz exists and belongs to another job \(num: 5 -> 6\).*another --out"):
        write_samples(run, ODE, 6, out)
    assert out.read_bytes() == before


def test_a_file_with_other_samples_is_not_taken_as_finished(run, tmp_path):
    out = write_samples(run, ODE, 5, tmp_path / "s.npz")
    record = json.loads(out.with_suffix(".json").read_text())
    images = np.load(out)["arr_0"]
    np.savez(out, arr_0=255 - images)
    with pytest.raises(UserError, match=r"s\.npz holds other samples than those of its record .*s\.json\. Delete it"):
        write_samples(run, ODE, 5, out)
    np.savez(out, arr_0=images)
    assert write_samples(run, ODE, 5, out) == out
    assert record["crc32"] == zipfile.ZipFile(out).getinfo("arr_0.npy").CRC


def test_non_finite_images_are_refused(run):
    huge = SampleConfig(steps=3, guidance=["cfg:scale=1e30"], labels="0,1")
    with pytest.raises(UserError, match="Image 5 of .* is not finite, from network call [12] of 3"):
        generate(run, huge, [5, 6])
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    with torch.no_grad():
        next(p for name, p in run.model.named_parameters() if name.endswith("weight")).fill_(float("nan"))
    try:
        with pytest.raises(UserError, match="is not finite"):
            generate(run, SampleConfig(steps=2), [0])
    finally:
        run.model.load_state_dict(state)


def test_guidance_needs_a_trained_null_class(run):
    never = replace(run, label_dropout=0.0)
    with pytest.raises(UserError, match="label_dropout 0"):
        generate(never, SampleConfig(steps=2, guidance=["cfg:scale=1.5"]), [0])
    assert len(generate(never, SampleConfig(steps=2), [0]).images) == 1


def test_decoding_in_a_thread_changes_no_byte(run, tmp_path, monkeypatch):
    """As on CUDA, a thread decodes and writes while the next batch is sampled; its errors end the command."""
    at_once = write_samples(run, SDE, 11, tmp_path / "at_once.npz").read_bytes()
    threads = set()
    decode = writing.decode
    monkeypatch.setattr(writing, "decode", lambda *a: threads.add(threading.current_thread()) or decode(*a))
    monkeypatch.setattr(writing, "BackgroundWorker", functools.partial(writing.BackgroundWorker, threaded=True))
    assert write_samples(run, SDE, 11, tmp_path / "behind.npz").read_bytes() == at_once
    assert threading.main_thread() not in threads
    broken = replace(run, autoencoder=load_autoencoder("pixels"))
    monkeypatch.setattr(type(broken.autoencoder), "images", lambda self, z: z * float("nan"))
    with pytest.raises(UserError, match="non-finite values"):
        write_samples(broken, SDE, 11, tmp_path / "broken.npz")
    assert not (tmp_path / "broken.npz").exists()


def test_bf16_is_close_to_float32_but_another_job(run, tmp_path):
    """Half precision changes a pixel by at most a few of 255 grey levels; float32 and bf16 parts are never mixed."""
    exact, rounded = (generate(run, SDE.override(precision=p), range(8)).images.int() for p in ("fp32", "bf16"))
    assert 0 < (exact - rounded).abs().float().mean() < 2
    out = write_samples(run, SDE, 4, tmp_path / "samples.npz")
    with pytest.raises(UserError, match="precision: fp32 -> bf16"):
        write_samples(run, SDE.override(precision="bf16"), 4, out)
    auto = write_samples(run, SDE.override(precision="auto"), 4, tmp_path / "auto.npz")
    assert json.loads(auto.with_suffix(".json").read_text())["precision"] == best_precision(torch.device("cpu"))


def test_half_precision_decodes_to_near_grey_levels():
    """A decoder of one convolution is within two grey levels of float32 in bf16."""

    class Convolution(Autoencoder):
        def __init__(self):
            super().__init__("convolution", channels=3, factor=1, scale=1.0, shift=0.0)
            torch.manual_seed(0)
            self.out = torch.nn.Conv2d(3, 3, 3, padding=1)

        def images(self, z):
            return self.out(z)

    autoencoder, latents = Convolution(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    exact, rounded = (autoencoder.decode(latents, dtype).int() for dtype in (torch.float32, torch.bfloat16))
    assert 0 < (exact - rounded).abs().max() <= 2


def test_started_samples_are_finished_in_the_same_precision(random_run, tmp_path, monkeypatch):
    """For precision auto the CPU is timed, and the choice may differ the next time."""
    run, config, out = load_run(random_run), SampleConfig(steps=2, sampler="heun", batch_size=2), tmp_path / "s.npz"
    monkeypatch.setattr("repa.base.device.best_precision", lambda device: "bf16")
    whole = write_samples(run, config, 4, tmp_path / "whole.npz").read_bytes()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(run, config, 4, out, stop)
    monkeypatch.setattr("repa.base.device.best_precision", lambda device: "fp32")
    assert write_samples(run, config, 4, out).read_bytes() == whole
    assert write_samples(run, config, 4, out).read_bytes() == whole
    assert json.loads(out.with_suffix(".json").read_text())["precision"] == "bf16"


def test_a_decoder_precision_without_a_decoder_is_refused(run):
    with pytest.raises(UserError, match="--decoder-precision bf16 has no effect: pixels"):
        prepared(run, ODE.override(decoder_precision="bf16"))
    assert prepared(run, ODE).autoencoder is run.autoencoder


def test_parts_without_a_record_are_not_mixed_into_a_job(run, tmp_path):
    """job.json says which job made them; without it they may be of any."""
    out, other = tmp_path / "s.npz", ODE.override(seed=7)
    with pytest.raises(ZeroDivisionError):
        write_samples(run, other, 8, out, lambda done, total: 1 / (8 - done))
    (out.with_suffix(".parts") / "job.json").unlink()
    expected = write_samples(run, ODE, 8, tmp_path / "fresh.npz").read_bytes()
    assert write_samples(run, ODE, 8, out).read_bytes() == expected
