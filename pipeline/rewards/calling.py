"""Calls of a reward function: their time limit, and the completions they fail on."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.rewards.results import Handling, RewardError, as_list, excerpt
from pipeline.runtime.time_limit import TimedOut, call_within

# Calls that may run out of time in the search for the completions that are to blame: halving 512 takes 9.
MAX_TIMEOUTS = 10


def call_reward(
    name: str,
    function: Callable[..., object],
    prompts: list,
    completions: list,
    columns: dict[str, list],
    handling: Handling,
) -> tuple[Sequence[object], dict[int, str]]:
    """One value for each completion, None where the function failed, and by completion how it failed.

    A function that fails on a batch is called again on halves of it, down to the single completions it fails on; all
    others keep the values of the largest part that it did not fail on. What hangs is searched for alike, unless the
    first failure ends the run or `MAX_TIMEOUTS` calls have been waited for in vain.

    Raises:
        RewardError: the function failed and `handling` is to stop; or what it returned is no list of that length.
    """
    values: list[object] = [None] * len(completions)
    failures: dict[int, str] = {}
    timeouts = 0

    def call(rows: Sequence[int]) -> Exception | TimedOut | None:
        nonlocal timeouts
        chosen = [completions[row] for row in rows]
        arguments = {"prompts": prompts, "completions": completions, **columns}
        if len(rows) < len(completions):
            arguments = {key: [every[row] for row in rows] for key, every in arguments.items()}
        try:
            result = call_within(name, handling.timeout, lambda: _result(function(**arguments)))
        except (Exception, TimedOut) as error:
            timeouts += isinstance(error, TimedOut)
            return error
        for row, value in zip(rows, as_list(name, result, chosen), strict=True):
            values[row] = value
        return None

    def search(rows: Sequence[int], error: Exception | TimedOut) -> None:
        hopeless = isinstance(error, TimedOut) and (handling.on_error == "stop" or timeouts >= MAX_TIMEOUTS)
        if len(rows) == 1 or hopeless:
            what = str(error) if isinstance(error, TimedOut) else f"raised {type(error).__name__}: {error}"
            for row in rows:
                shown = f"completion {row} ({excerpt(completions[row])})"
                where = shown if len(rows) == 1 else f"{len(rows)} completions, {shown} among them"
                handling.note(failures, row, f"reward {name!r} {what} for {where}", error)
            return
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            if half_error := call(half):
                search(half, half_error)

    rows = range(len(completions))
    if error := call(rows):
        search(rows, error)
        if handling.on_error == "stop":  # and yet no single completion is to blame
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__}: {error} for {len(rows)} completions together, but "
                "for none of them alone"
            ) from error
    return values, failures


def _result(returned: object) -> object:
    """Return what a function returned, or what its coroutine comes to."""
    if not inspect.isawaitable(returned):
        return returned

    async def wait(awaitable: Awaitable) -> object:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait(returned))
    with ThreadPoolExecutor(1) as thread:  # a notebook's loop runs here, and one thread runs one loop
        return thread.submit(asyncio.run, wait(returned)).result()
