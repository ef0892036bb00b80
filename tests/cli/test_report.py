"""The command `repa report`: the page and its tables."""

from repa.cli.main import run as repa
from tests.report.fakes import config, fake_run, results_file


def test_the_page_and_its_tables_are_written_together(tmp_path, capsys):
    runs = []
    for seed in range(2):
        for name in ("base", "ours"):
            aligned = name == "ours"
            distances = {50: 20.0 - 8 * aligned, 100: 10.0 - 3 * aligned}
            folder = tmp_path / str(seed) / name
            runs.append(fake_run(folder, aligned=aligned, distances=distances, settings=config(aligned, seed=seed)))
    published = results_file(tmp_path / "adm.json", {"fid": 4.6}, None, samples="adm.npz")
    out = tmp_path / "pages" / "r.html"
    out.parent.mkdir()
    picture = tmp_path / "picture.png"
    leftover = tmp_path / ".picture.png.abcd1234.tmp"  # of a killed command
    leftover.touch()
    command = ["report", *map(str, runs), "--results", str(published), "--out", str(out), "--picture", str(picture)]
    assert repa(command) == 0
    assert picture.stat().st_size > 10_000
    assert not leftover.exists()
    assert "r.md" in capsys.readouterr().out
    text = out.with_suffix(".md").read_text()
    assert "Over 2 seeds, ours ends at a Fréchet distance of 7.00 ± 0.00 against 10.00 ± 0.00" in text
    assert "| adm.npz |  | 4.60 |" in text
    assert "0/ours" in out.read_text().replace("<wbr>", "")
    assert out.with_suffix(".csv").read_text().count("\n") == 1 + 2 * 2 + 1


def test_mistakes_give_one_line_errors(tmp_path, capsys):
    run = fake_run(tmp_path / "a")
    for words, sentence in (
        ([str(run), "--out", "r.pdf"], "--out is r.pdf, which does not end in .html"),
        ([str(run), "--picture", "r.svg"], "--picture is r.svg, which does not end in .png"),
        ([str(tmp_path / "b")], "b is not a run folder"),
        ([str(run), "--results", str(tmp_path / "absent.json")], "There is no file"),
    ):
        assert repa(["report", *words]) == 2
        assert sentence in capsys.readouterr().err
