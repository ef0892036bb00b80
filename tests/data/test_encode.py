import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from repa.base import files, lock
from repa.base.errors import UserError
from repa.base.images import adm_centre_crop
from repa.data import PrepareConfig, add, encoding, open_data, open_source, pipeline, prepare, writing
from repa.data.preparing import make_plan
from repa.data.progress import record_path
from tests.data.conftest import all_rows, content, pack, spoil

SMALL = PrepareConfig(resolution=8, shard_size=3, batch_size=2, num_workers=0)
FULL = SMALL.override(autoencoder="kl", features=("tiny",))  # the fake models have these names


class Killed(BaseException):
    """Stands in for Ctrl-C and SIGTERM."""


def killed_after(batches):
    def progress(done, total, what):
        nonlocal batches
        batches -= 1
        if batches == 0:
            raise Killed

    return progress


def test_every_field_of_every_image_is_stored(folder, tmp_path, fakes):
    manifest = prepare(folder, tmp_path / "out", FULL)
    data = open_data(tmp_path / "out")
    images, labels = all_rows(data, "images"), all_rows(data, "labels")
    moments, tokens, pooled = (all_rows(data, f) for f in ("moments", "features.tiny", "pooled.tiny"))
    assert [s.num for s in manifest.shards] == [3, 3, 3, 2]
    paths = sorted(folder.rglob("*.png"))
    for i, path in enumerate(paths):
        crop = np.asarray(adm_centre_crop(Image.open(path), 8))
        assert labels[i] == ["ants", "bees"].index(path.parent.name)
        for c in range(3):
            np.testing.assert_array_equal(images[i, c], crop[:, :, c])
        cells = crop.reshape(2, 4, 2, 4, 3).mean((1, 3)) / 255  # (row, column, channel)
        for row in range(2):
            for column in range(2):
                np.testing.assert_allclose(moments[i, :2, row, column], cells[row, column, :2], atol=1e-3)
                np.testing.assert_allclose(tokens[i, 2 * row + column], cells[row, column], atol=1e-3)
        assert (moments[i, 2:] == 0.5).all()
        np.testing.assert_allclose(pooled[i], cells.mean((0, 1)), atol=1e-3)
    assert manifest.class_counts == (7, 4)
    assert manifest.autoencoder == {"spec": "kl", "name": "fake", "sha256": "a" * 64}
    facts = manifest.features["tiny"]
    assert (facts.dim, facts.grid, facts.pooled, facts.identity["weights_sha256"]) == (3, 2, True, "b" * 64)
    assert manifest == open_data(tmp_path / "out").manifest
    data.check()


def test_pixels_are_prepared_with_the_real_tiny_encoder(folder, tmp_path):
    prepare(folder, tmp_path / "out", SMALL.override(features=("tiny",)))
    data = open_data(tmp_path / "out")
    assert not data.has_moments
    encoder = encoding.load_encoder("tiny")
    assert data.features["tiny"].grid == encoder.grid_for(8)
    assert data.gather("features.tiny", np.array([10, 0])).shape == (2, encoder.grid_for(8) ** 2, encoder.dim)
    assert data.manifest.autoencoder["name"] == "pixels"


