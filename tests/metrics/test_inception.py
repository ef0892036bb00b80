"""The FID's network: parameters, parts against loops, and the whole against torch-fidelity."""

import io
import pickle

import numpy as np
import pytest
import torch

from repa.base import files
from repa.base.errors import UserError
from repa.metrics import InceptionV3, inception, load_inception
from repa.metrics.inception import (
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
    average_pool,
    resize_as_tensorflow,
)
from tests.oracles import inception as oracle


def test_parameters_match_the_published_file():
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == oracle.shapes()
    assert len(state) == 566


@pytest.mark.parametrize(("height", "width", "side"), [(16, 16, 21), (40, 31, 21), (21, 21, 21), (1, 5, 8)])
def test_resizing_follows_tensorflow(height, width, side):
    image = 255 * torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    got = resize_as_tensorflow(image[None, None], side)[0, 0]
    np.testing.assert_allclose(got.numpy(), oracle.resize(image.double().numpy(), side), atol=1e-3)


def test_average_pooling_excludes_padding():
    assert torch.equal(average_pool(torch.ones(1, 2, 4, 5)), torch.ones(1, 2, 4, 5))


@pytest.mark.parametrize(
    ("kind", "block", "channels"),
    [
        ("a", lambda: InceptionA(6, pool_channels=32), 6),
        ("b", lambda: InceptionB(6), 6),
        ("c", lambda: InceptionC(6, channels=8), 6),
        ("d", lambda: InceptionD(6), 6),
        ("e", lambda: InceptionE(6, average=True), 6),
        ("e, the last", lambda: InceptionE(6, average=False), 6),
    ],
)
def test_each_block_equals_the_loops(kind, block, channels):
    block = block().eval()
    weights = oracle.random_weights({name: tensor.shape for name, tensor in block.state_dict().items()})
    block.load_state_dict(weights)
    x = torch.randn(1, channels, 7, 9, generator=torch.Generator().manual_seed(2)).relu()
    with torch.no_grad():
        got = block(x)[0].numpy()
    np.testing.assert_allclose(got, oracle.block(kind, x[0].double().numpy(), weights), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights(oracle.shapes())


def test_the_network_equals_torch_fidelitys(weights):
    """The expected sums were recorded from torch-fidelity 0.4.0 with these weights.

    On the machine of the recording, resized images and outputs were equal to the bit. The sine makes the sums depend on
    the order.
    """
    net = InceptionV3()
    net.load_state_dict(weights)
    seen = {}
    for name, part in net.named_children():
        part.register_forward_hook(lambda m, i, out, name=name: seen.update({name: tuple(out.shape[1:])}))
    image = torch.randint(256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    out = net(image)
    assert [tuple(x.shape) for x in out] == [(1, 2048), (1, 2023), (1, 1008)]
    assert seen == SIDES
    for name, features in out._asdict().items():
        x = features[0].double()
        sums = x.sum().item(), (x * torch.arange(len(x)).double().sin()).sum().item()
        assert sums == pytest.approx(GOLDEN[name], rel=1e-4), name


SIDES = {
    "Conv2d_1a_3x3": (32, 149, 149), "Conv2d_2a_3x3": (32, 147, 147), "Conv2d_2b_3x3": (64, 147, 147),
    "Conv2d_3b_1x1": (80, 73, 73), "Conv2d_4a_3x3": (192, 71, 71), "Mixed_5b": (256, 35, 35),
    "Mixed_5c": (288, 35, 35), "Mixed_5d": (288, 35, 35), "Mixed_6a": (768, 17, 17), "Mixed_6b": (768, 17, 17),
    "Mixed_6c": (768, 17, 17), "Mixed_6e": (768, 17, 17), "Mixed_7a": (1280, 8, 8), "Mixed_7b": (2048, 8, 8),
    "Mixed_7c": (2048, 8, 8),
}  # fmt: skip
GOLDEN = {  # the sum, and the sum of products with sin(0), sin(1), ...
    "pooled": (4016.2365226, 40.8242631),
    "spatial": (1987.0087439, -26.3256051),
    "logits": (-116.1960771, 18.7977887),
}


@pytest.mark.slow
def test_memory_layouts_agree_and_half_precision_is_close(weights):
    """bf16 affects only convolutions; resizing, mean and logits stay in float32."""
    net = InceptionV3()
    net.load_state_dict(weights)
    images = torch.randint(256, (1, 3, 75, 75), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    dtypes = []
    net.Mixed_5b.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):  # the caller's autocast is ignored
        exact = net(images)
    half = net(images, "bf16")
    last = net.to(memory_format=torch.channels_last)(images)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    for name, x in exact._asdict().items():
        torch.testing.assert_close(getattr(last, name), x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
        y = getattr(half, name)
        assert y.dtype == torch.float32
        assert 1e-4 < ((y - x).norm() / x.norm()).item() < 0.05, name


def test_only_uint8_images_are_accepted():
    with torch.device("meta"):
        net = InceptionV3()
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 8, 8, 3).byte()):
        with pytest.raises(UserError, match="needs uint8 images"):
            net(images)


def test_it_stays_in_eval_mode():
    with torch.device("meta"):
        net = InceptionV3().train()
    assert not net.training
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(weights, path)
    return path


class TestWeights:
    """Where the file is searched, and what is refused."""

    @pytest.fixture
    def homes(self, tmp_path, monkeypatch):
        monkeypatch.setenv("REPA_CACHE", str(tmp_path / "ours"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
        monkeypatch.setattr(inception, "URL", (tmp_path / "nowhere.pth").as_uri())
        return tmp_path

    def test_a_local_file_is_loaded(self, file):
        loaded = load_inception(file)
        assert loaded.weights_sha256 == files.sha256(file)
        assert not loaded.is_published
        assert loaded.net.Conv2d_2a_3x3.conv.weight.is_contiguous(memory_format=torch.channels_last)
        wanted = torch.load(file, weights_only=True)["Mixed_6d.branch1x1.conv.weight"]
        assert torch.equal(loaded.net.Mixed_6d.branch1x1.conv.weight, wanted)

    @pytest.mark.parametrize("place", ["ours/metrics/{}", "hub/hub/checkpoints/{}"])
    def test_a_cached_file_is_loaded(self, place, homes, file, monkeypatch):
        monkeypatch.setattr(inception, "SHA256", files.sha256(file)[:8])
        path = homes / place.format(inception.FILE)
        path.parent.mkdir(parents=True)
        path.symlink_to(file)
        assert load_inception().is_published
        monkeypatch.setattr(inception, "SHA256", "01234567")
        with pytest.raises(UserError, match="is damaged: its checksum does not begin with 01234567"):
            load_inception()

    def test_a_download_is_stored(self, homes, file, monkeypatch):
        monkeypatch.setattr(inception, "URL", file.as_uri())
        monkeypatch.setattr(inception, "SHA256", files.sha256(file)[:8])
        load_inception()
        assert [path.name for path in (homes / "ours/metrics").iterdir()] == [inception.FILE]

    def test_a_download_with_a_wrong_checksum_is_not_stored(self, homes, file, monkeypatch):
        monkeypatch.setattr(inception, "URL", file.as_uri())
        with pytest.raises(UserError, match=r"could not be downloaded from .*w\.pth \(invalid hash value"):
            load_inception()
        assert not list((homes / "ours/metrics").iterdir())

    def test_without_network_the_error_says_what_to_do(self, homes):
        with pytest.raises(
            UserError, match=r"not on this machine .*--features-weights FILE.*--features tiny-classifier"
        ):
            load_inception()

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="There is no file .*/none.pth with Inception's weights"):
            load_inception(tmp_path / "none.pth")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda w: w.pop("Mixed_7c.branch1x1.bn.bias"), 'Missing key.*: "Mixed_7c.branch1x1.bn.bias"'),
            (lambda w: w.update(AuxLogits=torch.zeros(1)), 'Unexpected key.*: "AuxLogits"'),
            (lambda w: w.update({"fc.weight": torch.zeros(1000, 2048)}), r"size mismatch for fc.weight: .*\[1000, 2048\].*\[1008, 2048\]"),
            (lambda w: w.update(name="inception"), "does not contain the weights of Inception-v3"),
        ],
    )  # fmt: skip
    def test_weights_of_another_network_are_refused(self, change, sentence, tmp_path, monkeypatch):
        # Expanded numbers, which are refused elsewhere, keep the files small.
        monkeypatch.setattr("repa.base.weights.MOST_VIEWS", 2**20)
        weights = {name: torch.zeros(()).expand(shape) for name, shape in oracle.shapes().items()}
        change(weights)
        torch.save(weights, tmp_path / "w.pth")
        with pytest.raises(UserError, match=sentence):
            load_inception(tmp_path / "w.pth")

    @pytest.mark.parametrize("cut", [0, 100, 5_000_000])
    def test_a_damaged_file_is_refused(self, cut, file, tmp_path):
        (tmp_path / "w.pth").write_bytes(file.read_bytes()[:cut])
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            load_inception(tmp_path / "w.pth")

    def test_code_in_a_file_is_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return pytest.fail, ("executed",)

        buffer = io.BytesIO()
        torch.save({"fc.weight": Bomb()}, buffer)
        for data in (buffer.getvalue(), pickle.dumps(Bomb(), protocol=2)):
            (tmp_path / "w.pth").write_bytes(data)
            with pytest.raises(UserError, match="cannot be read as a checkpoint|an object of the class"):
                load_inception(tmp_path / "w.pth")
