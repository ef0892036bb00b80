import torch

from repa.base.rng import SampleStreams, fold, generator


def test_streams_differ_by_every_key():
    seeds = {fold(seed, key, step) for seed in range(3) for key in ("a", "b") for step in range(50)}
    assert len(seeds) == 300
    assert fold(1, 23) != fold(12, 3)  # keys are separated, not glued


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
