"""Fields of shards: token forms, flipped copies and captions, and adding and removing fields."""

import json

import numpy as np
import pytest
import torch

from repa.base import lock
from repa.base.errors import UserError
from repa.base.files import read_json
from repa.data import Manifest, PrepareConfig, add, encoding, open_data, prepare, preparing, remove
from repa.data.packing import read_basis, unpack
from tests.data.conftest import all_rows, content, spoil
from tests.oracles import packing as oracle

SMALL = PrepareConfig(resolution=8, shard_size=3, batch_size=2, num_workers=0)
FULL = SMALL.override(autoencoder="kl", features=("tiny",))


def tokens_of(data, name="tiny"):
    """Stored tokens of all images, at full width."""
    rows = {
        field: torch.from_numpy(all_rows(data, field)) for field in data.manifest.fields if field.endswith(f".{name}")
    }
    basis = read_basis(data.folder, data.features[name])
    return unpack(rows[f"features.{name}"], rows.get(f"scale.{name}"), basis).numpy()


@pytest.fixture
def plain(folder, tmp_path, fakes):
    """Data prepared with everything in float16."""
    prepare(folder, tmp_path / "plain", FULL)
    return open_data(tmp_path / "plain")


def test_int8_tokens_are_close_to_the_originals(folder, tmp_path, plain):
    manifest = prepare(folder, tmp_path / "out", FULL.override(feature_forms={"": "int8"}))
    data, facts = open_data(tmp_path / "out"), manifest.features["tiny"]
    assert manifest.fields["features.tiny"] == ("int8", (4, 3))
    assert manifest.fields["scale.tiny"] == ("float32", (4,))
    assert (facts.form, facts.dim, facts.grid, facts.basis) == ("int8", 3, 2, None)
    expected = tokens_of(plain)
    # half a scale of at most 1 / 127, and float16
    np.testing.assert_allclose(tokens_of(data), expected, atol=1 / 254 + 1e-3)
    np.testing.assert_array_equal(all_rows(data, "pooled.tiny"), all_rows(plain, "pooled.tiny"))


@pytest.mark.parametrize("form", ["pca2", "pca2-int8"])
def test_principal_coordinates_reproduce_the_tokens(folder, tmp_path, plain, form):
    manifest = prepare(folder, tmp_path / "out", FULL.override(feature_forms={"tiny": form}))
    facts = manifest.features["tiny"]
    assert (facts.dim, facts.form, facts.basis.file, facts.basis.shape) == (3, form, "basis.tiny.npy", (3, 3))
    assert manifest.fields["features.tiny"][1] == (4, 2)
    tokens = tokens_of(plain).reshape(-1, 3)  # with only 11 images, the directions are computed from all of them
    mean, directions = oracle.principal_directions(tokens, 2)
    expected = mean + (tokens - mean) @ directions.T @ directions
    np.testing.assert_allclose(tokens_of(open_data(tmp_path / "out")).reshape(-1, 3), expected, atol=5e-3)
    assert len(list((tmp_path / "out").glob("basis*"))) == 1


def test_principal_directions_use_images_from_the_whole_source(folder, tmp_path, fakes, monkeypatch):
    """The first images of a source sorted by class would be of one class."""
    monkeypatch.setattr("repa.data.encoding.SAMPLE", 3)
    seen = []
    features = encoding.FeatureFields.features
    monkeypatch.setattr(
        encoding.FeatureFields, "features", lambda self, pixels: seen.append(pixels) or features(self, pixels)
    )
    prepare(folder, tmp_path / "out", FULL.override(feature_forms={"": "pca2"}))
    images = all_rows(open_data(tmp_path / "out"), "images")
    np.testing.assert_array_equal(np.concatenate(seen[:2]), images[[0, 5, 10]])


def test_a_changed_form_and_too_many_directions_are_refused(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "out", FULL.override(feature_forms={"": "int8"}))
    with pytest.raises(UserError, match="feature_forms of tiny: int8 -> fp16"):
        prepare(folder, tmp_path / "out", FULL)
    with pytest.raises(UserError, match="tiny has tokens of width 3, smaller than the 4 directions of pca4"):
        prepare(folder, tmp_path / "new", FULL.override(feature_forms={"": "pca4"}))
    assert not (tmp_path / "new").exists()


