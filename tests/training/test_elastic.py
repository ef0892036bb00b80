"""torchrun restarts a job whose process was killed, and the run ends like an uninterrupted one."""

import pytest
from safetensors.torch import load_file

from repa.runs import layout
from tests.training.processes import torchrun

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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_process_is_restarted_with_the_others_and_nothing_is_lost(tiny_config, data_folder, tmp_path):
    script, recipe = tmp_path / "script.py", tmp_path / "recipe.yaml"
    script.write_text(SCRIPT)
    recipe.write_text(tiny_config.override(num_steps=10, save_every=5, keep_checkpoints=0).to_yaml())
    never, marker = tmp_path / "never", tmp_path / "killed"
    never.touch()
    for run, mark in (("whole", never), ("killed-run", marker)):
        done = torchrun("--max-restarts", 1, script, recipe, data_folder, tmp_path / run, mark, timeout=400)
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
