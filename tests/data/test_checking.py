import json

import numpy as np
import pytest

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.cli.main import run as repa
from repa.data import PrepareConfig, check_bytes, check_models, count_duplicates, make_plan, open_data, prepare
from tests.data.conftest import content, spoil

FULL = PrepareConfig(
    resolution=8, shard_size=3, batch_size=2, num_workers=0, autoencoder="kl", features=("tiny",),
    feature_forms={"": "pca2-int8"},
)  # fmt: skip


@pytest.fixture
def out(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "out", FULL)
    return tmp_path / "out"


def test_duplicate_images_are_counted_without_mirrored_copies(tmp_path, capsys):
    """Duplicates with other names, shards or classes count, but not an image that differs in one pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    pixels[3] = pixels[6] = pixels[0]
    pixels[7] = pixels[1]
    pixels[5], pixels[5, 0, 0, 0] = pixels[2], pixels[2, 0, 0, 0] ^ 1
    np.savez(tmp_path / "images.npz", arr_0=pixels, labels=np.arange(8) % 2)
    for flip in (False, True):
        out = tmp_path / f"out{flip}"
        config = PrepareConfig(resolution=8, shard_size=3, num_workers=0, flip=flip)
        prepare(str(tmp_path / "images.npz"), out, config)
        assert count_duplicates(open_data(out)) == 3
        assert repa(["check", str(out), "--full"]) == 0
        assert "3 of 8 equal an earlier one, pixel for pixel" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["images-00002.npy", "basis.tiny.npy", "scale.tiny-00000.npy"])
def test_a_changed_byte_is_found_in_every_file(out, name):
    total = sum(p.stat().st_size for p in out.glob("*.npy"))
    seen = []
    assert check_bytes(out, lambda *report: seen.append(report)) == total
    assert seen[-1][:2] == (total, total)
    data = bytearray((out / name).read_bytes())
    data[-1] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"1 of 25 files in .* do not match their checksums \({name}\): delete them"):
        check_bytes(out)


def test_a_changed_byte_is_found_in_a_reference(out):
    path = out / "reference" / "tiny-0123456789ab.npz"
    path.parent.mkdir()
    np.savez(path, mu=np.arange(100.0), count=np.array(11))
    check_bytes(out)
    data = bytearray(path.read_bytes())
    data[data.index(np.float64(50.0).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"tiny-0123456789ab\.npz cannot be read as a reference.*Delete it"):
        check_bytes(out)


def test_encoding_again_gives_the_stored_values(out):
    findings = check_models(out, num=5)
    assert [finding.field for finding in findings] == ["moments", "features.tiny"]
    assert all(finding.error == 0 and not finding.trouble for finding in findings)


def test_a_model_with_other_outputs_is_found(out, fakes, monkeypatch):
    encode = type(fakes[0]).encode
    monkeypatch.setattr(type(fakes[0]), "encode", lambda self, images, dtype: 1.1 * encode(self, images, dtype))
    moments, tokens = check_models(out)
    assert moments.error == pytest.approx(0.1, rel=0.02)
    assert "differs by 0.1 from the stored values, more than 0.01" in moments.trouble
    assert tokens.error == 0


def test_stored_values_of_other_images_are_found(out):
    """Files and checksums are correct, so only encoding again reveals it."""
    a, b = (np.load(out / f"moments-0000{k}.npy") for k in (0, 1))
    np.save(out / "moments-00000.npy", b), np.save(out / "moments-00001.npy", a)
    moments, _ = check_models(out)
    assert moments.error > 0.02
    assert moments.trouble


def test_other_weights_are_reported_with_both_checksums(out, fakes):
    fakes[1].identity["weights_sha256"] = "d" * 64
    moments, tokens = check_models(out)
    assert not moments.trouble
    assert tokens.error is None
    assert f"made with weights_sha256 {'b' * 64!r}, but the weights here have {'d' * 64!r}" in tokens.trouble


def test_weights_that_cannot_be_loaded_are_skipped(out, monkeypatch):
    def lost(spec, **options):
        raise UserError("no network.")

    monkeypatch.setattr("repa.data.encoding.load_encoder", lost)
    moments, tokens = check_models(out)
    assert moments.error == 0
    assert tokens == (tokens.field, None, "not encoded again: no network.", False)


def test_encoding_again_needs_images(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "lean", FULL.override(store_images=False))
    with pytest.raises(UserError, match="stores no images, so nothing can be encoded again"):
        check_models(tmp_path / "lean")


def test_a_plan_matches_the_result_and_writes_nothing(folder, tmp_path, fakes):
    config = FULL.override(flip=True)
    plan = make_plan(folder, tmp_path / "out", config, seconds=0.2)
    assert not (tmp_path / "out").exists()
    manifest = prepare(folder, tmp_path / "out", config)
    made = dict.fromkeys(plan.sizes, 0)
    for shard in manifest.shards:
        for field, record in shard.files.items():
            made[field] += int(np.prod(record.shape)) * np.dtype(record.dtype).itemsize
    assert plan.sizes == made
    assert (plan.num_images, plan.num_classes, plan.num_copies) == (11, 2, 2)
    assert (plan.num_shards, plan.num_todo) == (len(manifest.shards), 22)
    assert list(plan.rates) == ["decode", "base", "tiny"]
    assert all(rate > 0 for rate in plan.rates.values())
    models = 1 / (1 / plan.rates["base"] + 1 / plan.rates["tiny"])
    assert plan.rate == pytest.approx(min(plan.rates["decode"], models))
    assert plan.seconds(world=2) == pytest.approx(11 / plan.rate)


def test_a_plan_counts_the_remaining_work(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "out", FULL, rank=1, world=2)
    before = content(tmp_path / "out")
    assert make_plan(folder, tmp_path / "out", FULL, seconds=0.1).num_todo == 6  # shards 0 and 2
    assert content(tmp_path / "out") == before
    with pytest.raises(UserError, match=r"\(resolution: 8 -> 12"):
        make_plan(folder, tmp_path / "out", FULL.override(resolution=12))
    for path in folder.rglob("*.png"):
        spoil(path)
    with pytest.raises(UserError, match="None of the tested images can be read"):
        make_plan(folder, tmp_path / "new", FULL, seconds=0.1)


def test_an_old_manifest_without_forms_and_copies_still_opens(folder, tmp_path, fakes):
    config = FULL.override(feature_forms={})
    prepare(folder, tmp_path / "out", config)
    path = tmp_path / "out" / "manifest.json"
    values = read_json(path)
    for key in ("feature_forms", "precision", "flip", "labels"):
        values["config"].pop(key)
    for key in ("form", "basis"):
        values["features"]["tiny"].pop(key)
    for shard in values["shards"]:
        shard.pop("flipped"), shard.pop("captions")
    path.write_text(json.dumps(values))
    manifest = prepare(folder, tmp_path / "out", config)  # preparing continues it
    assert (manifest.features["tiny"].form, manifest.originals) == ("fp16", range(11))
    assert all(not finding.trouble for finding in check_models(tmp_path / "out"))


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [((11,), "do not add up"), ((-1, 12), "do not add up"), ((5, 6), "do not match the counts in its manifest")],
)
def test_class_counts_that_contradict_the_labels_are_found(counts, sentence, out):
    path = out / "manifest.json"
    path.write_text(json.dumps({**read_json(path), "class_counts": counts}))
    with pytest.raises(UserError, match=sentence):
        check_bytes(out)
