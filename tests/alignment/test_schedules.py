import json

import pytest

from repa.alignment import SCHEDULES


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("constant", {0: 1, 10**9: 1}),
        ("stop:step=10", {0: 1, 9: 1, 10: 0, 11: 0}),
        ("linear:steps=10", {0: 1, 1: 0.9, 5: 0.5, 10: 0, 20: 0}),
        ("exponential:start=4,steps=10", {0: 1, 4: 1, 9: 0.1**0.5, 14: 0.1, 24: 0.01}),
        ("cosine:steps=12", {0: 1, 4: 0.75, 6: 0.5, 8: 0.25, 12: 0, 99: 0}),
    ],
)
def test_each_schedule_has_its_documented_values(spec, values):
    schedule = SCHEDULES.build(spec)
    assert {step: schedule(step) for step in values} == pytest.approx(values)


def stopped_at(losses, spec="plateau:span=4,gain=0.1"):
    schedule = SCHEDULES.build(spec)
    for step, loss in enumerate(losses, start=1):
        if schedule.watches(step):
            schedule.observe(step, loss)
        if schedule(step) == 0:
            return step
    return None


def test_plateau_stops_at_the_end_of_a_span_without_a_gain():
    falling = [-0.1 * step for step in range(12)]
    assert stopped_at(falling) is None
    assert stopped_at(falling + [falling[-1]] * 12) == 20  # the span from 13 to 16 is still lower than the one before
    assert stopped_at([-0.5, -0.7] * 8) == 8  # oscillation within a span is not a gain
    assert stopped_at([0.0, float("nan")] + [0.0] * 10) == 8


def test_plateau_samples_a_span_a_hundred_times():
    schedule = SCHEDULES.build("plateau:span=10000")
    assert sum(schedule.watches(step) for step in range(1, 10_001)) == 100
    assert stopped_at([1.0] * 30_000, "plateau:span=10000") == 20_000


@pytest.mark.parametrize("split", range(1, 20))
def test_plateau_resumes_exactly_from_its_state(split):
    losses = [-0.1 * min(step, 11) for step in range(24)]
    first = SCHEDULES.build("plateau:span=4,gain=0.1")
    second = SCHEDULES.build("plateau:span=4,gain=0.1")
    for step, loss in enumerate(losses[:split], start=1):
        first.observe(step, loss)
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    for step, loss in enumerate(losses[split:], start=split + 1):
        for schedule in (first, second):
            if schedule.watches(step):
                schedule.observe(step, loss)
        assert first.state() == second.state()
    assert first(24) == second(24) == 0.0