def test_a_lost_basis_is_computed_again_or_refused(folder, tmp_path, fakes):
    config, out = FULL.override(feature_forms={"": "pca2"}), tmp_path / "out"
    prepare(folder, out, config)
    before = content(out)
    (out / "basis.tiny.npy").unlink()
    with pytest.raises(UserError, match=r"basis\.tiny\.npy is missing .* run the same `repa prepare` again"):
        open_data(out)
    prepare(folder, out, config)
    assert content(out) == before
    (out / "features.tiny-00001.npy").unlink()
    (out / "basis.tiny.npy").unlink()
    prepare(folder, out, config)
    assert content(out) == before
    np.save(out / "basis.tiny.npy", np.eye(3, dtype=np.float32))
    (out / "features.tiny-00001.npy").unlink()
    with pytest.raises(UserError, match=r"made by another tiny \(different: basis\)"):
        prepare(folder, out, config)


def test_flipped_copies_follow_the_images_and_do_not_count(folder, tmp_path, plain):
    manifest = prepare(folder, tmp_path / "out", FULL.override(flip=True))
    data = open_data(tmp_path / "out")
    assert (manifest.num_images, manifest.originals, manifest.class_counts) == (22, range(11), (7, 4))
    assert [(s.num, s.flipped) for s in manifest.shards] == [(n, f) for f in (False, True) for n in (3, 3, 3, 2)]
    for field in manifest.fields:
        np.testing.assert_array_equal(all_rows(data, field)[:11], all_rows(plain, field))
    images = all_rows(data, "images")
    np.testing.assert_array_equal(images[11:], images[:11, :, :, ::-1])
    np.testing.assert_array_equal(all_rows(data, "labels")[11:], all_rows(data, "labels")[:11])
    moments = all_rows(data, "moments")
    np.testing.assert_array_equal(moments[11:], moments[:11, :, :, ::-1])  # exact because the fake models are symmetric
    cells = all_rows(data, "features.tiny").reshape(22, 2, 2, 3)
    np.testing.assert_array_equal(cells[11:], cells[:11, :, ::-1])


def test_a_bad_image_is_skipped_in_both_copies(folder, tmp_path, fakes):
    spoil(folder / "ants" / "004.png")
    manifest = prepare(folder, tmp_path / "out", FULL.override(flip=True, skip_bad=True))
    assert (manifest.num_images, len(manifest.originals), manifest.skipped) == (20, 10, ["ants/004.png"])
    open_data(tmp_path / "out").check()


def test_flipped_shards_that_do_not_match_are_refused(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "out", SMALL.override(flip=True))
    values = read_json(tmp_path / "out" / "manifest.json")
    values["shards"][1]["flipped"] = True
    values["class_counts"] = [sum(shard["num"] for shard in values["shards"] if not shard["flipped"]), 0]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="mirrored shards do not match"):
        Manifest.open(tmp_path / "out")


def test_captions_are_stored_next_to_the_shards(folder, tmp_path, fakes, monkeypatch):
    spoil(folder / "ants" / "001.png")

    def with_captions(spec, **options):
        source = opened(spec, **options)
        source.has_captions = True
        source.captions = lambda i: () if i == 5 else (f"Bild {i} ü\n", "second")
        return source

    opened = preparing.open_source
    monkeypatch.setattr(preparing, "open_source", with_captions)
    manifest = prepare(folder, tmp_path / "out", FULL.override(flip=True, skip_bad=True))
    texts = []
    for shard in manifest.shards:
        assert shard.captions.intact(tmp_path / "out")
        lines = (tmp_path / "out" / shard.captions.file).read_text().splitlines()
        assert len(lines) == shard.num
        texts += [json.loads(line) for line in lines]
    expected = [[] if i == 5 else [f"Bild {i} ü\n", "second"] for i in range(11) if i != 1]
    assert texts == expected * 2
    (tmp_path / "out" / "captions-00001.jsonl").unlink()
    prepare(folder, tmp_path / "out", FULL.override(flip=True, skip_bad=True))
    assert (tmp_path / "out" / "captions-00001.jsonl").exists()


def test_fields_can_be_made_one_after_the_other(folder, tmp_path, fakes, plain):
    out, calls = tmp_path / "out", fakes[1].calls
    assert prepare(folder, out, FULL, only=["base"]) is None
    assert fakes[1].calls == calls
    assert not list(out.glob("features*"))
    with pytest.raises(UserError, match="not finished"):
        open_data(out)
    prepare(folder, out, FULL, only=["features:tiny"])
    assert content(out) == content(plain.folder)
    for wrong in ("tiny", "features:base", "features:dino-b", "moments"):
        with pytest.raises(UserError, match="only is .* base or features:tiny"):
            prepare(folder, out, FULL, only=[wrong])


