"""Every user error gives one line on stderr and exit code 2, without importing torch."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from repa import __version__
from repa.base.errors import UserError
from repa.base.files import read_json
from repa.cli import main
from repa.runs import layout


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; returns the line on stderr."""

    def run(*argv):
        assert main.run([str(word) for word in argv]) == 2
        captured = capsys.readouterr()
        *progress, line = captured.err.splitlines()
        assert line.startswith("repa: ")
        assert all(" images" in before for before in progress)
        return line

    return run


def test_usage_and_version_are_printed(capsys):
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert main.run(argv) == 0
        assert all(verb in capsys.readouterr().out for verb in ["quickstart"])
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("verb", [*main.VERBS, "analyse probe", "evaluate reference"])
def test_every_verb_has_help(verb, capsys):
    try:
        code = main.run([*verb.split(), "--help"])
    except SystemExit as ended:
        code = ended.code
    assert code == 0
    assert f"usage: repa {verb}" in capsys.readouterr().out


def test_an_unknown_verb_suggests_the_nearest(refused):
    assert "'trian'" in (line := refused("trian"))
    assert "'train'" in line
    assert "Did you mean 'train'?" in line
    assert "'--verbose'" in refused("--verbose")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train"], "`repa train` needs RECIPE"),
        (["train", "quickstart"], "`repa train` needs --data"),
        (["train", "quikstart", "--data", "d", "--out", "o"], "recipe 'quikstart'"),
        (["train", "nothing.yaml", "--data", "d", "--out", "o"], "no configuration file nothing.yaml"),
        (["train", "quickstart", "--data", "nowhere", "--out", "o"], "nowhere holds no prepared data"),
        (["train", "quickstart", "--data", "d", "--out", "o", "--batch-sise", "3"], "Did you mean '--batch-size'?"),
        (["train", "quickstart", "--data", "d", "--out", "o", "--alignments.0.depth", "9"], "has 6 blocks"),
        (["prepare", "nowhere", "o", "--resolution", "32"], "There is no source 'nowhere'"),
        (["prepare", "photographs", "o"], "needs --resolution"),
        (["prepare", "photographs:nmu=3", "o", "--resolution", "32"], "Did you mean 'num'?"),
        (["sample", "nowhere", "--out", "s.npz"], "nowhere is not a run folder"),
        (["evaluate", "nothing.npz", "--reference", "nowhere"], "There is no source 'nothing.npz'"),
        (["report"], "needs RUNS"),
        (["report", ""], "needs RUNS"),
        (["prepare", "", "o", "--resolution", "32"], "needs SOURCE"),
        (["evaluate", "", "--reference", "r"], "needs SAMPLES"),
        (["report", "nowhere"], "nowhere"),
        (["show", "quickstrat"], "Did you mean 'quickstart'?"),
        (["convert", "nothing.pt", "o"], "There is no file or folder nothing.pt"),
        (["list", "recipe"], "Did you mean 'recipes'?"),
        (["quickstart", "--num-steps", "-1"], "--num-steps is '-1', but must be at least 0"),
    ],
)
def test_mistakes_leave_no_trace(argv, sentence, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(*argv)
    assert not any(tmp_path.iterdir())


def test_a_mistyped_path_suggests_the_one_beside_it(refused, random_run, data_folder):
    run, data = (path.with_name(path.name[:-1] + "x") for path in (random_run, data_folder))
    assert f"Did you mean {random_run.name!r}?" in refused("sample", run, "--out", "s.npz")
    assert f"Did you mean {data_folder.name!r}?" in refused("check", data)
    assert f"Did you mean {data_folder}?" in refused("check", data_folder.parent)
    assert f"Did you mean {data_folder.name!r}?" in refused("evaluate", random_run, "--reference", data)
    started = refused("train", "quickstart", "--data", data_folder, "--out", "o", "--init", run)
    assert f"{run} does not exist: give a run or a checkpoint. Did you mean {random_run.name!r}?" in started


def test_folders_that_are_no_runs_are_explained(refused, tmp_path):
    runs, export, many = tmp_path / "runs", tmp_path / "export", tmp_path / "many"
    configs = [runs / "a" / "config.yaml", *(many / f"{n}" / "config.yaml" for n in range(6)), export / "config.json"]
    for file in configs:
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    weights = export / "model.safetensors"
    weights.touch()
    assert f"Did you mean {runs / 'a'}?" in refused("train", runs, "--data", "d", "--out", "o")
    assert f"{many / '3'} or another of 6?" in refused("train", many, "--data", "d", "--out", "o")
    for path in (export, weights):
        assert f"`repa convert {export} RUN` makes a run of it" in refused("sample", path, "--out", "s.npz")


def test_a_run_is_no_source_of_images(refused, random_run, tmp_path):
    line = refused("prepare", random_run, tmp_path / "o", "--resolution", "16")
    assert f"{random_run} is a run of `repa train`, not a source of images" in line
    assert not (tmp_path / "o").exists()


def test_a_mistyped_path_suggests_no_distant_name(refused):
    assert "Did you mean" not in refused("show", "nothere")


def test_unusable_sources_are_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("prepare", tmp_path / "empty", tmp_path / "o", "--resolution", 16)
    with zipfile.ZipFile(tmp_path / "escape.zip", "w") as archive:
        archive.writestr("../../evil.png", b"")
    assert "leads out of the archive" in refused("prepare", tmp_path / "escape.zip", tmp_path / "o", "--resolution", 16)
    (tmp_path / "text.zip").write_text("no zip")
    assert "cannot be read as a zip" in refused("prepare", tmp_path / "text.zip", tmp_path / "o", "--resolution", 16)
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat" / "1.png").write_bytes(b"no picture")
    assert "cat/1.png" in refused("prepare", tmp_path / "bad", tmp_path / "o", "--resolution", 16)


def test_unusable_runs_are_refused(refused, random_run, data_folder, tmp_path):
    copy = shutil.copytree(random_run, tmp_path / "copy")
    path = layout.checkpoint_folder(copy, 20) / layout.EMA_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = tmp_path / "s.npz"
    assert "ema.safetensors is damaged" in refused("sample", copy, "--out", out)
    assert "no checkpoint of step 7: there are 10, 20" in refused("sample", copy, "--out", out, "--checkpoint", 7)
    assert "give a name such as samples.npz" in refused("sample", random_run, "--out", tmp_path / "s.png")
    assert "Class 9 does not exist" in refused("sample", random_run, "--out", out, "--labels", 9)
    assert "is not empty and not a run" in refused("train", "quickstart", "--data", data_folder, "--out", data_folder)
    said = refused("train", "quickstart", "--data", data_folder, "--out", copy)
    assert "holds a run with another configuration" in said
    assert f"give --init {copy} and another --out" in said  # another learning rate, or another batch size
    (copy / layout.CONFIG).write_text("model: {nmae: SiT-B/2}")
    assert "unknown setting" in refused("train", copy, "--data", data_folder, "--out", tmp_path / "r")


def test_unusable_data_is_refused(refused, data_folder, tmp_path):
    copy = shutil.copytree(data_folder, tmp_path / "data")
    train = ("train", "quickstart", "--data", copy, "--out", tmp_path / "r")
    assert "patches of 8" in refused("train", "quickstart", "--data", copy, "--out", tmp_path / "r", "--model.name",
                                     "SiT-S/8", "--model.hidden-dim", "12", "--model.latent-size", "12")  # fmt: skip
    assert "'dinov9'" in refused(*train, "--alignments.0.target", "dinov9")
    (copy / "images-00000.npy").unlink()
    assert "run the same `repa prepare` again" in refused(*train)
    manifest = read_json(copy / "manifest.json")
    (copy / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "has version 99" in refused(*train)
    (copy / "manifest.json").write_text("{")
    assert "manifest.json cannot be read as JSON" in refused(*train)
    assert not (tmp_path / "r").exists()


def test_a_path_of_the_wrong_kind_is_refused(refused, random_run, image_folder, data_folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert str(file) in refused("train", "quickstart", "--data", data_folder, "--out", file)
    assert str(file) in refused("train", "quickstart", "--data", data_folder, "--out", file / "r")
    assert str(file) in refused("prepare", image_folder, file, "--resolution", 16)
    assert str(file) in refused("sample", random_run, "--out", file / "s.npz", "--num-images", 1, "--steps", 1)
    assert file.read_text() == "mine"


def test_a_programming_error_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("repa.cli.list.kinds", lambda: {}["missing"])
    with pytest.raises(KeyError):
        main.run(["list"])


def test_error_messages_stay_on_one_line(monkeypatch, capsys):
    def fail():
        raise UserError("first\nsecond")

    monkeypatch.setattr("repa.cli.list.kinds", fail)
    assert main.run(["list"]) == 2
    assert capsys.readouterr().err == "repa: first second\n"


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("repa.cli.list.kinds", interrupt)
    assert main.run(["list"]) == 130
    assert "Run the same command again to continue" in capsys.readouterr().err


LIGHT = """
import contextlib, io, sys
from repa.cli import main
commands = {commands!r}
for argv in commands:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main.run(argv)
    heavy = {{"torch", "transformers", "diffusers", "matplotlib"}} & set(sys.modules)
    assert not heavy, (argv, heavy)
"""


def test_help_and_errors_import_nothing_heavy(random_run, data_folder, tmp_path):
    run, data, new = map(str, (random_run, data_folder, tmp_path / "new"))
    commands = [
        *([verb, "--help"] for verb in main.VERBS), ["--help"], ["nonsense"], ["show", "quickstart"],
        *(["list", kind] for kind in ("", "recipes", "encoders", "losses", "models", "samplers")),
        ["train", "quickstart", "--data", "d", "--out", "o", "--alignments.0.loss", "cosin"],
        ["train", "quickstart", "--data", "d", "--out", "o", "--alignments.0.depth", "40"],
        ["train", "sit-xl2-repa"], ["sample", "r", "--out", "s.npz", "--sampler", "heum"],
        ["prepare", "s", "o", "--resolution", "32", "--features", "dinov9"],
        ["evaluate", "s.npz", "--reference", "d", "--metrics", "fdd"],
        # mistyped folders
        ["quickstart", "--source", "nowhere"], ["prepare", "nowhere", "o", "--resolution", "32"],
        ["train", "quickstart", "--data", "nowhere", "--out", "o"], ["sample", "nowhere", "--out", "s.npz"],
        ["check", "nowhere"], ["bench", "quickstart", "--data", "nowhere"], ["report", "nowhere"],
        ["estimate", "quickstart", "--data", "nowhere"], ["export", "nowhere", "o"], ["ema", "nowhere", "--width", "0.1"],
        ["analyse", "encoders", "nowhere", "--encoders", "tiny"], ["analyse", "pictures", "nowhere", "--data", "nowhere"],
        ["analyse", "neighbours", "s.npz", "--data", "nowhere"], ["analyse", "neighbours", "s.npz", "--data", data],
        ["analyse", "cknna", "nowhere", "--data", data], ["analyse", "progress", "nowhere"], ["convert", "no.pt", "o"],
        ["evaluate", "s.npz", "--reference", data], ["evaluate", run, "--num-images", "9", "--reference", "nowhere"],
        ["evaluate", "reference", "nowhere", "--out", "r.npz"], ["sample", run, "--out", "s.npz", "--prompt-file", "no"],
        ["train", "quickstart", "--data", data, "--out", new, "--init", "nowhere"],
        ["train", "finetune-256", "--data", data, "--out", new, "--init", "sit:nowhere.pt"],
        ["train", "finetune-256", "--data", data, "--out", new], ["train", "quickstart", "--data", data, "--out", data],
    ]  # fmt: skip
    subprocess.run([sys.executable, "-c", LIGHT.format(commands=[[w for w in c if w] for c in commands])], check=True)


def test_the_exit_code_reaches_the_shell():
    done = subprocess.run([sys.executable, "-m", "repa", "lsit"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("repa: ")
    assert "'lsit'" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_file_names_that_a_terminal_cannot_show_are_escaped(encoding, tmp_path):
    """Including bytes that are not UTF-8, which Python represents as lone surrogates."""
    folder = b"\xe7\x8c\xab-\xff"
    done = subprocess.run(
        [sys.executable, "-m", "repa", "prepare", tmp_path.as_posix().encode() + b"/" + folder, str(tmp_path / "data")],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_work_that_is_reported_once_has_no_rate(capsys, monkeypatch):
    from repa.cli import console
    from repa.cli.console import ProgressBar

    monkeypatch.setattr(console, "MEASURED", 1e-9)
    with ProgressBar("sampling", "images") as bar:
        bar(16, 16)
    assert capsys.readouterr().err == "sampling: 16/16 images\n"
    with ProgressBar("sampling", "images") as bar:
        bar(8, 16)
        bar(16, 16)
    assert "/s)" in capsys.readouterr().err


def test_help_has_no_colours_when_they_are_disabled(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit):
        main.run(["check", "--help"])
    page = capsys.readouterr().out
    assert "--num-images" in page
    assert "\x1b" not in page


def test_a_system_without_file_locks_gets_one_line():
    script = "import sys; sys.modules['fcntl'] = None; from repa.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "repa: The commands need Linux or macOS, because they lock files. On Windows run them in WSL.\n"
    )
