import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.data.config import PrepareConfig, split_format
from repa.data.packing import pack, principal_basis, unpack
from tests.oracles import packing as oracle


def tokens_of(num=6, grid=3, dim=40, seed=0):
    """Correlated tokens with a mean: one has a peak, as in trained vision transformers, and one is zero."""
    stream = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=stream) * torch.arange(1, dim + 1) ** -0.7
    tokens = torch.randn(num, grid * grid, dim, generator=stream) @ mixing.T + 0.3
    tokens[0, 0, 5] = 100.0
    tokens[1, 1] = 0.0
    return tokens


def test_int8_has_one_scale_per_token_and_rounds():
    tokens = tokens_of()
    rows = pack(tokens, "int8")
    assert (rows["features"].dtype, rows["scale"].dtype) == (torch.int8, torch.float32)
    assert rows["scale"].shape == (6, 9)
    back = unpack(rows["features"], rows["scale"])
    for n in range(6):
        for t in range(9):
            codes, scale = oracle.int8_token(tokens[n, t].numpy())
            assert rows["scale"][n, t].item() == pytest.approx(scale, rel=1e-6)
            # float32 may round ties differently
            assert np.abs(rows["features"][n, t].numpy().astype(int) - codes).max() <= 1
            assert (back[n, t] - tokens[n, t]).abs().max() <= scale / 2 * 1.001
            if scale:
                cosine = oracle.cosine(back[n, t].numpy(), tokens[n, t].numpy())
                assert cosine >= oracle.int8_cosine_bound(tokens[n, t].numpy()) - 1e-6
    assert (back[1, 1] == 0).all()


def test_int8_uses_its_whole_range_and_keeps_tiny_tokens():
    rows = pack(tokens_of() * 1e-4, "int8")
    peaks = rows["features"].abs().amax(-1)
    assert (peaks == 127).sum() == peaks.numel() - 1  # all except the zero token
    assert rows["features"].min() >= -127


def test_int8_keeps_the_documented_cosine():
    """Gaussian tokens of width 768 have peaks of about 3.5 rms; the docs promise 0.9997 up to peaks of 6."""
    tokens = torch.randn(2, 64, 768, generator=torch.Generator().manual_seed(1))
    assert (tokens.abs().amax(-1) < 6 * tokens.square().mean(-1).sqrt()).all()
    rows = pack(tokens, "int8")
    assert torch.cosine_similarity(unpack(rows["features"], rows["scale"]), tokens, dim=-1).min() > 0.9997


def test_the_basis_equals_that_of_an_svd():
    tokens = tokens_of()
    basis = principal_basis([tokens[:2], tokens[2:]], 7)
    mean, directions = oracle.principal_directions(tokens.flatten(0, 1).numpy(), 7)
    assert (basis.dtype, basis.shape) == (np.float32, (8, 40))
    np.testing.assert_allclose(basis[0], mean, atol=1e-5)
    # the sign of a direction is arbitrary
    np.testing.assert_allclose(np.abs((basis[1:] * directions).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(basis[1:] @ basis[1:].T, np.eye(7), atol=1e-5)


def test_all_directions_restore_the_tokens_and_few_project_them():
    tokens = tokens_of()
    whole = torch.from_numpy(principal_basis([tokens], 40))
    rows = pack(tokens, "pca40", whole)
    assert rows["features"].dtype == torch.float16
    torch.testing.assert_close(unpack(**rows, basis=whole), tokens, rtol=2e-3, atol=2e-2)
    few = torch.from_numpy(principal_basis([tokens], 4))
    back = unpack(pack(tokens, "pca4", few)["features"], basis=few)
    mean, directions = oracle.principal_directions(tokens.flatten(0, 1).numpy(), 4)
    expected = mean + (tokens.numpy() - mean) @ directions.T @ directions
    np.testing.assert_allclose(back, expected, rtol=2e-3, atol=2e-2)
    assert back.shape == tokens.shape  # the alignment sees the full width


def test_int8_coordinates_are_within_half_a_step():
    tokens = tokens_of()
    basis = torch.from_numpy(principal_basis([tokens], 10))
    rows = pack(tokens, "pca10-int8", basis)
    assert rows["features"].shape == (6, 9, 10)
    exact = unpack(pack(tokens, "pca10", basis)["features"].float(), basis=basis)
    error = (unpack(**rows, basis=basis) - exact).norm(dim=-1)
    assert (error <= rows["scale"] / 2 * 10**0.5 * 1.001 + 0.1).all()  # orthonormal directions preserve norms


def test_autocast_does_not_affect_packing():
    tokens = tokens_of()
    basis = torch.from_numpy(principal_basis([tokens], 5))
    rows = pack(tokens, "pca5", basis)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pack(tokens, "pca5", basis)["features"], rows["features"])
        assert torch.equal(unpack(**rows, basis=basis), unpack(rows["features"], basis=basis))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_values_beyond_float16_are_refused(form, value):
    tokens = tokens_of()
    tokens[3, 2, 1] = value
    with pytest.raises(UserError, match="float16 cannot hold"):
        pack(tokens, form)


def test_the_form_is_resolved_for_each_encoder():
    assert [split_format(f) for f in ("fp16", "int8", "pca64", "pca8-int8")] == [
        (0, "fp16"), (0, "int8"), (64, "fp16"), (8, "int8"),
    ]  # fmt: skip
    config = PrepareConfig(resolution=8, features=("tiny", "dinov2-b"), feature_forms=("int8", "dinov2-vit-b=pca64"))
    assert config.feature_forms == {"tiny": "int8", "dinov2-b": "pca64"}
    assert PrepareConfig.parse(config.model_dump()) == config
    assert config.override(features=("dinov2-b",), feature_forms={}).feature_forms == {}
    assert PrepareConfig(resolution=8, features=("tiny",), feature_forms=("int8", "tiny=fp16")).feature_forms == {}
    for form in ("pca", "pca0", "int4", "pca64-", "-int8", "fp16-int8", "", "pca8-fp16"):
        with pytest.raises(UserError, match="Unknown token format .*fp16, int8, pcaK"):
            PrepareConfig.parse({"resolution": 8, "features": ["tiny"], "feature_forms": [form]})
    with pytest.raises(UserError, match="feature_forms names 'dino-b', but features are tiny"):
        PrepareConfig.parse({"resolution": 8, "features": ["tiny"], "feature_forms": ["dino-b=int8"]})
