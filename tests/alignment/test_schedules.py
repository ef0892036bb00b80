import pytest

from repa.alignment import SCHEDULES


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("constant", {0: 1, 10**9: 1}),
        ("stop:step=10", {0: 1, 9: 1, 10: 0, 11: 0}),
        ("linear:steps=10", {0: 1, 1: 0.9, 5: 0.5, 10: 0, 20: 0}),
        ("cosine:steps=12", {0: 1, 4: 0.75, 6: 0.5, 8: 0.25, 12: 0, 99: 0}),
    ],
)
def test_values(spec, values):
    schedule = SCHEDULES.build(spec)
    assert {step: schedule(step) for step in values} == pytest.approx(values)
