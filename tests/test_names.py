"""`import repa` gives access to its packages and to the most important names."""

import subprocess
import sys

import repa


def test_packages_and_names_are_available_after_one_import():
    """In a separate process, because this one has already imported them."""
    code = (
        "import sys, repa; assert 'torch' not in sys.modules; "
        "repa.alignment.LOSSES; repa.data.FeatureCache is repa.FeatureCache; repa.open_data; repa.models.BACKBONES; repa.attach"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_can_be_imported():
    for name in dir(repa):
        assert getattr(repa, name) is not None
