import pytest
import torch

from repa.analysis import correlation_decay_slope, local_distance_similarity, rms_spatial_contrast
from repa.base.errors import UserError
from tests.oracles import analysis as oracle


def patches(side=5):
    return torch.randn(2, side * side, 4, generator=torch.Generator().manual_seed(0)) + 0.3


@pytest.mark.parametrize("far", [2, 6])
def test_local_distance_similarity_equals_the_loops(far):
    expected = [oracle.local_distance_similarity(image.tolist(), far) for image in patches()]
    assert local_distance_similarity(patches(), far=far).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("max_distance", [2, 8])
def test_correlation_decay_slope_equals_the_loops(max_distance):
    expected = [oracle.correlation_decay_slope(image.tolist(), max_distance) for image in patches()]
    assert correlation_decay_slope(patches(), max_distance=max_distance).tolist() == pytest.approx(expected, abs=1e-5)


def test_rms_spatial_contrast_equals_the_loops():
    expected = [oracle.rms_spatial_contrast(image.tolist()) for image in patches()]
    assert rms_spatial_contrast(patches()).tolist() == pytest.approx(expected, abs=1e-5)


def smooth(side=16):
    """Directions that change slowly with the position."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle = torch.stack([row, column], -1).reshape(-1, 2) / side
    return torch.cat([angle.cos(), angle.sin()], -1)[None]  # (1, T, 4)


def test_shuffling_patches_removes_the_structure():
    ordered = smooth()
    shuffled = ordered[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    for measure in (local_distance_similarity, correlation_decay_slope):
        assert measure(ordered).item() > 10 * abs(measure(shuffled).item())
    assert rms_spatial_contrast(ordered).item() == pytest.approx(rms_spatial_contrast(shuffled).item(), abs=1e-6)


def test_uniform_patches_have_no_structure_and_token_length_does_not_matter():
    same = torch.ones(1, 256, 3) * torch.linspace(0.1, 5, 256)[None, :, None]
    for measure in (local_distance_similarity, correlation_decay_slope, rms_spatial_contrast):
        assert measure(same).item() == pytest.approx(0, abs=1e-3)


def test_invalid_input_is_refused():
    with pytest.raises(UserError, match="square grid"):
        local_distance_similarity(torch.zeros(1, 257, 3))
    with pytest.raises(UserError, match=r"3 x 3 patches has distances 1 to 4, but 6"):
        local_distance_similarity(patches(3))
    with pytest.raises(UserError, match="at least 2 distances"):
        correlation_decay_slope(patches(), max_distance=1)
