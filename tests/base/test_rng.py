import math

import pytest
import torch

from repa.base.rng import SampleStreams, box_muller, fold, generator, philox


def test_streams_differ_by_every_key():
    seeds = {fold(seed, key, step) for seed in range(3) for key in ("a", "b") for step in range(50)}
    assert len(seeds) == 300
    assert fold(1, 23) != fold(12, 3)  # keys are separated, not concatenated


def test_generators_repeat():
    a = torch.randn(5, generator=generator(0, "step", 7))
    assert torch.equal(a, torch.randn(5, generator=generator(0, "step", 7)))
    assert not torch.equal(a, torch.randn(5, generator=generator(0, "step", 8)))


def test_a_sample_does_not_depend_on_its_batch():
    whole = SampleStreams(3, range(10))
    x, labels, again = whole.randn(2, 4), whole.randint(1000), whole.randn_like(torch.zeros(10, 3))
    for part in (range(4), range(4, 10)):
        streams = SampleStreams(3, part)
        rows = slice(part.start, part.stop)
        assert torch.equal(streams.randn(2, 4), x[rows])
        assert torch.equal(streams.randint(1000), labels[rows])
        assert torch.equal(streams.randn_like(torch.zeros(len(part), 3)), again[rows])


def test_draws_are_standard_normal():
    x = SampleStreams(0, range(2000)).randn(8)
    assert abs(x.mean()) < 0.03
    assert abs(x.std() - 1) < 0.03
    assert abs((x**4).mean() - 3) < 0.2  # its fourth moment
    assert abs((x[:, 0] * x[:, 1]).mean()) < 0.06  # the two numbers of one Box-Muller pair
    assert len(set(x.flatten().tolist())) > 15_990
    labels = SampleStreams(0, range(6000)).randint(3)
    assert torch.bincount(labels).sub(2000).abs().max() < 150


KNOWN = [  # the authors' test vectors for philox4x32, 10 rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_philox_matches_its_published_test_vectors(counter, key, wanted):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == wanted


def test_a_draw_matches_the_generator_in_plain_python():
    """The second draw of stream 7, five numbers, computed in Python's integers and floats."""
    key, numbers = fold(3, "sample", 7), []
    for place in range(2):
        a, b, c, d = place, 1, 0, 0
        k, m = key % 2**32, key // 2**32
        for _ in range(10):
            p, q = a * 0xD2511F53, c * 0xCD9E8D57
            a, b, c, d = (q // 2**32) ^ b ^ k, q % 2**32, (p // 2**32) ^ d ^ m, p % 2**32
            k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
        for u, v in ((a, b), (c, d)):
            radius, angle = math.sqrt(-2 * math.log((u + 1) / 2**32)), 2 * math.pi * v / 2**32
            numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    streams = SampleStreams(3, [2, 7])
    streams.randn(9)
    torch.testing.assert_close(streams.randn(5)[1], torch.tensor(numbers[:5]), rtol=2e-7, atol=1e-9)


def test_extreme_words_give_finite_normals():
    ends = torch.tensor([0, 2**32 - 1])
    x, y = box_muller(ends[:, None], ends[None, :])
    assert x.isfinite().all()
    assert 6.6 < x.abs().max() < 6.7
    assert y.abs().max() < 6.7
