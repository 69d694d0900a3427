"""Memory of PPO with policy, reference, value and a learned reward: on one base, and as four separate models.

python tests/benchmarks/reward_memory.py --hidden 512 --layers 8 --vocabulary 32000

Each side does the same work in a process of its own: policy, reference, value and reward read a batch, then policy
and value make one AdamW step. `shared` is Relay's; `four` is what TRL 1.12's PPOTrainer held: a policy with a LoRA
adapter, a reference, a reward and a fully trained value model; `full` trains the policy fully, too. A peak is that of
the process above what it held before its first model.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from pipeline.models.reward_model import RewardNetwork, final_states
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.shared import SharedModel

HERE = Path(__file__).resolve().parent
MIB = 2**20
SIZES = {"hidden": 512, "layers": 8, "vocabulary": 32000, "batch": 8, "prompt": 32, "response": 32}
SIDES = ("shared", "four", "full")
LORA = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure each side and print the table; returns bytes and numbers of parameters by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=("prepare", *SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--reward", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(measure(args)))
        return {}
    with tempfile.TemporaryDirectory() as directory:
        _child(args, "prepare", directory)
        results = {side: _child(args, side, directory) for side in SIDES}
    for side, found in results.items():
        print(
            f"{side:7s} peak {found['peak'] / MIB:7.0f} MiB, {found['parameters'] / 1e6:6.1f} M parameters, "
            f"{found['trained'] / 1e6:6.2f} M of them trained"
        )
    for side in SIDES[1:]:
        print(f"shared / {side}: {results['shared']['peak'] / max(1, results[side]['peak']):.2f}")
    return results


def _child(args: argparse.Namespace, side: str, reward: str) -> dict[str, float]:
    options = [f"--{name}={getattr(args, name)}" for name in SIZES]
    fixed = {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, __file__, "--side", side, "--reward", reward, *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **fixed})
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One batch read by every role and one step made; the peak in bytes, and how many parameters are held."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.side == "prepare":
        RewardNetwork.create(_model(args), LORA).save_pretrained(args.reward)
        return {}
    before = _peak()
    ids = torch.randint(3, args.vocabulary, (args.batch, args.prompt + args.response)).tolist()
    sequences = make_sequences([row[: args.prompt] for row in ids], [row[args.prompt :] for row in ids], 0)
    models = _shared(args, sequences) if args.side == "shared" else _four(args, sequences, args.side == "full")
    every = [parameter for model in models for parameter in model.parameters()]
    counts = {"parameters": sum(p.numel() for p in every), "trained": sum(p.numel() for p in every if p.requires_grad)}
    return {"peak": _peak() - before, **counts}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _model(args: argparse.Namespace) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def _shared(args: argparse.Namespace, sequences: Sequences) -> list[nn.Module]:
    """Every role on one base."""
    shared = SharedModel(_model(args), LORA)
    shared.add_reward(args.reward)
    shared.reference_logprobs(sequences)
    shared.reward_scores(sequences)
    outputs = shared(sequences)
    _step([shared], outputs.logprobs.mean() + outputs.values.mean())
    return [shared]


def _four(args: argparse.Namespace, sequences: Sequences, full: bool) -> list[nn.Module]:
    """Policy, reference, reward and value, each with weights of its own."""
    policy: PreTrainedModel | PeftModel = _model(args) if full else get_peft_model(_model(args), LORA)
    reference, reward = (_model(args).requires_grad_(False) for _ in range(2))
    value = _model(args)
    with torch.no_grad():
        final_states(reward, sequences)
        _logprobs(reference, sequences)
    states = value.base_model(input_ids=_ids(sequences), use_cache=False).last_hidden_state
    _step([policy, value], _logprobs(policy, sequences).mean() + states.mean())
    return [policy, reference, reward, value]


def _ids(sequences: Sequences) -> torch.Tensor:
    return torch.cat([sequences.prompt_ids, sequences.completion_ids], dim=1)


def _logprobs(model: nn.Module, sequences: Sequences) -> torch.Tensor:
    """Log-probs of the completions, the LM head on their positions alone, as in Relay."""
    width = sequences.completion_ids.shape[1]
    logits = model(input_ids=_ids(sequences), use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, sequences.completion_ids.unsqueeze(-1))


def _step(models: list[nn.Module], loss: torch.Tensor) -> None:
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
