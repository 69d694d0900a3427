"""What a finished evaluation left in its run directory: the report, its settings, and the predictions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.evaluation.clusters import Clusters, cluster_by, single_examples
from pipeline.metrics import Metric, load_metric
from pipeline.runtime.files import sha256

READ_STAGES = ("sft", "reward", "ppo")  # of the same run
RECORDS = ("stage.json", "started.json")  # of a stage that is finished, or that has begun


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, report.json, and the flat settings and inputs its evaluation was made with."""

    path: Path
    report: dict
    settings: dict
    label: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return what the run is called: the directory's name, or the label where another run has that name too."""
        return self.label or self.path.name

    @property
    def seed(self) -> object:
        """Return the recipe's seed."""
        return self.settings.get("seed")


@dataclass(frozen=True)
class RunComparison:
    """System `b` compared with `a` in one run by one measure, with the p-value of its report."""

    a: str
    b: str
    run: str
    seed: object
    metric: str
    delta: float
    p_value: float
    better: bool
    higher_is_better: bool


@dataclass(frozen=True)
class ScoredRows:
    """What one system of a run wrote: prompt and references, text and weighted reward (or None) of each test row.

    `clusters` are those of the rows; every row is one of its own unless the task names clusters.
    """

    keys: tuple[tuple[object, tuple[str, ...]], ...] = ()
    texts: tuple[str, ...] = ()
    scores: tuple[float | None, ...] = ()
    clusters: Clusters = field(default_factory=lambda: single_examples(0))


def load_run(path: Path) -> Run:
    """Read a run directory whose eval stage is finished; a warning of the report names models that were made again.

    Raises:
        ValueError: there is no report in it, or one that is not whole.
    """
    file = path / "eval" / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        record = json.loads((path / "eval" / "stage.json").read_text(encoding="utf-8"))
        settings = record["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} holds no finished evaluation ({file} and stage.json next to it); "
            "run its eval stage first, and give the run's directory, such as runs/quickstart"
        ) from error
    inputs = record.get("inputs", {})
    warnings = [*_outdated(path, inputs), *report.get("warnings", ())]
    return Run(path, {**report, "warnings": warnings}, settings, inputs=inputs)


def _outdated(path: Path, inputs: Mapping[str, str]) -> list[str]:
    """Name the stages whose records are not those that the evaluation read; one without a folder was not copied.

    A model of another run is named by its path, which is relative to the folder that the run was made in.
    """
    files = {name: path / name / "stage.json" for name in READ_STAGES if name in inputs and (path / name).is_dir()}
    for name in (name for name in inputs if "/" in name):
        folders = (start / name for start in (path.resolve().parent.parent, Path()))
        made = next((folder for folder in folders if any((folder / record).is_file() for record in RECORDS)), None)
        if made is not None:
            files[name] = made / "stage.json"
    changed = [name for name, file in files.items() if not file.is_file() or sha256(file) != inputs[name]]
    verb = "was" if len(changed) == 1 else "were"
    warning = f"{' and '.join(changed)} {verb} made again or interrupted after this evaluation; run the recipe again"
    return [warning] if changed else []


def compare_to_sft(run: Run) -> list[RunComparison]:
    """Read how PPO compares with SFT in one run, by each measure."""
    return read_comparisons(run, "sft", "ppo")


def read_comparisons(run: Run, a: str, b: str) -> list[RunComparison]:
    """Read how a system compares with another in one run, by each measure; none where they were not compared."""
    gains = []
    for c in run.report["comparisons"]:
        if (c["a"], c["b"]) == (a, b):
            up = c.get("higher_is_better", True)
            better = (c["delta"] > 0) if up else (c["delta"] < 0)
            gains.append(RunComparison(a, b, run.name, run.seed, c["metric"], c["delta"], c["p_value"], better, up))
    return gains


def read_rows(run: Run, system: str) -> ScoredRows:
    """Read what a system of the run wrote; no rows without the system or its file."""
    if system not in run.report["systems"]:
        return ScoredRows()
    file = run.path / "eval" / run.report["systems"][system]["predictions"]
    if not file.is_file():
        return ScoredRows()
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    keys = tuple((row["prompt"], tuple(row["references"])) for row in rows)
    clusters = cluster_by([row.get("cluster", number) for number, row in enumerate(rows)])
    texts, scores = tuple(row["completion"] for row in rows), tuple(row.get("score") for row in rows)
    return ScoredRows(keys, texts, scores, clusters)


def run_metrics(run: Run) -> dict[str, Metric]:
    """Load the metrics of the run's report by name; an empty mapping where it does not record them."""
    settings = run.report["settings"]
    configs = settings.get("metrics") or []
    metrics = [load_metric(config["name"], settings.get("language"), **config["options"]) for config in configs]
    return {metric.name: metric for metric in metrics}
