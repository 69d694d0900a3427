"""What a person and a tracker see of a run: progress bar, samples, metrics.jsonl, timing.jsonl, trackers."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm
from transformers import TrainerCallback

from pipeline.runtime.files import write_atomically
from pipeline.trainers.trackers import end_trackers, send, start_trackers


class TrainingLog:
    """One line of metrics.jsonl per log event, the same to each tracker, and a progress bar on the main process.

    metrics.jsonl holds nothing that differs between two runs of the same seed; the bar shows the speed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        directory: Path,
        total_steps: int,
        step: int = 0,
        logging_steps: int = 1,
        num_samples: int = 0,
        project: str | None = None,
    ) -> None:
        """Go on at `step` in the files of `directory`; `project` starts the trackers.

        Every `logging_steps` are a log event, and `num_samples` samples are shown in the whole run.
        """
        self.accelerator, self.total_steps, self.logging_steps = accelerator, total_steps, logging_steps
        self.sample_every = max(1, total_steps // num_samples) if num_samples else None
        self.file = directory / "metrics.jsonl" if accelerator.is_main_process else None
        self._warned = False
        if project:
            start_trackers(accelerator, project)
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            desc="PPO",
            unit="step",
            disable=not accelerator.is_main_process,
            file=sys.stderr,
            dynamic_ncols=True,
        )
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            keep_lines(self.file, step)
            self.samples = self.file.with_name("samples.jsonl")
            if self.sample_every or self.samples.is_file():
                keep_lines(self.samples, step)
            self.timing = TimingLog(self.file.with_name("timing.jsonl"))
            self.timing.start(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one event."""
        if self.file:
            with self.file.open("a") as file:
                file.write(json_line(step, values))
            self.timing.write(step)
        send(self.accelerator, values, step)

    def end_step(
        self,
        step: int,
        episodes: int,
        values: Mapping[str, float],
        samples: Sequence[Mapping[str, object]],
    ) -> None:
        """Record PPO step `step` where that is due, and move the bar.

        Where samples are due, show the first one and write all to samples.jsonl.
        """
        if step % self.logging_steps == 0 or step == self.total_steps:
            self.write(step, {"episode": episodes, **values})
        self._advance(values)
        share = values["objective/frac_reward_zero_std"]
        if share > 0.5 and not self._warned:
            self._warned = True
            self.say(
                f"step {step}: no learning signal in {share:.0%} of the prompts: every completion of theirs got the "
                "same score"
            )
        if self.sample_every and step % self.sample_every == 0:
            first = samples[0]
            self.say(f"step {step}: {sample_line(first['prompt'], first['completion'], first['score'])}")
            if self.file:
                with self.samples.open("a", encoding="utf-8") as file:
                    file.writelines(json_line(step, row) for row in samples)

    def end_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record an evaluation and show its figures."""
        self.write(step, values)
        figures = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in values.items())
        self.say(f"step {step}: held-out {figures}")

    def _advance(self, values: Mapping[str, float]) -> None:
        self.bar.set_postfix_str(
            f"score {values['objective/scores']:.3f}, KL {values['objective/kl']:.3f}, "
            f"length {values['objective/length']:.1f}",
            refresh=False,
        )
        self.bar.update()

    def say(self, *lines: str) -> None:
        """Write lines above the bar."""
        if self.accelerator.is_main_process:
            for line in lines:
                self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """End the bar and the trackers."""
        self.bar.close()
        end_trackers(self.accelerator)


class TimingLog:
    """When each step was logged, in seconds of this process: apart from metrics.jsonl, which repeats bit for bit."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.began = time.monotonic()

    def start(self, step: int) -> None:
        """Begin at `step`, forgetting what an interrupted run wrote after it."""
        keep_lines(self.file, step)
        self.began = time.monotonic()

    def write(self, step: int) -> None:
        """Record one event."""
        with self.file.open("a") as file:
            file.write(json_line(step, {"seconds": round(time.monotonic() - self.began, 3)}))


class MetricsFileCallback(TrainerCallback):
    """Writes each log event as one JSON line; a resumed run first drops the lines after its checkpoint.

    Times and speeds are left out, so that two runs of the same seed write the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.timing = TimingLog(path.with_name("timing.jsonl"))

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Keep only the lines up to the step training starts from."""
        if state.is_world_process_zero:
            keep_lines(self.path, state.global_step, ending="train_loss")
            self.timing.start(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Append one event."""
        if state.is_world_process_zero:
            values = {k: v for k, v in (logs or {}).items() if not k.endswith(("_runtime", "_per_second"))}
            with self.path.open("a") as file:
                file.write(json_line(state.global_step, values))
            self.timing.write(state.global_step)


def keep_lines(file: Path, step: int, ending: str | None = None) -> None:
    """Cut metrics.jsonl back to what a run at `step` had written: to nothing for a new one, else to that step.

    A line that a kill or a full disk cut short belongs to what is dropped, and so does one with a value `ending`,
    which a run only writes after its last checkpoint. Killed in between, the file is still the old one.
    """
    text = file.read_text() if file.is_file() and step > 0 else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    events = [(line, json.loads(line)) for line in whole]
    kept = [line for line, event in events if event["step"] <= step and ending not in event]
    write_atomically(file, "".join(kept))


def json_line(step: int, values: Mapping[str, object]) -> str:
    """One log event as a line of metrics.jsonl; JSON has no word for NaN and infinity, so they are null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps({"step": step, **finite}, default=str) + "\n"


def sample_line(prompt: object, completion: str, score: float) -> str:
    """One sampled episode on a line."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"{_short(text)} -> {_short(completion)} (score {score:.3f})"


def _short(text: str, width: int = 70) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