def test_a_zip_and_the_packaged_photographs_are_prepared(folder, tmp_path):
    prepare(folder, tmp_path / "a", SMALL)
    prepare(pack(folder, tmp_path / "p.zip"), tmp_path / "b", SMALL)
    for field in ("images", "labels"):
        a, b = open_data(tmp_path / "a"), open_data(tmp_path / "b")
        np.testing.assert_array_equal(all_rows(a, field), all_rows(b, field))
    prepare("photographs:num=20", tmp_path / "c", SMALL)
    source = open_source("photographs:num=20")
    image = np.asarray(source.image(19, 8)).transpose(2, 0, 1)
    np.testing.assert_array_equal(open_data(tmp_path / "c").gather("images", np.array([19]))[0], image)


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 6, 7])
def test_a_killed_prepare_continues_to_identical_bytes(folder, tmp_path, fakes, batches):
    prepare(folder, tmp_path / "whole", FULL)
    fakes[1].calls = 0
    with pytest.raises(Killed):
        prepare(folder, tmp_path / "out", FULL, progress=killed_after(batches))
    before = fakes[1].calls
    with pytest.raises(UserError, match="not finished: run the same"):
        open_data(tmp_path / "out")
    seen = []
    prepare(folder, tmp_path / "out", FULL, progress=lambda done, total, what: seen.append((done, total)))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    finished = {1: 0, 2: 0, 3: 1, 4: 1, 6: 2, 7: 3}[batches]  # batches of 2 and 1 per shard of 3
    assert fakes[1].calls - before == 7 - 2 * finished  # finished shards are not encoded again
    assert seen[0][0] == 3 * finished + 2
    assert seen[-1] == (11, 11)


@pytest.mark.parametrize("point", ["files.write_json", "manifest", "rmtree"])
def test_a_kill_between_writes_loses_nothing(folder, tmp_path, fakes, monkeypatch, point):
    """Killed while writing records or the manifest, or while removing the records."""
    prepare(folder, tmp_path / "whole", FULL)

    def die(*args, **options):
        raise Killed

    with monkeypatch.context() as patch:
        if point == "manifest":
            patch.setattr("repa.data.manifest.Manifest.save", die)
        elif point == "rmtree":
            patch.setattr(shutil, "rmtree", die)
        else:
            write, calls = files.write_json, []

            def third(path, value):
                calls.append(path)
                return die() if len(calls) == 3 else write(path, value)

            patch.setattr(files, "write_json", third)
        with pytest.raises(Killed):
            prepare(folder, tmp_path / "out", FULL)
    left = ".features.tiny-00000.npy.abcdefgh.tmp" if point == "files.write_json" else ".manifest.json.abcdefgh.tmp"
    (tmp_path / "out" / left).write_bytes(b"left by SIGKILL")
    prepare(folder, tmp_path / "out", FULL)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_same_call_on_a_complete_folder_does_nothing(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "out", FULL)
    before, calls = content(tmp_path / "out"), fakes[1].calls
    prepare(folder, tmp_path / "out", FULL.override(batch_size=5, num_workers=1))
    assert fakes[1].calls == calls
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("field", ["images", "features.tiny"])
def test_a_deleted_file_is_written_again(folder, tmp_path, fakes, field):
    prepare(folder, tmp_path / "out", FULL)
    before = content(tmp_path / "out")
    (tmp_path / "out" / f"{field}-00002.npy").unlink()
    with pytest.raises(UserError, match=rf"{field}-00002\.npy is missing .* run the same `repa prepare` again"):
        open_data(tmp_path / "out")
    prepare(folder, tmp_path / "out", FULL)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["features.tiny-00002.npy", "pooled.tiny-00000.npy", "basis.tiny.npy"])