def test_removing_a_field_keeps_the_others(folder, tmp_path, fakes):
    out, config = (
        tmp_path / "out",
        FULL.override(features=("tiny", "dinov2-b"), feature_forms={"dinov2-b": "pca2-int8"}),
    )
    prepare(folder, out, FULL)
    before = content(out)
    add(out, "features:dinov2-b", form="pca2-int8")
    assert open_data(out).manifest.config == config
    manifest = remove(out, "features:dinov2-b")
    assert content(out) == before
    assert manifest == open_data(out).manifest
    prepare(folder, out, config)
    remove(out, "features:tiny")
    data = open_data(out)
    data.check()
    assert list(data.features) == ["dinov2-b"]
    assert not list(out.glob("*tiny*"))


def test_fields_are_not_removed_while_others_are_made(folder, tmp_path, fakes, plain):
    out = tmp_path / "out"
    refusals = []

    def interrupts(done, total, note):
        with pytest.raises(UserError, match="repa prepare, process") as refusal:
            remove(out, "features:tiny")
        refusals.append(refusal)

    config = PrepareConfig(resolution=8, num_workers=0, features=("tiny",))
    manifest = prepare(folder, out, config, progress=interrupts)
    assert refusals
    assert list(manifest.features) == ["tiny"]
    with lock.exclusive(out, "repa prepare --remove"), pytest.raises(UserError, match="repa prepare --remove, process"):
        prepare(folder, out, config)
    remove(out, "features:tiny")
    assert not lock.lock_of(out).exists()


def test_images_can_be_removed_where_latents_are_stored(folder, tmp_path, plain, fakes):
    lean = prepare(folder, tmp_path / "lean", FULL.override(store_images=False))
    remove(plain.folder, "images")
    assert open_data(plain.folder).manifest == lean
    assert content(plain.folder) == content(tmp_path / "lean")
    with pytest.raises(UserError, match="stores no images"):
        remove(plain.folder, "images")
    prepare(folder, tmp_path / "pixels", SMALL)
    with pytest.raises(UserError, match="it stores no moments"):
        remove(tmp_path / "pixels", "images")
    for wrong in ("labels", "moments", "features:dino-b", "tiny", "features:base", "features:text"):
        with pytest.raises(UserError, match=f"'{wrong}' to remove.* images or features:tiny"):
            remove(plain.folder, wrong)


def test_a_killed_removal_is_continued(folder, tmp_path, plain, monkeypatch):
    prepare(folder, tmp_path / "out", FULL.override(features=()))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.unlink", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        remove(plain.folder, "features:tiny")
    assert not open_data(plain.folder).features  # consistent, with files that are no longer needed
    remove(plain.folder, "features:tiny")
    assert content(plain.folder) == content(tmp_path / "out")


def test_records_of_an_encoder_with_a_similar_name_stay(folder, tmp_path, fakes):
    config = FULL.override(features=("tiny", "tiny-classifier"))
    prepare(folder, tmp_path / "out", config, only=("features:tiny", "features:tiny-classifier"))
    remove(tmp_path / "out", "features:tiny")
    records = {path.name.rpartition("-")[0] for path in (tmp_path / "out" / "parts").glob("*-*.json")}
    assert records == {"tiny-classifier"}


def test_an_encoder_that_cannot_be_loaded_can_be_removed_again(folder, tmp_path, fakes, monkeypatch):
    """When its weights cannot be loaded, removing it makes the folder complete again."""
    prepare(folder, tmp_path / "whole", FULL)
    prepare(folder, tmp_path / "out", FULL)
    both = FULL.override(features=("tiny", "dinov2-b"))
    with pytest.raises(ZeroDivisionError):
        prepare(folder, tmp_path / "out", both, progress=lambda done, total, note: 1 / 0)
    assert (tmp_path / "out" / "parts").is_dir()
    remove(tmp_path / "out", "features:dinov2-b")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# bf16 is slow on CPUs that only emulate it.
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_moments_in_half_precision_are_near_those_of_float32(folder, tmp_path, precision):
    """The error that docs/data.md states, for a network of the same kind with random weights."""
    from tests.autoencoders.folders import save_kl

    weights = str(save_kl(tmp_path / "weights", latent_channels=4))
    config = PrepareConfig(
        resolution=8, batch_size=11, autoencoder="sd-vae-ft-mse", autoencoder_weights=weights, num_workers=0
    )
    prepare(folder, tmp_path / "fp32", config)
    prepare(folder, tmp_path / "half", config.override(precision=precision))
    exact, half = (all_rows(open_data(tmp_path / name), "moments").astype(np.float64) for name in ("fp32", "half"))
    error = np.sqrt(np.mean((half - exact) ** 2) / np.mean(exact**2))
    assert 1e-5 < error < {"bf16": 0.02, "fp16": 0.003}[precision]
    with pytest.raises(UserError, match=f"precision: fp32 -> {precision}"):
        prepare(folder, tmp_path / "fp32", config.override(precision=precision))
