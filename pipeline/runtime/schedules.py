"""Numbers that change during a run: constant, or points `[episodes, value]` with straight lines between them."""

from collections.abc import Callable
from itertools import pairwise

Schedule = float | tuple[tuple[float, float], ...]


def value_at(schedule: Schedule, episodes: float) -> float:
    """Return the value after so many episodes: before the first point the first value, after the last the last."""
    if isinstance(schedule, int | float):
        return schedule
    earlier = [point for point in schedule if point[0] <= episodes]
    later = [point for point in schedule if point[0] > episodes]
    if not earlier or not later:
        return (earlier[-1:] or later[:1])[0][1]
    (start, first), (end, last) = earlier[-1], later[0]
    return first + (last - first) * (episodes - start) / (end - start)


def schedule_values(schedule: Schedule) -> list[float]:
    """Return every value that stands in a schedule."""
    return [schedule] if isinstance(schedule, int | float) else [value for _, value in schedule]


def check_schedule(name: str, schedule: object, rule: str, holds: Callable[[float], bool]) -> None:
    """Refuse a schedule with a value for which `holds` is false, or whose points are none.

    Raises:
        ValueError: it starts with `name`, such as `ppo.temperature:`, and says the rule.
    """
    if not isinstance(schedule, int | float):
        pairs = isinstance(schedule, tuple | list) and all(
            isinstance(point, tuple | list) and len(point) == 2 for point in schedule
        )
        if not pairs or not schedule:
            raise ValueError(f"{name} must be a number or a list of [episodes, value], found {schedule!r}")
        episodes = [point[0] for point in schedule]
        if episodes[0] < 0 or any(after <= before for before, after in pairwise(episodes)):
            raise ValueError(f"{name} the episodes of its points must rise from 0 on, found {episodes}")
    for value in schedule_values(schedule):
        if not holds(value):
            raise ValueError(f"{name} {rule}, found {value!r}")
