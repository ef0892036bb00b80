"""Completion on TAB: the offered words, and each shell's script in that shell."""

import shutil
import subprocess
import sys

import pytest

from repa.cli.completion import SCRIPTS, candidates
from repa.cli.main import VERBS
from repa.recipes import RECIPES

SHELLS = {
    "bash": """eval "$(repa completion bash)"; COMP_WORDS=(repa {words}); COMP_CWORD={last}; _repa; printf '%s\\n' "${{COMPREPLY[@]}}" """,
    "zsh": """compdef() {{ }}; compadd() {{ shift; print -l -- "$@" }}; _files() {{ print files }}
eval "$(repa completion zsh)"; words=(repa {words}); CURRENT={last}+1; _repa""",
    "fish": """repa completion fish | source; complete -C 'repa {words}'""",
}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], {"train"}),
        (["train", "sit-b2-r"], {"sit-b2-reed", "sit-b2-reg", "sit-b2-repa"}),
        (["train", "sit-b2", "--alignments.0.los"], {"--alignments.0.loss"}),
        (["train", "sit-b2", "--alignments.0.loss", "cos"], {"cosine"}),
        (["train", "sit-b2", "--parallel", ""], {"auto", "ddp", "fsdp"}),
        (["prepare", "a", "b", "--features", "dinov2-reg"], {f"dinov2-reg-{size}" for size in "sblg"}),
        (["sample", "run", "--sampler", "=", "h"], {"heun"}),  # bash splits --sampler=h like this
        (["list", "tex"], {"text-encoders"}),
        (["show", "dinov3"], {f"dinov3-{size}" for size in "sbl"}),
        (["analyse", "ck"], {"cknna"}),
        (["analyse", "cknna", "run", "--encoder-w"], {"--encoder-weights"}),
        (["evaluate", "reference", "--features-p"], {"--features-precision"}),
        (["completion", ""], set(SCRIPTS)),
        (["sample", ""], set()),  # a run folder: the shell offers files
        (["nonsense", ""], set()),
        (["train", "--nonsense", ""], set()),
    ],
)
def test_completion_offers_matching_words(words, offered):
    assert set(candidates(words)) == offered


def test_completion_offers_all_verbs_and_recipes():
    assert candidates([""]) == sorted(VERBS)
    assert set(RECIPES) == set(candidates(["train", ""]))
    for verb in VERBS:
        if verb != "analyse":
            assert "--help" in candidates([verb, "--he"]), verb


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_works_in_the_shell(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "repa"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m repa "$@"\n')
    program.chmod(0o755)

    def offered(words: str) -> set[str]:
        script = f"export PATH={tmp_path}:$PATH\n" + SHELLS[shell].format(words=words, last=len(words.split()))
        done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
        return {line.split("\t")[0] for line in done.stdout.splitlines()}

    assert offered("train sit-b2-re") == {"sit-b2-reed", "sit-b2-reg", "sit-b2-repa"}
    assert offered("li") == {"list"}
