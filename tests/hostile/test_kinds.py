"""Inputs that once caused a traceback, a hang or worse."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.base.images import decode_image
from repa.runs import layout, load_run
from repa.sampling import SampleConfig, generate
from tests.hostile.commands import outcome
from tests.report.fakes import made_by, results_file

PREPARE = ["--resolution", "16", "--num-workers", "0"]


def refused(argv) -> str:
    code, said = outcome([str(word) for word in argv])
    assert code == 2, (code, said)
    (line,) = [line for line in said.splitlines() if line.startswith("repa: ")]
    assert "\x1b" not in said
    assert "\x07" not in said
    return line


def png(side: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 99, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "images" / name / f"{index}.png").write_bytes(png())
    return tmp_path / "images"


@pytest.mark.parametrize("kind", ["zero", "fifo", "loop", "broken", "endless"])
def test_special_files_are_not_opened_as_images(kind, pictures, tmp_path):
    path = pictures / "a" / "x.png"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"zero": "/dev/zero", "loop": "x.png", "broken": "nowhere.png", "endless": "/proc/kmsg"}[kind])
    assert "x.png" in refused(["prepare", pictures, tmp_path / "o", *PREPARE])


def test_folders_that_contain_themselves_are_refused(pictures, tmp_path):
    (pictures / "a" / "again").symlink_to(pictures, target_is_directory=True)
    (pictures / "b" / "self").symlink_to(".", target_is_directory=True)
    code, said = outcome(["prepare", str(pictures), str(tmp_path / "o"), *PREPARE])
    assert code in (0, 2), said


def test_an_eps_file_starts_no_other_program():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="not a readable image"):
        decode_image(eps, "x.png")


def test_control_characters_in_names_do_not_reach_the_terminal(pictures, random_run, tmp_path):
    evil = tmp_path / "im\x1b]0;owned\x07ages\x1b[31m"
    shutil.copytree(pictures, evil)
    (evil / "a\x1b[2J").mkdir()
    (evil / "a\x1b[2J" / "x\x1b[31m.png").write_bytes(b"no image")
    assert "\\x1b" in refused(["prepare", evil, tmp_path / "o", *PREPARE])
    (evil / "a\x1b[2J" / "x\x1b[31m.png").write_bytes(png())
    code, said = outcome(["prepare", str(evil), str(tmp_path / "o\x1b[31m"), *PREPARE])
    assert (code, "\x1b" in said, "\x07" in said) == (0, False, False), said
    assert outcome(["show", str(tmp_path / "o\x1b[31m")])[0] == 0
    assert "\x1b" not in outcome(["show", str(tmp_path / "o\x1b[31m")])[1]
    run = shutil.copytree(random_run, tmp_path / "run\x1b[31m")
    with (run / layout.CONFIG).open("a") as config:
        config.write("# \x1b[31m\n")
    assert "\x1b" not in outcome(["show", str(run)])[1]


EVIL = "a\nlabels  from nowhere\tb\u202e|<i>"  # a class name


def named_by_folders(folder):
    for name in (EVIL, "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.png").write_bytes(png())
    return folder


def named_by_a_table(folder):
    named_by_folders(folder)
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{EVIL}/x.png", EVIL], ["b/x.png", "b"]]}))
    return folder


def named_by_parquet(folder):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir()
    parquet.write_table(pa.table({"image": [png()] * 2, "label": [EVIL, "b"]}), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize("made", [named_by_folders, named_by_a_table, named_by_parquet])
def test_class_names_are_printed_on_one_line(made, tmp_path):
    code, said = outcome(["prepare", str(made(tmp_path / "images")), str(tmp_path / "o"), *PREPARE])
    assert code == 0, said
    assert sum("labels  " in line for line in said.splitlines() if not line.startswith("  classes")) == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("  classes ")]
    assert "a\\nlabels  from nowhere\\tb\\u202e|<i> 1, b 1" in line


def test_names_in_foreign_manifests_and_runs_are_printed_on_one_line(random_run, data_folder, tmp_path):
    data, run = shutil.copytree(data_folder, tmp_path / "data"), shutil.copytree(random_run, tmp_path / "run")
    for path in (data / "manifest.json", run / layout.DATA):
        values = read_json(path)
        values["class_names"][0] = values["source"]["name"] = EVIL
        path.write_text(json.dumps(values))
    said = outcome(["show", str(data)])[1]
    assert "\nlabels" not in said
    assert "\u202e" not in said
    assert "\u202e" not in outcome(["sample", str(run), "--out", str(tmp_path / "s.npz"), "--labels", "z"])[1]
    assert outcome(["report", str(run), "--out", str(tmp_path / "r.html")])[0] == 0
    assert outcome(["export", str(run), str(tmp_path / "exported")])[0] == 0
    for path in (tmp_path / "r.html", tmp_path / "r.md", tmp_path / "exported" / "README.md"):
        text = path.read_text()
        assert "\u202e" not in text
        assert "|<i>" not in text, path
    assert r"\\nlabels  from nowhere\\tb\\u202e\|\<i\>" in (tmp_path / "exported" / "README.md").read_text()


def test_tars_with_huge_names_are_refused(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 512
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a" * 512
    (tmp_path / "x.tar").write_bytes(block * 3000 + b"\0" * 1024)
    assert "x.tar" in refused(["prepare", tmp_path / "x.tar", tmp_path / "o", *PREPARE])


@pytest.mark.parametrize(
    "metadata", [b"no json", b"null", b"[1]", b'{"info": null}', b'{"info": {"features": []}}', b"[" * 100_000]
)
def test_invalid_parquet_metadata_is_refused(metadata, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"image": [png()] * 4, "label": [0, 1, 0, 1]}).replace_schema_metadata({b"huggingface": metadata})
    parquet.write_table(table, tmp_path / "x.parquet")
    code, said = outcome(["prepare", str(tmp_path / "x.parquet"), str(tmp_path / "o"), *PREPARE])
    assert code == 0, said


def test_texts_in_a_column_of_class_numbers_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    feature = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    meta = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    table = pa.table({"image": [png()] * 2, "label": ["cat", "dog"]}).replace_schema_metadata(meta)
    parquet.write_table(table, tmp_path / "x.parquet")
    assert "label" in refused(["prepare", tmp_path / "x.parquet", tmp_path / "o", *PREPARE])


def test_a_label_with_thousands_of_digits_is_refused(pictures, tmp_path):
    for label in ("9" * 5000, 10**4000):
        text = '{"labels": [["a/0.png", %s]]}' % label if isinstance(label, str) else ""  # noqa: UP031
        (pictures / "dataset.json").write_text(text or '{"labels": [["a/0.png", 1%s]]}' % ("0" * 4000))
        refused(["prepare", pictures, tmp_path / "o", *PREPARE])


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "{a: " * 20_000, "- " * 50_000, "x: " + "9" * 5000, "a: &x [*x]", "\x00"]
)
def test_deeply_nested_and_invalid_yaml_is_refused(text, data_folder, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    assert "r.yaml" in refused(["train", tmp_path / "r.yaml", "--data", data_folder, "--out", tmp_path / "o"])


def test_stray_folders_among_checkpoints_are_ignored(random_run, tmp_path):
    run = shutil.copytree(random_run, tmp_path / "run")
    for name in ("²", "٣", "9" * 200, "7", "-1", "0000030 "):
        (run / layout.CHECKPOINTS / name).mkdir()
    assert layout.checkpoint_steps(run) == [10, 20]
    assert outcome(["sample", str(run), "--out", str(tmp_path / "s.npz"), "--num-images", "1", "--steps", "1"])[0] == 0


def test_a_truncated_model_in_a_report_is_named(random_run, tmp_path):
    run = shutil.copytree(random_run, tmp_path / "run")
    path = layout.checkpoint_folder(run, 20) / layout.MODEL_FILE
    path.write_bytes(path.read_bytes()[:1000])
    assert "model.safetensors" in refused(["report", run, "--out", tmp_path / "r.html"])


@pytest.mark.parametrize("name", ["../..", "/etc", "a/b", "..", "."])
def test_names_that_are_paths_are_refused(name, random_run, data_folder, tmp_path):
    data, run = shutil.copytree(data_folder, tmp_path / "data"), shutil.copytree(random_run, tmp_path / "run")
    manifest = read_json(data / "manifest.json")
    manifest["config"]["features"] = [name]
    manifest["features"] = {name: manifest["features"]["tiny"]}
    (data / "manifest.json").write_text(json.dumps(manifest))
    refused(["check", data, "--full"])
    config = yaml.safe_load((run / layout.CONFIG).read_text())
    config["alignments"][0]["target"] = name
    (run / layout.CONFIG).write_text(yaml.safe_dump(config))
    refused(["train", run, "--data", data_folder, "--out", tmp_path / "o"])
    assert not (tmp_path / "o").exists()


def test_a_log_that_is_a_link_is_not_written(tiny_config, data_folder, tmp_path):
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(tiny_config.override(num_steps=2, save_every=2).to_yaml())
    train = ["train", str(recipe), "--data", str(data_folder), "--out", str(run)]
    assert outcome(train)[0] == 0
    for name in (layout.LOG, layout.METRICS):
        mine = tmp_path / f"mine-{name}"
        shutil.move(run / name, mine)
        (run / name).symlink_to(mine)
        before = mine.read_bytes()
        code, said = outcome([*train, "--num-steps", "3"])
        assert mine.read_bytes() == before, name
        assert code in (0, 2), said
        (run / name).unlink(missing_ok=True)
        mine.rename(run / name)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("snapshots", ["train", "RUN", "--data", "DATA", "--out", "RUN", "--num-steps", "30"]),
        ("checkpoints", ["train", "RUN", "--data", "DATA", "--out", "RUN", "--num-steps", "30"]),
        ("averages", ["ema", "RUN", "--width", "0.1"]),
        (
            "evaluations",
            ["evaluate", "RUN", "--reference", "DATA", "--features", "tiny", "--num-images", "4", "--steps", "1"],
        ),
        ("analysis", ["analyse", "cknna", "RUN", "--data", "DATA", "--encoder", "tiny", "--times", "0.5"]),
        (
            "analysis/cache",
            ["analyse", "cknna", "RUN", "--data", "DATA", "--encoder", "tiny", "--times", "0.5", "--out", "OUT"],
        ),
    ],
)
def test_a_linked_folder_inside_a_run_is_not_written(folder, words, random_run, data_folder, tmp_path):
    """Training removes the snapshots of steps that it repeats: with the link, from a folder of somebody else."""
    run, victim = shutil.copytree(random_run, tmp_path / "run"), tmp_path / "victim"
    (victim / "0000040").mkdir(parents=True)
    (victim / "0000040" / "precious").touch()
    if (run / folder).is_dir():
        shutil.copytree(run / folder, victim, dirs_exist_ok=True)
        shutil.rmtree(run / folder)
    (run / folder).parent.mkdir(exist_ok=True)
    (run / folder).symlink_to(victim)
    before = sorted(victim.rglob("*"))
    places = {"RUN": run, "DATA": data_folder, "OUT": tmp_path / "out.json"}
    assert f"{run / folder} is a symbolic link to another folder" in refused([places.get(w, w) for w in words])
    assert sorted(victim.rglob("*")) == before
    read = ["sample", run, "--checkpoint", 20, "--num-images", 2, "--steps", 1, "--out", tmp_path / "s.npz"]
    assert outcome([*map(str, read)])[0] == 0


def test_a_linked_folder_inside_data_is_not_written(pictures, data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))
    victim, unfinished = tmp_path / "victim", tmp_path / "unfinished"
    victim.mkdir()
    (victim / "settings.json").write_text("{}")
    unfinished.mkdir()
    (unfinished / "parts").symlink_to(victim)
    assert "parts is a symbolic link" in refused(["prepare", pictures, unfinished, *PREPARE])
    # without the references that other tests have made
    data = shutil.copytree(data_folder, tmp_path / "data", ignore=shutil.ignore_patterns("reference"))
    (data / "reference").symlink_to(victim)
    measure = ["evaluate", data, "--reference", data, *MEASURED, "--out", tmp_path / "e.json"]
    assert outcome([*map(str, measure)])[0] == 0
    assert [path.name for path in victim.iterdir()] == ["settings.json"]


def test_the_default_dtype_does_not_change_samples(random_run):
    run = load_run(random_run)
    config = SampleConfig(steps=2, sampler="heun")
    wanted = generate(run, config, [0, 1]).images
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(generate(load_run(random_run), config, [0, 1]).images, wanted)
    finally:
        torch.set_default_dtype(before)


def test_a_log_that_is_a_pipe_is_refused(tiny_config, data_folder, tmp_path):
    """Opening it for writing would wait for a reader without end."""
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(tiny_config.override(num_steps=2, save_every=2).to_yaml())
    train = ["train", recipe, "--data", data_folder, "--out", run]
    assert outcome([*map(str, train)])[0] == 0
    (run / layout.LOG).unlink()
    os.mkfifo(run / layout.LOG)
    assert "log.txt is refused: it is a named pipe" in refused([*train, "--num-steps", "3"])


MEASURED = ["--features", "tiny", "--metrics", "fd"]
FEW = ["--num-images", "4", "--steps", "1"]
COMPARED = ["--data", "data", "--encoder", "tiny", "--times", "0.5"]


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "run", "--out", "run/data", *FEW],
        ["sample", "run", "--out", "data/manifest.npz", *FEW],
        ["sample", "run", "--out", "photo.npz", *FEW],
        ["evaluate", "run", "--reference", "data", *MEASURED, *FEW, "--out", "run/data.json"],
        ["evaluate", "run", "--reference", "data", *MEASURED, *FEW, "--out", "data/manifest.json"],
        ["evaluate", "reference", "data", "--features", "tiny", "--out", "mine.npz"],
        ["analyse", "cknna", "run", *COMPARED, "--out", "data/manifest.json"],
        ["analyse", "cknna", "run", *COMPARED, "--out", "photo.json"],
        ["report", "run", "--out", "README.html"],
    ],
)
def test_an_output_destroys_no_other_file(argv, random_run, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(random_run, "run")
    shutil.copytree(data_folder, "data")
    (tmp_path / "photo.png").write_bytes(png())
    (tmp_path / "README.md").write_text("mine")
    np.savez("mine.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "exists" in refused(argv)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path in before} == before
    # another name is free, and its results are replaced when they are made again
    free = [
        word if i != argv.index("--out") + 1 else f"free/new{word[word.rfind('.') :]}" for i, word in enumerate(argv)
    ]
    for _ in range(2):
        assert outcome(free)[0] == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "run", "--reference", "data", *MEASURED, *FEW],
        ["analyse", "cknna", "run", *COMPARED],
        ["analyse", "probe", "run", "--data", "data", "--times", "0.5"],
        ["analyse", "encoders", "data", "--encoders", "tiny"],
        ["train", "run", "--data", "data", "--out", "other"],
    ],
)
@pytest.mark.parametrize("field", ["images", "labels"])
def test_changed_bytes_of_data_spoil_no_result(field, argv, random_run, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(random_run, "run")
    shutil.copytree(data_folder, "data")
    path = tmp_path / "data" / f"{field}-00000.npy"
    np.save(path, np.load(path) ^ 1)  # of the same size and type
    assert f"do not match their checksums ({field}-00000.npy)" in refused(argv)


ENDLESS = "1" + "0" * 400  # more than a float can hold


@pytest.mark.parametrize(
    "line",
    [
        f'{{"kind": "train", "step": {ENDLESS}}}',
        f'{{"kind": "train", "step": 5, "denoising": {ENDLESS}, "seconds": {ENDLESS}}}',
        f'{{"kind": "event", "step": {ENDLESS}, "message": "x"}}',
        '{"kind": "train", "step": 5, "alignment": {"\\ud800 \\u001b[31m": 1}}',
        json.dumps({"kind": "train", "step": 5, "alignment": {f"a{n}": 1 for n in range(1000)}}),
        '{"kind": "train", "step": true, "denoising": 1}',
    ],
)
def test_a_report_of_a_foreign_log_is_made_soon(line, random_run, tmp_path, recwarn):
    run = shutil.copytree(random_run, tmp_path / "run")
    (run / layout.METRICS).write_text(f'{{"kind": "train", "step": 4, "denoising": 1.0}}\n{line}\n')
    code, said = outcome(["report", str(run), "--out", str(tmp_path / "r.html")])
    assert code == 0, said
    assert not any("\x1b" in str(warning.message) for warning in recwarn)
    assert '"a100"' not in (tmp_path / "r.html").read_text()


def test_a_report_of_foreign_evaluations_has_no_traceback(random_run, tmp_path):
    run = shutil.copytree(random_run, tmp_path / "run")
    made = made_by(run, 20, guidance=[[1], "cfg"])
    path = results_file(run / layout.EVALUATIONS / "x.json", {"fid": 1.0}, made)
    code, said = outcome(["report", str(run), "--out", str(tmp_path / "r.html")])
    assert code == 0, said
    path.write_text(path.read_text().replace("50000", ENDLESS))
    assert "a number has 401 digits" in refused(["report", run, "--out", tmp_path / "r.html"])
