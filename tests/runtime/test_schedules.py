"""Numbers that change during a run."""

import pytest

from pipeline.runtime.schedules import check_schedule, schedule_values, value_at

POINTS = ((100, 1.0), (300, 0.2), (400, 0.4))


@pytest.mark.parametrize(
    ("episodes", "value"), [(0, 1.0), (100, 1.0), (200, 0.6), (300, 0.2), (350, 0.3), (400, 0.4), (900, 0.4)]
)
def test_straight_lines_between_points(episodes, value):
    assert value_at(POINTS, episodes) == pytest.approx(value)


def test_a_number_stays_what_it_is():
    assert value_at(0.3, 10**6) == 0.3
    assert schedule_values(0.3) == [0.3] and schedule_values(POINTS) == [1.0, 0.2, 0.4]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ((), "a number or a list"),
        (((1, 2, 3),), "a number or a list"),
        ("high", "a number or a list"),
        (((5, 1.0), (5, 2.0)), "must rise"),
        (((-1, 1.0),), "must rise"),
        (((0, 1.0), (5, 0.0)), "must be above 0"),
        (0.0, "must be above 0"),
    ],
)
def test_a_wrong_schedule_is_refused(schedule, words):
    with pytest.raises(ValueError, match=rf"^ppo\.temperature: .*{words}"):
        check_schedule("ppo.temperature:", schedule, "must be above 0", lambda value: value > 0)
