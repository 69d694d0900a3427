"""Our PPO against TRL 1.12's: `python tests/benchmarks/ppo_vs_trl.py [--case ends|forced] [--bf16] [--model DIR]`.

Both sides run in processes of their own, in alternation, on the same model, prompts, LoRA rank, rollout and
micro-batch size, PPO epochs, response length and precision. Without `--model` a 5M model is taught first. TRL gets a
virtual environment of its own, made once. `--quick` runs our side alone on a tiny model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch==2.13.0", "trl==1.12.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "rich")


def environment(directory: Path) -> Path:
    """The interpreter of TRL's environment, which is made if it is not there."""
    python = directory / "bin" / "python"
    probe = "from importlib.metadata import version as v; assert (v('trl'), v('transformers')) == ('1.12.0', '5.23.0')"
    if not python.is_file() or subprocess.run([python, "-c", probe], capture_output=True).returncode:
        venv.create(directory, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def specification(args: argparse.Namespace, model: Path) -> dict:
    """What both workers are told."""
    sys.path.insert(0, str(HERE.parent.parent))
    from model import training_pairs

    from pipeline.models.loading import load_tokenizer
    from pipeline.models.text import encode_prompts

    tokenizer = load_tokenizer(model, _model_config(args.quick))
    prompts, _ = training_pairs()
    return {
        "model": str(model),
        "prompts": encode_prompts(tokenizer, prompts[:2000]),
        "attention": "eager",
        "batch": args.batch,
        "micro_batch": args.micro_batch,
        "epochs": args.epochs,
        "steps": args.steps,
        "response_length": args.response_length,
        "forced": args.case == "forced",
        "bf16": args.bf16,
        "temperature": 1.0,
        "threads": args.threads,
        "seed": 0,
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
    }


def _model_config(quick: bool):
    from model import FIVE_MILLION, TINY, model_config

    return model_config(TINY if quick else FIVE_MILLION)


def measure(python: Path | str, worker: str, spec: dict) -> dict:
    """One run of one side in a fresh process.

    Raises:
        RuntimeError: the worker failed; its error follows.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(spec, file)
        file.flush()
        # glibc's arenas alike on both sides; both read nothing from a network.
        fixed = {
            "OMP_NUM_THREADS": str(spec["threads"]),
            "MALLOC_ARENA_MAX": "2",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(HERE.parent.parent) if worker == "relay_worker.py" else "",
        }
        done = subprocess.run(
            [str(python), str(HERE / worker), file.name],
            capture_output=True,
            text=True,
            env={**os.environ, **fixed},
        )
    if done.returncode:
        raise RuntimeError(f"{worker} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(name: str, runs: list[dict]) -> dict[str, float]:
    """Print medians and ranges of one side's runs; returns its medians."""
    batch = runs[0]["batch"]
    wall = [batch / seconds for run in runs for seconds in run["wall"]]
    cpu = [batch / seconds for run in runs for seconds in run["cpu"]]
    memory = [run["memory"] / 1e9 for run in runs]
    share = {phase: median(run["share"][phase] for run in runs) for phase in runs[0]["share"]}
    print(
        f"{name}: {json.dumps(runs[0]['versions'])}, {median(run['length'] for run in runs):.1f} tokens a completion"
    )
    for label, values in (("episodes/s", wall), ("episodes/CPU s", cpu), ("GB above imports", memory)):
        print(f"  {label:17s} median {median(values):7.3f}  range {min(values):.3f} to {max(values):.3f}")
    print("  share of CPU time " + ", ".join(f"{phase} {value:.0%}" for phase, value in share.items()))
    return {"wall": median(wall), "cpu": median(cpu), "memory": median(memory)}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Parse the options, measure and print; returns each side's medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=("ends", "forced"), default="ends")
    parser.add_argument("--bf16", action="store_true", help="autocast; TRL's takes it from accelerate")
    parser.add_argument("--trl-fp32", action="store_true", help="TRL in fp32 whatever ours does")
    parser.add_argument("--model", type=Path, help="a taught model to use again")
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache" / "relay-benchmarks" / "trl-1.12")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "relay-benchmarks")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured PPO steps of a run, behind one to warm up")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--response-length", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="our side alone on a tiny model: a smoke test")
    parser.add_argument("--json", type=Path, help="write every run here")
    args = parser.parse_args(argv)
    spec = specification(args, args.model or _taught(args))
    sides = {"relay": (sys.executable, "relay_worker.py")}
    if not args.quick:
        sides["trl"] = (environment(args.venv), "trl_worker.py")
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(args.repetitions):
        for name, (python, worker) in sides.items():
            told = spec | {"seed": number, "bf16": spec["bf16"] and not (name == "trl" and args.trl_fp32)}
            runs[name].append(measure(python, worker, told))
            print(f"{name} {number}: {json.dumps(runs[name][-1])}", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"spec": spec | {"prompts": len(spec["prompts"])}, "runs": runs}, indent=1))
    medians = {name: summarise(name, found) for name, found in runs.items()}
    if "trl" in medians:
        for kind in ("wall", "cpu", "memory"):
            print(f"relay / trl, {kind}: {medians['relay'][kind] / medians['trl'][kind]:.2f}")
    return medians


def _taught(args: argparse.Namespace) -> Path:
    sys.path.insert(0, str(HERE.parent.parent))
    from model import FIVE_MILLION, TINY, teach

    args.work.mkdir(parents=True, exist_ok=True)
    if args.quick:
        return teach(args.work / "tiny", TINY, epochs=0)
    return teach(args.work / "five-million", FIVE_MILLION, epochs=3)


if __name__ == "__main__":
    main()