def test_lost_tokens_are_computed_again_from_the_stored_images(folder, tmp_path, fakes, name):
    prepare(folder, tmp_path / "out", FULL.override(feature_forms={"": "pca2"}))
    before = content(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    add(tmp_path / "out", "features:tiny")
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"resolution": 12}, "resolution: 8 -> 12"),
        ({"autoencoder": "pixels"}, "autoencoder: kl -> pixels"),
        ({"shard_size": 4}, "shard_size: 3 -> 4"),
        ({"grid": 3}, "grid: 0 -> 3"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused(folder, tmp_path, fakes, change, line, finished):
    out = tmp_path / "out"
    with contextlib.nullcontext() if finished else pytest.raises(Killed):
        prepare(folder, out, FULL, progress=None if finished else killed_after(4))
    before = content(out)
    with pytest.raises(UserError, match="another source or with other settings") as caught:
        prepare(folder, out, FULL.override(**change))
    assert line in str(caught.value)
    assert content(out) == before


def test_long_differences_are_shortened_to_the_field_name(folder, tmp_path):
    prepare(folder, tmp_path / "out", SMALL)
    for number in range(40):
        shutil.copytree(folder / "ants", folder / f"class{number:04}")
    with pytest.raises(UserError, match=r"\(other class_names; source\.num_images: ") as caught:
        prepare(folder, tmp_path / "out", SMALL)
    assert len(str(caught.value)) < 500


def test_another_source_is_refused(folder, tmp_path):
    prepare(folder, tmp_path / "out", SMALL)
    (folder / "ants" / "000.png").unlink()
    with pytest.raises(UserError, match=r"source\.num_images: 11 -> 10"):
        prepare(folder, tmp_path / "out", SMALL)


def test_changed_weights_are_refused_when_continuing(folder, tmp_path, fakes):
    with pytest.raises(Killed):
        prepare(folder, tmp_path / "out", FULL, progress=killed_after(4))
    fakes[0].identity["sha256"] = "c" * 64
    with pytest.raises(UserError, match=r"made by another kl \(different: sha256\)"):
        prepare(folder, tmp_path / "out", FULL)


def test_a_folder_with_other_files_is_refused(folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("long work")
    with pytest.raises(UserError, match="not empty and holds no prepared data"):
        prepare(folder, tmp_path / "thesis", SMALL)
    assert content(tmp_path / "thesis") == {"chapter.tex": b"long work"}
    with pytest.raises(UserError, match="is not empty"):
        prepare(folder, folder / "ants" / "000.png", SMALL)


@pytest.mark.parametrize("by", ["prepare", "add"])
def test_features_can_be_added_later(folder, tmp_path, fakes, by):
    prepare(folder, tmp_path / "whole", FULL)
    prepare(folder, tmp_path / "out", FULL.override(features=()))
    plain = content(tmp_path / "out")

    def again(progress=None):
        if by == "prepare":
            prepare(folder, tmp_path / "out", FULL, progress=progress)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # the source is no longer needed
            add(tmp_path / "out", "features:tiny", progress=progress)

    with pytest.raises(Killed):
        again(killed_after(4))
    assert not open_data(tmp_path / "out").features  # the old data can still be opened
    calls = fakes[1].calls
    again()
    assert fakes[1].calls - calls == 5
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {k: v for k, v in content(tmp_path / "out").items() if k in plain and k != "manifest.json"} == {
        k: v for k, v in plain.items() if k != "manifest.json"
    }
    if by == "prepare":  # the first command still works and keeps the features
        assert "tiny" in prepare(folder, tmp_path / "out", FULL.override(features=())).features


def test_an_encoder_is_added_by_any_of_its_names(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "out", SMALL)
    assert [*add(tmp_path / "out", "features:dinov2-vit-b", form="int8").features] == ["dinov2-b"]
    assert open_data(tmp_path / "out").features["dinov2-b"].form == "int8"
    assert not (tmp_path / "out" / "parts").exists()


def test_features_without_stored_images_come_from_the_source(folder, tmp_path, fakes):
    lean = FULL.override(store_images=False, features=())
    prepare(folder, tmp_path / "out", lean)
    with pytest.raises(UserError, match="stores no images to encode: run `repa prepare` on the source"):
        add(tmp_path / "out", "features:tiny")
    prepare(folder, tmp_path / "out", lean.override(features=("tiny",)))
    prepare(folder, tmp_path / "whole", FULL)
    data, whole = open_data(tmp_path / "out"), open_data(tmp_path / "whole")
    assert not data.has_images
    np.testing.assert_array_equal(all_rows(data, "features.tiny"), all_rows(whole, "features.tiny"))


def test_a_bad_image_is_refused_with_its_name_and_number(folder, tmp_path):
    for name in ("ants/004.png", "ants/003.png"):
        spoil(folder / name)
    with pytest.raises(
        UserError, match=r"^2 of the images 4 to 6 .* The first: ants/003\.png is not .*--skip-bad"
    ) as error:
        prepare(folder, tmp_path / "out", SMALL)
    assert "after 3 finished images" in str(error.value)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.npy")) == ["images-00000.npy", "labels-00000.npy"]


def test_bad_images_can_be_skipped_and_are_named(folder, tmp_path, fakes):
    spoil(folder / "ants" / "004.png")
    with pytest.raises(UserError, match="1 of the images 4 to 6"):
        prepare(folder, tmp_path / "out", FULL)
    manifest = prepare(folder, tmp_path / "out", FULL.override(skip_bad=True))  # continues after the refusal
    assert manifest.skipped == ["ants/004.png"]
    assert (manifest.num_images, manifest.class_counts) == (10, (6, 4))
    data = open_data(tmp_path / "out")
    kept = [p for p in sorted(folder.rglob("*.png")) if p.name != "004.png"]
    for i, path in enumerate(kept):
        crop = np.asarray(adm_centre_crop(Image.open(path), 8)).transpose(2, 0, 1)
        np.testing.assert_array_equal(data.gather("images", np.array([i]))[0], crop)


def test_a_shard_of_bad_images_is_empty(folder, tmp_path, fakes):
    for name in ("003", "004", "005"):
        spoil(folder / "ants" / f"{name}.png")
    config = FULL.override(skip_bad=True, features=())
    manifest = prepare(folder, tmp_path / "out", config)
    assert [s.num for s in manifest.shards] == [3, 0, 3, 2]
    labels = all_rows(open_data(tmp_path / "out"), "labels")
    assert labels.tolist() == [0] * 4 + [1] * 4
    add(tmp_path / "out", "features:tiny")
    assert open_data(tmp_path / "out").gather("features.tiny", np.arange(8)).shape == (8, 4, 3)


def test_a_source_of_only_bad_images_is_refused(folder, tmp_path):
    for path in folder.rglob("*.png"):
        spoil(path)
    with pytest.raises(UserError, match=r"No image of pictures can be read, such as ants/000\.png"):
        prepare(folder, tmp_path / "out", SMALL.override(skip_bad=True))


def test_grey_palette_and_16_bit_images_can_be_mixed(tmp_path):
    root = tmp_path / "mixed"
    root.mkdir()
    Image.new("L", (9, 9), 50).save(root / "a.png")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(root / "b.png")
    Image.fromarray(np.full((9, 9), 50 << 8, np.uint16)).save(root / "c.png")
    Image.new("P", (9, 9)).save(root / "d.gif")
    manifest = prepare(root, tmp_path / "out", SMALL)
    assert manifest.class_names == ("all",)
    images = all_rows(open_data(tmp_path / "out"), "images")
    assert [sorted({*image.flatten().tolist()}) for image in images] == [[50], [255], [50], [0]]


def test_settings_that_do_not_fit_the_models_are_refused(folder, tmp_path, fakes):
    with pytest.raises(UserError, match="store_images is off, but pixels stores no moments"):
        prepare(folder, tmp_path / "out", SMALL.override(store_images=False))
    assert not (tmp_path / "out").exists()


def test_values_beyond_float16_are_refused(folder, tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(type(fakes[0]), "encode", lambda self, images, **_: images.float()[:, :1, ::4, ::4] * 1e4)
    with pytest.raises(UserError, match="kl gave values that float16 cannot hold"):
        prepare(folder, tmp_path / "out", FULL)


def test_too_little_disk_space_is_found_before_work(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"Preparing 11 images needs 2\.1 KiB, but .* has 2\.0 KiB free"):
        prepare(folder, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_gives_an_error_and_work_can_continue(folder, tmp_path, monkeypatch):
    prepare(folder, tmp_path / "whole", SMALL)
    append, calls = writing._GrowingArray.append, []

    def full(self, rows):
        calls.append(rows)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(writing._GrowingArray, "append", full)
        with pytest.raises(UserError, match="the disk is full"):
            prepare(folder, tmp_path / "out", SMALL)
    assert not list((tmp_path / "out").glob(".*"))
    assert (tmp_path / "out" / "images-00000.npy").exists()
    prepare(folder, tmp_path / "out", SMALL)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_processes_share_the_shards_without_communicating(folder, tmp_path, fakes):
    """Process 1 of 2 finishes long before process 0; the last one writes the manifest."""
    prepare(folder, tmp_path / "whole", FULL)
    out, done = tmp_path / "out", []
    assert prepare(folder, out, FULL, rank=1, world=2, progress=lambda *report: done.append(report)) is None
    assert done[-1][:2] == (5, 5)  # shards 1 and 3
    assert sorted(p.name for p in out.glob("labels*")) == ["labels-00001.npy", "labels-00003.npy"]
    assert prepare(folder, out, FULL, rank=1, world=2) is None  # nothing of its share is left
    calls = fakes[1].calls
    manifest = prepare(folder, out, FULL, rank=0, world=2)
    assert fakes[1].calls - calls == 4
    assert manifest == open_data(out).manifest
    assert content(out) == content(tmp_path / "whole")


def test_shards_of_a_lost_process_are_made_by_the_next_run(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "whole", FULL)
    prepare(folder, tmp_path / "out", FULL, rank=0, world=3)
    with pytest.raises(Killed):
        prepare(folder, tmp_path / "out", FULL, rank=1, world=3, progress=killed_after(1))
    calls = fakes[1].calls
    prepare(folder, tmp_path / "out", FULL)  # a single process
    assert fakes[1].calls - calls == 4  # the shards of processes 1 and 2 of 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_shard_locked_by_another_process_is_skipped(folder, tmp_path, fakes):
    """The same command runs twice: a child holds the lock of shard 1 while this process runs."""
    prepare(folder, tmp_path / "whole", FULL)
    out = tmp_path / "out"
    to_parent, from_child = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        taken = lock.take(record_path(out, 1, "base").with_suffix(".lock"))
        assert taken is not None
        os.write(from_child[1], b"x")
        os.read(to_parent[0], 1)
        os._exit(0)
    os.read(from_child[0], 1)
    try:
        assert prepare(folder, out, FULL) is None
        assert not (out / "images-00001.npy").exists()
        assert (out / "features.tiny-00001.npy").exists()  # the tokens of this shard were not locked
        assert (out / "images-00003.npy").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    prepare(folder, out, FULL)  # the lock ended with its process
    assert content(out) == content(tmp_path / "whole")


def test_shards_finished_while_models_load_are_not_made_again(folder, tmp_path, fakes, monkeypatch):
    """The same command runs twice: the first finishes after the second has listed missing shards."""
    out, real = tmp_path / "out", encoding.load_model

    def slow(*arguments):
        monkeypatch.setattr(encoding, "load_model", real)
        prepare(folder, out, FULL)
        monkeypatch.setattr(pipeline, "write_shard", lambda *arguments, **options: pytest.fail("made again"))
        return real(*arguments)

    monkeypatch.setattr(encoding, "load_model", slow)
    assert prepare(folder, out, FULL) == open_data(out).manifest
    assert not (out / "parts").exists()


def test_concurrent_processes_with_different_weights_are_refused(folder, tmp_path, fakes, monkeypatch):
    out, real = tmp_path / "out", encoding.load_model

    def slow(*arguments):
        monkeypatch.setattr(encoding, "load_model", real)
        with monkeypatch.context() as patch:
            patch.setattr(fakes[1], "identity", {"sha256": "of other weights"})
            prepare(folder, out, FULL, rank=1, world=2)
        return real(*arguments)

    monkeypatch.setattr(encoding, "load_model", slow)
    with pytest.raises(UserError, match=r"were made by another tiny .*sha256"):
        prepare(folder, out, FULL, rank=0, world=2)
    assert not (out / "manifest.json").exists()


def test_two_processes_may_both_finish_the_folder(folder, tmp_path, fakes):
    """Two processes may both find all shards done; the second then finds the first one's manifest."""
    prepare(folder, tmp_path / "out", FULL, rank=0, world=2)
    before = content(tmp_path / "out")
    prepare(folder, tmp_path / "out", FULL, rank=1, world=2)
    whole = content(tmp_path / "out")
    for name, data in before.items():  # restore the records
        if name.startswith("parts/"):
            (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "out" / name).write_bytes(data)
    prepare(folder, tmp_path / "out", FULL, rank=0, world=2)
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_does_not_change_the_data(folder, tmp_path, fakes, workers):
    prepare(folder, tmp_path / "whole", FULL)
    prepare(folder, tmp_path / "out", FULL.override(num_workers=workers))
    a, b = content(tmp_path / "out"), content(tmp_path / "whole")
    a.pop("manifest.json"), b.pop("manifest.json")  # it records the number of workers
    assert a == b
    spoil(folder / "ants" / "003.png")
    with pytest.raises(UserError, match=r"The first: ants/003\.png is not"):
        prepare(folder, tmp_path / "bad", FULL.override(num_workers=workers))


@pytest.mark.slow
def test_two_processes_prepare_one_folder(folder, tmp_path):
    prepare(folder, tmp_path / "whole", SMALL)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "repa"]
    options = ["--resolution", "8", "--shard-size", "3", "--batch-size", "2", "--num-workers", "0"]
    subprocess.run(
        [*run, "prepare", str(folder), str(tmp_path / "out"), *options],
        check=True,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_invalid_configurations_are_refused():
    for values, message in [
        ({"resolution": 4}, "resolution"),
        ({"resolution": 8, "features": ["tinny"]}, "Did you mean 'tiny'"),
        ({"resolution": 8, "features": ["tiny", "tiny"]}, "'tiny' twice"),
        ({"resolution": 8, "autoencoder": "pixel"}, "Did you mean 'pixels'"),
        ({"resolution": 8, "feature_weights": ["tiny"]}, "written ENCODER=PATH, but got 'tiny'"),
        ({"resolution": 8, "feature_weights": ["tiny=w"]}, "but features are none"),
        ({"resolution": 8, "feature_weights": {"tiny": ""}}, "written ENCODER=PATH, but got 'tiny'"),
        ({"resolution": 8, "feature_weights": {2: "w"}}, "Unknown encoder '2'"),
        (
            {"resolution": 8, "feature_weights": {"tiny": 3}},
            "feature_weights.tiny' is 3, but must be a text",
        ),
        ({"resolution": 8, "feature_weights": "tiny=w"}, "feature_weights' is 'tiny=w', but must be a mapping"),
        ({"resolution": 8, "feature_weights": ["dinov2-b=v", "dinov2-vit-b=w"]}, "'v' and 'w' are both for dinov2-b"),
        ({"resolution": 8, "feature_weights": ["v", "w"]}, "neither is written ENCODER=VALUE: leave one out"),
        ({"resolution": 8, "shards": 4}, "unknown setting 'shards'"),
    ]:
        with pytest.raises(UserError, match=message):
            PrepareConfig.parse(values)
    for weights in ({"dinov2-vit-b": "w/x"}, ("dinov2-vit-b=w/x",), ["dinov2-vit-b=w/x", "dinov2-b=w/x"]):
        config = PrepareConfig(resolution=8, features=("dinov2-vit-b",), feature_weights=weights)
        assert config.features == ("dinov2-b",)
        assert config.feature_weights == {"dinov2-b": "w/x"}


def test_too_many_workers_are_refused(folder, tmp_path):
    config = PrepareConfig(resolution=8, num_workers=100_000)
    for make in (prepare, make_plan):
        with pytest.raises(UserError, match="num_workers is 100,000"):
            make(folder, tmp_path / "out", config)
