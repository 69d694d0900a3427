"""Calls of a reward function: what it is given, their time limit, and the completions they fail on."""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence

from transformers import TrainerState

from pipeline.rewards.arguments import CallLog, RewardLog, matching_arguments
from pipeline.rewards.event_loop import CallOutcome, await_together, is_async
from pipeline.rewards.results import Handling, RewardError, as_list, excerpt
from pipeline.runtime.time_limit import TimedOut, call_within

# Calls that may run out of time in the search for the completions that are to blame: halving 512 takes 9.
MAX_TIMEOUTS = 10


class RewardCall:
    """One reward function and one batch of completions: the values of all, who failed, and what was logged.

    `values` has one for each completion, None where the function failed; `failures` says by completion how it failed.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., object],
        prompts: list,
        completions: list,
        columns: Mapping[str, list],
        handling: Handling,
        trainer_state: TrainerState | None = None,
    ) -> None:
        self.name, self.function, self.completions, self.handling = name, function, completions, handling
        self.values: list[object] = [None] * len(completions)
        self.failures: dict[int, str] = {}
        written = {"prompts": prompts, "completions": completions}  # whatever columns of these names the data has
        self._aligned = {**written, **columns, **written}
        # Without a trainer, in a report, rewards are those at the end of a training.
        self._trainer_state = TrainerState(1.0, 1, 1) if trainer_state is None else trainer_state
        self._metrics: dict[str, list[float]] = {}
        self._extras: dict[str, list[object]] = {}
        self._timeouts = 0

    @property
    def log(self) -> RewardLog:
        """What the calls logged that came back."""
        return RewardLog(self._metrics, self._extras)

    def first_call(self, log: CallLog) -> Callable[[], object]:
        """Prepare the call with all completions, whose numbers and columns go to `log`.

        Raises:
            RewardError: the function needs an argument that there is not.
        """
        return self._prepare(range(len(self.completions)), log)

    def run(self, first: CallOutcome | None = None, log: CallLog | None = None) -> None:
        """Get a value for every completion; `first` is what came of `first_call` where it has been made already.

        A function that fails on a batch is called again on halves of it, down to the single completions it fails on;
        all others keep the values of the largest part that it did not fail on. What hangs is searched for alike,
        unless the first failure ends the run or `MAX_TIMEOUTS` calls have been waited for in vain.

        Raises:
            RewardError: the function failed and `handling` is to stop; or what it returned is no list of that length.
        """
        rows = range(len(self.completions))
        error = self._call(rows) if first is None else self._accept(rows, first, log)
        if error is None:
            return
        self._search(rows, error)
        if self.handling.on_error == "stop":  # and yet no single completion is to blame
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error} for {len(rows)} completions together, "
                "but for none of them alone"
            ) from error

    def _prepare(self, rows: Sequence[int], log: CallLog) -> Callable[[], object]:
        # Copies: what a function does to its lists must reach neither the next one nor what PPO learns from.
        aligned = {key: [_copied(values[row]) for row in rows] for key, values in self._aligned.items()}
        tools = {"trainer_state": self._trainer_state, "log_metric": log.log_metric, "log_extra": log.log_extra}
        positional, named = matching_arguments(self.name, self.function, {**aligned, **tools})
        return lambda: self.function(*positional, **named)

    def _call(self, rows: Sequence[int]) -> Exception | TimedOut | None:
        """Call the function with the completions at `rows`; return the error if it failed."""
        log, seconds = CallLog(self.name), self.handling.timeout
        call = self._prepare(rows, log)
        if is_async(self.function):
            return self._accept(rows, await_together([call], seconds)[0], log)
        try:
            outcome = CallOutcome(call_within(self.name, seconds, call))
        except (Exception, TimedOut) as error:
            outcome = CallOutcome(error=error)
        return self._accept(rows, outcome, log)

    def _accept(self, rows: Sequence[int], outcome: CallOutcome, log: CallLog) -> Exception | TimedOut | None:
        """Keep what a call returned and logged; return the error if it failed."""
        if inspect.isawaitable(outcome.result):  # of a function that is not `async` itself
            awaitable: Awaitable = outcome.result
            outcome = await_together([lambda: awaitable], self.handling.timeout)[0]
        if outcome.error is not None:
            self._timeouts += isinstance(outcome.error, TimedOut)
            return outcome.error
        chosen = [self.completions[row] for row in rows]
        for row, value in zip(rows, as_list(self.name, outcome.result, chosen), strict=True):
            self.values[row] = value
        for name, number in log.checked_metrics():
            self._metrics.setdefault(name, []).append(number)
        for column, entries in log.checked_extras(len(rows)).items():
            whole = self._extras.setdefault(column, [None] * len(self.completions))
            for row, entry in zip(rows, entries, strict=True):
                whole[row] = entry
        return None

    def _search(self, rows: Sequence[int], error: Exception | TimedOut) -> None:
        handling, late = self.handling, isinstance(error, TimedOut)
        hopeless = late and (handling.on_error == "stop" or self._timeouts >= MAX_TIMEOUTS)
        if len(rows) == 1 or hopeless:
            what = str(error) if late else f"raised {type(error).__name__}: {error}"
            for row in rows:
                shown = f"completion {row} ({excerpt(self.completions[row])})"
                where = shown if len(rows) == 1 else f"{len(rows)} completions, {shown} among them"
                handling.note(self.failures, row, f"reward {self.name!r} {what} for {where}", error)
            return
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            if half_error := self._call(half):
                self._search(half, half_error)


def run_calls(calls: Sequence[RewardCall], meanwhile: Callable[[], object] | None) -> None:
    """Make all calls: the async functions together in one event loop, meanwhile the others, and then `meanwhile`.

    Raises:
        RewardError: as `RewardCall.run`.
    """
    together = [call for call in calls if is_async(call.function)]

    def run_others() -> None:
        for call in calls:
            if call not in together:
                call.run()
        if meanwhile is not None:
            meanwhile()

    if not together:
        return run_others()
    logs = [CallLog(call.name) for call in together]
    coroutines = [call.first_call(log) for call, log in zip(together, logs, strict=True)]
    outcomes = await_together(coroutines, together[0].handling.timeout, run_others)
    for call, outcome, log in zip(together, outcomes, logs, strict=True):
        call.run(outcome, log)


def _copied(value: object) -> object:
    """Copy a list or mapping with those in it; a list whose first item is neither holds none."""
    if isinstance(value, list):
        return [_copied(item) for item in value] if value and isinstance(value[0], list | dict) else list(value)
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def merged_log(logs: Sequence[RewardLog]) -> RewardLog:
    """Put together what several functions logged; of columns with one name the last function's values count."""
    metrics: dict[str, list[float]] = {}
    extras: dict[str, Sequence[object]] = {}
    for log in logs:
        for name, numbers in log.metrics.items():
            metrics[name] = [*metrics.get(name, []), *numbers]
        extras |= log.extras
    return RewardLog(metrics, extras)
