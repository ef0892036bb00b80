"""Public names are imported on first use, and all exist."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import repa

ROOMS = [
    "repa",
    *(f"repa.{room.name}" for room in pkgutil.iter_modules(repa.__path__) if room.ispkg),
    "repa.data.sources",
]


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_can_be_imported(room):
    module = importlib.import_module(room)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


@pytest.mark.parametrize("room", ROOMS)
def test_no_public_name_is_that_of_a_submodule(room):
    """Importing the submodule would put it in the place of the name: `repa.attach` was a module after `Aligner`."""
    module = importlib.import_module(room)
    modules = {found.name for found in pkgutil.iter_modules(module.__path__) if not found.ispkg}
    assert not modules & {*getattr(module, "__all__", ())}


def test_lazy_names_come_from_their_module_and_subpackages_are_attributes():
    from repa.models.dit import DiT

    assert repa.DiT is repa.models.DiT is DiT
    assert "DiT" in repa.__all__
    assert "models" in dir(repa)
    assert "models" not in repa.__all__


def test_packages_and_names_are_available_after_importing_repa():
    """In a separate process, because this one has already imported them."""
    code = (
        "import sys, repa; assert 'torch' not in sys.modules; repa.alignment.LOSSES, repa.models.BACKBONES, repa.attach; "
        "assert repa.data.FeatureCache is repa.FeatureCache and repa.data.open_data is repa.open_data"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_every_subpackage_imports_no_torch():
    code = f"import sys, {', '.join(ROOMS)}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
