import pytest

from repa.autoencoders import AUTOENCODERS, load_autoencoder
from repa.autoencoders.contract import Pixels
from repa.base.errors import UserError


class Private(Pixels):
    def __init__(self):
        super().__init__("private")


def test_known_names_load_and_unknown_names_are_refused():
    assert AUTOENCODERS.names() == [
        "dc-ae-f32", "e2e-va-vae", "flux-vae", "kl", "pixels", "rae", "rae-dinov2-b", "sd-vae-ft-ema", "sd-vae-ft-mse",
        "sd3-vae", "sdxl-vae",
        "taef1", "taesd", "taesd3", "taesdxl", "tiny-vae", "va-vae",
    ]  # fmt: skip
    for name in AUTOENCODERS.names():
        assert AUTOENCODERS.check(name) == name
    with pytest.raises(UserError, match="Did you mean 'sd-vae-ft-mse'"):
        load_autoencoder("sd-vae-mse")


def test_private_classes_load_by_dotted_name():
    spec = f"{__name__}.Private"
    assert load_autoencoder(spec).name == "private"
    with pytest.raises(UserError, match="needs no weights"):
        load_autoencoder(spec, weights="folder")
