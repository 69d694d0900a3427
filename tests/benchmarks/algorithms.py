"""Which algorithm learns best from as many episodes: `python tests/benchmarks/algorithms.py recipes/quickstart.yaml`.

Every algorithm of `ppo.algorithm` runs with each seed from the SFT model of that seed. It sets what it defines and
suggests; all other settings are the recipe's. Runs that are done are not made again, so the same command continues a
table that was interrupted. `--set section.key=value` changes a setting of every run, `--sft` names SFT models.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.evaluation.power import p_text  # noqa: E402
from pipeline.trainers.ppo.algorithms import ALGORITHMS  # noqa: E402


def run(recipe: Path, *arguments: str) -> None:
    """Run the chain of a recipe; its output goes into this one's."""
    subprocess.run([sys.executable, str(ROOT / "pipeline" / "run.py"), str(recipe), *arguments], check=True)


def write_recipe(base: dict, algorithm: str, file: Path) -> Path:
    """Write the recipe with an algorithm, without the keys that the algorithm sets or has no use for."""
    preset = ALGORITHMS[algorithm]
    own = {*preset.defines, *preset.suggests, *(() if algorithm == "ppo" else ("value_learning_rate",))}
    kept = {k: v for k, v in base["ppo"].items() if k not in own}
    with file.open("w") as stream:
        YAML(typ="safe").dump({**base, "ppo": {**kept, "algorithm": algorithm}}, stream)
    return file


@dataclass(frozen=True)
class Gain:
    """By how much PPO is above SFT in the metric, its p-value, and how long PPO took."""

    delta: float
    p_value: float
    seconds: float


def read_gain(folder: Path, metric: str) -> Gain:
    """Read the gain from the report of a run."""
    report = json.loads((folder / "eval" / "report.json").read_text())
    chosen = next(c for c in report["comparisons"] if (c["a"], c["b"], c["metric"]) == ("sft", "ppo", metric))
    seconds = next(cost["seconds"] for cost in report["cost"] if cost["stage"] == "ppo")
    return Gain(chosen["delta"], chosen["p_value"], seconds)


def table(gains: dict[str, dict[int, Gain]], seeds: list[int]) -> str:
    """Write the gains of every algorithm and seed as Markdown, the best mean first."""
    lines = [f"| algorithm | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | seconds of PPO |"]
    lines += ["| --- " * (len(seeds) + 3) + "|"]
    means = {name: fmean(gain.delta for gain in by_seed.values()) for name, by_seed in gains.items()}
    for name in sorted(gains, key=means.get, reverse=True):
        by_seed = gains[name]
        cells = [f"{by_seed[s].delta:+.2f} ({p_text(by_seed[s].p_value)})" if s in by_seed else "" for s in seeds]
        times = ", ".join(f"{gain.seconds:.0f}" for gain in by_seed.values())
        lines.append(f"| `{name}` | {' | '.join(cells)} | {means[name]:+.2f} | {times} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table after every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/algorithms"))
    parser.add_argument(
        "--sft", metavar="PATH", help="SFT models with {seed} in their path; they are made if not given"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    text = options.recipe.read_text().replace("{recipe_dir}", str(options.recipe.resolve().parent))
    base = YAML(typ="safe").load(text)
    first = base["eval"]["metrics"][0]
    metric = first if isinstance(first, str) else first["name"]
    base.pop("control", None)  # a control is about one algorithm
    options.output.mkdir(parents=True, exist_ok=True)
    seeds, names = [int(s) for s in options.seeds.split(",")], options.algorithms.split(",")
    gains: dict[str, dict[int, Gain]] = {name: {} for name in names}
    for seed in seeds:
        shared = [f"seed={seed}", f"output_dir={options.output}", "eval.systems=[sft, ppo]", *options.set]
        sft = (options.sft or f"{options.output}/sft-{seed}/sft").format(seed=seed)
        if options.sft is None:
            run(options.recipe, *shared, f"name=sft-{seed}", "--only", "sft")
        for name in names:
            recipe = write_recipe(base, name, options.output / f"{name}.yaml")
            folder = options.output / f"{name.replace('++', '-plus-plus')}-{seed}"
            run(recipe, *shared, f"name={folder.name}", f"ppo.sft_model_path={sft}")
            gains[name][seed] = read_gain(folder, metric)
            print(f"{name}, seed {seed}: {gains[name][seed].delta:+.3f}", flush=True)
        print(table(gains, seeds), flush=True)


if __name__ == "__main__":
    main()
