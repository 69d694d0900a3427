"""What both workers of the comparison measure alike: time by phase, and peak memory above the imports (Linux).

It imports neither torch nor this project, because TRL's worker runs it in an environment of its own.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any


def resident(kind: str) -> int:
    """Bytes of this process: `VmRSS` now, or `VmHWM` at its highest (ru_maxrss would count the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind + ":"))


READY = "ready"


def wait_for_turn(spec: dict) -> None:
    """Say that everything is loaded, and wait until the sides before this one have been measured."""
    if spec.get("takes_turns"):
        print(READY, flush=True)
        sys.stdin.readline()


class Phases:
    """Wall and CPU seconds of each phase of each step; the first step warms up and is left out of the report."""

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        """Call `wait` before each look at the clock: an accelerator may still be computing."""
        self._wait = wait
        self.imported = resident("VmRSS")
        self.steps: list[dict[str, list[float]]] = []
        self._current: dict[str, list[float]] = {}
        self._last = self._now()

    def _now(self) -> list[float]:
        self._wait()
        return [time.perf_counter(), time.process_time()]

    def mark(self, phase: str) -> None:
        """What passed since the last mark belongs to `phase`."""
        now = self._now()
        spent = self._current.setdefault(phase, [0.0, 0.0])
        for kind in range(2):
            spent[kind] += now[kind] - self._last[kind]
        self._last = now

    def end_step(self) -> None:
        """Close a step."""
        self.steps.append(self._current)
        self._current = {}

    def around(self, function: Callable, before: str, phase: str) -> Callable:
        """`function`, marking what came before it and then itself."""

        @wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.mark(before)
            result = function(*args, **kwargs)
            self.mark(phase)
            return result

        return marked

    def report(
        self, batch: int, lengths: list[float], versions: dict[str, str], accelerator_memory: int | None = None
    ) -> str:
        """One JSON line: seconds and CPU seconds of each measured step, shares by CPU time, memory, mean length.

        Memory is the accelerator's at its highest, where it is given.
        """
        steps = self.steps[1:]
        names = ("generate", "score", "update")
        cpu = {name: sum(step.get(name, [0, 0])[1] for step in steps) for name in names}
        wall = {name: sum(step.get(name, [0, 0])[0] for step in steps) for name in names}
        return json.dumps(
            {
                "wall": [sum(phase[0] for phase in step.values()) for step in steps],
                "cpu": [sum(phase[1] for phase in step.values()) for step in steps],
                "share": {name: value / sum(cpu.values()) for name, value in cpu.items()},
                "wall_share": {name: value / max(1e-9, sum(wall.values())) for name, value in wall.items()},
                "generate_seconds": wall["generate"] / len(steps),
                "phase_cpu": {name: value / len(steps) for name, value in cpu.items()},
                "memory": resident("VmHWM") - self.imported if accelerator_memory is None else accelerator_memory,
                "batch": batch,
                "length": sum(lengths) / len(lengths),
                "versions": versions,
            }
        )
