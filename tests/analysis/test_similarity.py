import pytest
import torch

from repa.analysis import cka, cknna, similarity
from repa.base.errors import UserError
from tests.oracles import analysis as oracle

VARIANTS = {"paper": oracle.cknna_paper, "platonic": oracle.cknna_platonic}


def pair(n=30, seed=0, noise=1.0):
    """Two views of one thing, with a common offset and outliers."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, 7, generator=g) + 0.5
    b = a @ torch.randn(7, 5, generator=g) + noise * torch.randn(n, 5, generator=g)
    b[3, 2] = 40
    return a, b


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [2, 5, 10])
@pytest.mark.parametrize("block", [11, 1024])
def test_cknna_equals_the_double_loops(variant, k, block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", block)
    a, b = pair()
    assert cknna(a, b, k, variant) == pytest.approx(VARIANTS[variant](a.tolist(), b.tolist(), k), rel=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_equals_the_double_loops(unbiased):
    a, b = pair(20)
    assert cka(a, b, unbiased) == pytest.approx(oracle.cka(a.tolist(), b.tolist(), unbiased), rel=1e-9)


MEASURES = {
    "paper": lambda a, b: cknna(a, b, 5),
    "platonic": lambda a, b: cknna(a, b, 5, "platonic"),
    "cka": cka,
    "cka-unbiased": lambda a, b: cka(a, b, unbiased=True),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
class TestEveryMeasure:
    def test_of_itself_is_one(self, measure):
        a, _ = pair()
        assert measure(a, a) == pytest.approx(1, abs=1e-3)  # platonic adds 1e-6 to a denominator that is small

    def test_does_not_depend_on_the_order_of_the_images(self, measure):
        a, b = pair()
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        assert measure(a[order], b[order]) == pytest.approx(measure(a, b), rel=1e-9)
        assert measure(a[order], b) < measure(a, b)

    def test_ignores_scale(self, measure):
        a, b = pair()
        assert measure(3 * a, 0.1 * b) == pytest.approx(measure(a, b), rel=1e-5)

    def test_falls_with_noise(self, measure):
        assert measure(*pair(noise=0.01)) > measure(*pair(noise=3.0)) > measure(*pair(noise=100.0))


@pytest.mark.parametrize("name", ["paper", "cka", "cka-unbiased"])
def test_the_two_sides_can_be_swapped(name):
    """Not so for "platonic": the mask is not symmetric, and columns of K meet rows of L."""
    a, b = pair()
    assert MEASURES[name](a, b) == pytest.approx(MEASURES[name](b, a), rel=1e-9)
    assert MEASURES["platonic"](a, b) != pytest.approx(MEASURES["platonic"](b, a), rel=1e-3)


@pytest.mark.parametrize("measure", [lambda a, b: cknna(a, b, 5), cka], ids=["paper", "cka"])
def test_rotations_change_nothing(measure):
    """Not so for "platonic", which clamps single channels."""
    a, b = pair()
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2)))[0]
    assert measure(a @ rotation, b) == pytest.approx(measure(a, b), rel=1e-5)
    assert measure(a, a @ rotation) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_ignores_an_offset(unbiased):
    a, b = pair()
    assert cka(a + 10, b - 3, unbiased) == pytest.approx(cka(a, b, unbiased), rel=1e-4)


def test_unbiased_cka_of_strangers_is_near_zero_where_the_biased_is_not():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 200, generator=g), torch.randn(60, 200, generator=g)
    assert cka(a, b) > 0.7
    assert abs(cka(a, b, unbiased=True)) < 0.1


def test_mistakes():
    a, b = pair()
    with pytest.raises(UserError, match=r"\(30, 7\) and \(29, 5\)"):
        cknna(a, b[:29])
    with pytest.raises(UserError, match="k=30 and 30 images"):
        cknna(a, b, 30)
    with pytest.raises(UserError, match="2 <= k"):
        cknna(a, b, 1, "platonic")
    with pytest.raises(UserError, match="'paper' and 'platonic'"):
        cknna(a, b, variant="plato")
    with pytest.raises(UserError, match="at least 4"):
        cka(a[:3], b[:3], unbiased=True)
