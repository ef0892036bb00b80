import math
import subprocess
import sys

import pytest
import torch

from repa.analysis import cka, cknna, measures
from repa.base.errors import UserError
from tests.oracles import analysis as oracle

VARIANTS = {
    "paper": oracle.cknna_paper,
    "platonic": oracle.cknna_platonic,
    "platonic-clamped": lambda a, b, k: oracle.cknna_platonic(a, b, k, clamp=True),
}


def pair(n=30, seed=0, noise=1.0):
    """Two noisy views of the same features, with a common offset and outliers."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, 7, generator=g) + 0.5
    b = a @ torch.randn(7, 5, generator=g) + noise * torch.randn(n, 5, generator=g)
    b[3, 2] = 40
    return a, b


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [2, 5, 10])
@pytest.mark.parametrize("block", [1, 1000, 2**25])
def test_cknna_equals_the_double_loops(variant, k, block, monkeypatch):
    monkeypatch.setattr(measures, "BLOCK_BYTES", block)
    a, b = pair()
    assert cknna(a, b, k, variant) == pytest.approx(VARIANTS[variant](a.tolist(), b.tolist(), k), rel=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_equals_the_double_loops(unbiased):
    a, b = pair(20)
    assert cka(a, b, unbiased) == pytest.approx(oracle.cka(a.tolist(), b.tolist(), unbiased), rel=1e-9)


MEASURES = {
    "paper": lambda a, b: cknna(a, b, 5),
    "platonic": lambda a, b: cknna(a, b, 5, "platonic"),
    "platonic-clamped": lambda a, b: cknna(a, b, 5, "platonic-clamped"),
    "cka": cka,
    "cka-unbiased": lambda a, b: cka(a, b, unbiased=True),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
class TestEveryMeasure:
    def test_identical_features_have_similarity_one(self, measure):
        a, _ = pair()
        assert measure(a, a) == pytest.approx(1, abs=1e-3)  # platonic adds 1e-6 to a small denominator

    def test_the_order_of_the_images_does_not_matter(self, measure):
        a, b = pair()
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        assert measure(a[order], b[order]) == pytest.approx(measure(a, b), rel=1e-9)
        assert measure(a[order], b) < measure(a, b)

    def test_the_scale_of_features_does_not_matter(self, measure):
        a, b = pair()
        assert measure(3 * a, 0.1 * b) == pytest.approx(measure(a, b), rel=1e-5)

    def test_similarity_falls_with_noise(self, measure):
        assert measure(*pair(noise=0.01)) > measure(*pair(noise=3.0)) > measure(*pair(noise=100.0))


@pytest.mark.parametrize("name", ["paper", "cka", "cka-unbiased"])
def test_the_two_sides_can_be_swapped(name):
    """Except for "platonic", whose mask is asymmetric and pairs columns of K with rows of L."""
    a, b = pair()
    assert MEASURES[name](a, b) == pytest.approx(MEASURES[name](b, a), rel=1e-9)
    assert MEASURES["platonic"](a, b) != pytest.approx(MEASURES["platonic"](b, a), rel=1e-6)


@pytest.mark.parametrize("name", ["paper", "platonic", "cka"])
def test_rotations_change_nothing(name):
    """Except for "platonic-clamped", which clamps single channels."""
    (a, b), measure = pair(), MEASURES[name]
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2)))[0]
    assert measure(a @ rotation, b) == pytest.approx(measure(a, b), rel=1e-5)
    assert measure(a, a @ rotation) == pytest.approx(1, abs=1e-3 if name == "platonic" else 1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_ignores_an_offset(unbiased):
    a, b = pair()
    assert cka(a + 10, b - 3, unbiased) == pytest.approx(cka(a, b, unbiased), rel=1e-4)


def test_unbiased_cka_of_unrelated_features_is_near_zero():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 200, generator=g), torch.randn(60, 200, generator=g)
    assert cka(a, b) > 0.7
    assert abs(cka(a, b, unbiased=True)) < 0.1


def test_one_side_is_compared_with_many():
    a, b = pair()
    for variant in VARIANTS:
        side = measures.neighbourhoods(a, 5, variant)
        for other in (b, b[:, :2], a):
            assert measures.cknna_of(side, measures.neighbourhoods(other, 5, variant)) == cknna(a, other, 5, variant)


def test_only_the_clamped_variant_clamps():
    """As in trained transformers, a few large channels carry what both sides share, and the clamp removes it."""
    generator = torch.Generator().manual_seed(0)
    shared = 30 * torch.randn(120, 2, generator=generator)
    a, b = (torch.cat([shared, torch.randn(120, 60, generator=generator)], dim=1) for _ in range(2))
    assert cknna(a, b, 10, "platonic") > 2 * cknna(a, b, 10, "platonic-clamped")
    unit = torch.nn.functional.normalize(a.double(), dim=1)
    assert cknna(a, b, 10, "platonic") == pytest.approx(cknna(unit, b, 10, "platonic"), rel=1e-9)


def test_constant_features_give_nan():
    a, _ = pair()
    assert math.isnan(cknna(torch.ones(30, 3), a, 5))
    assert math.isnan(cka(torch.ones(30, 3), a))


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_features_far_from_the_origin_are_compared_in_float64(variant):
    """With norms of 1e4 and differences of 1, float32 distances would be noise."""
    a, b = pair()
    a, b = a + 1e4, b + 1e4
    assert cknna(a, b, 5, variant) == pytest.approx(VARIANTS[variant](a.tolist(), b.tolist(), 5), rel=1e-5)


MEMORY = """
import resource, torch
from repa.analysis import cknna
torch.set_num_threads(1)
a, b = torch.randn(4000, 128), torch.randn(4000, 128)
for variant in ("paper", "platonic-clamped"):
    cknna(a[:50], b[:50], 10, variant)  # what loads on first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cknna(a, b, 10, variant)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_stays_far_below_the_size_of_a_kernel():
    """For 4,000 images one kernel takes 122 MiB, while float64 features and each temporary block take 8 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    paper, platonic = map(float, done.stdout.split())
    assert paper < 95
    assert platonic < 60


def test_invalid_input_is_refused():
    a, b = pair()
    with pytest.raises(UserError, match=r"\(30, 7\) and \(29, 5\)"):
        cknna(a, b[:29])
    with pytest.raises(UserError, match="k=30 and 30 images"):
        cknna(a, b, 30)
    with pytest.raises(UserError, match="2 <= k"):
        cknna(a, b, 1, "platonic")
    with pytest.raises(UserError, match="paper, platonic, platonic-clamped, but got 'plato'"):
        cknna(a, b, variant="plato")
    with pytest.raises(UserError, match="at least 4"):
        cka(a[:3], b[:3], unbiased=True)


@pytest.mark.parametrize("variant", ["paper", "platonic", "platonic-clamped"])
def test_cknna_of_unrelated_features_is_about_k_over_n(variant):
    a, b = (torch.randn(500, width, generator=torch.Generator().manual_seed(width)) for width in (128, 384))
    assert 0.25 < cknna(a, b, k=10, variant=variant) / (10 / 500) < 4
