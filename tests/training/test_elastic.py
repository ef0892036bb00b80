"""torchrun restarts a job whose process was killed, and the run ends like an uninterrupted one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import repa
from repa.runs import layout

# Trains, and once kills the second process by SIGKILL at step 7.
SCRIPT = """
import os, signal, sys
from pathlib import Path

from repa.base import dist
from repa.data import open_data
from repa.recipes import load_recipe
from repa.training import train

recipe, data, run, marker = map(Path, sys.argv[1:])
device = dist.setup()


def progress(state):
    if dist.rank() == 1 and state.step == 7 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


train(load_recipe(str(recipe)), open_data(data), run, device=device, progress=progress)
dist.teardown()
"""


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SCRIPT)
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(repa.__file__).parents[1])
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    return subprocess.run(
        [*command, str(folder / "script.py"), *map(str, arguments)], env=environment, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_process_is_restarted_with_the_others_and_nothing_is_lost(tiny_config, data_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_config.override(num_steps=10, save_every=5, keep_checkpoints=0).to_yaml())
    never, marker = tmp_path / "never", tmp_path / "killed"
    never.touch()
    for run, mark in (("whole", never), ("killed-run", marker)):
        done = torchrun(tmp_path, recipe, data_folder, tmp_path / run, mark)
        assert done.returncode == 0, done.stderr[-3000:]
    assert marker.exists()
    log = (tmp_path / "killed-run" / layout.LOG).read_text()
    assert "from step 0 on 2" in log
    assert "from step 5 on 2" in log
    whole, killed = (layout.checkpoint_folder(tmp_path / run, 10) for run in ("whole", "killed-run"))
    for path in sorted(whole.glob("*.safetensors")):
        a, b = load_file(path), load_file(killed / path.name)
        assert a.keys() == b.keys()
        assert all(bool((a[key] == b[key]).all()) for key in a), path.name
