"""Trackers: the installed ones are used and the others warned of, for no run of hours should end for want of one."""

import sys
from collections.abc import Callable, Mapping, Sequence

from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from pipeline.runtime.messages import one_line

OF_TRAINERS = tuple(INTEGRATION_TO_CALLBACK)  # names that `report_to` of sft and reward takes, beside all and none
OF_PPO = tuple(map(str, LOGGER_TYPE_TO_CLASS))


def installed(report_to: str | Sequence[str] | None, ppo: bool = False) -> list[str]:
    """The trackers of a `report_to` that are installed; on the main process the others are warned of."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    here = list(map(str, get_available_trackers())) if ppo else get_available_reporting_integrations()
    if ppo:
        names = [name for name in names if name != "none"]  # which accelerate does not know
    usable = [name for name in names if name in ("all", "none") or name in here]
    missing = [name for name in names if name not in usable]
    if missing:
        package = missing[0].replace("_", "-")
        _warn(f"report_to: {', '.join(missing)} is not installed, so nothing is sent there (pip install {package})")
    return usable


def start_trackers(accelerator: Accelerator, project: str) -> None:
    """Start the trackers that an accelerator has; where that fails the run goes on without them."""
    try:
        accelerator.init_trackers(project)
    except Exception as error:  # a login, a server or a disk that is not there: anything a tracker's package raises
        accelerator.trackers = []
        _warn(f"report_to: no tracker could be started ({_reason(error)}); going on without")


def send(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Send the values of a step to every tracker; the run goes on without one that fails."""
    _each(accelerator, f"step {step}", lambda tracker: tracker.log(dict(values), step=step))


def end_trackers(accelerator: Accelerator) -> None:
    """End every tracker; one that fails is warned of."""
    _each(accelerator, "the end of the run", lambda tracker: tracker.finish())


def _each(accelerator: Accelerator, what: str, call: Callable[[GeneralTracker], None]) -> None:
    for tracker in list(accelerator.trackers):
        try:
            call(tracker)
        except Exception as error:  # as at the start
            accelerator.trackers.remove(tracker)
            _warn(f"report_to: {tracker.name} failed at {what} ({_reason(error)}); going on without it")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def _warn(text: str) -> None:
    if PartialState().is_main_process:
        print(f"warning: {text}", file=sys.stderr, flush=True)
