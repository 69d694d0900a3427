"""What a token costs the host: `python tests/benchmarks/decoding.py [--device cuda] [--layers 24] [--width 32]`.

The model is so small that next to nothing is computed: what is left is what a GPU would wait for. Operations are those
of ATen that compute something, each at least one kernel; views are not counted. On a CPU the time is CPU time.
Without the pass is what a host has to do beside the launch of a graph. Passes are counted for `--texts` texts of
unequal lengths, a quarter of them at once: in batches, and with finished rows that are refilled.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.models.kernels import static_decode
from pipeline.models.kernels.decode_loop import decode_batch
from pipeline.models.kernels.packing import enable_packing
from pipeline.models.kernels.static_decode import decode_static
from pipeline.models.kernels.static_step import StaticStep
from pipeline.models.sampling import Decoding, TokenChooser, sample_tokens

VIEWS = {
    "alias",
    "as_strided",
    "detach",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_reshape_alias",
    "_unsafe_view",
}


class Operations(TorchDispatchMode):
    """Count what is computed, inside a model's forward pass and outside."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inside, self.outside, self._in = 0, 0, False
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._enter(True)),
            model.register_forward_hook(lambda *_: self._enter(False)),
        ]

    def _enter(self, inside: bool) -> None:
        self._in = inside

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ not in VIEWS:
            self.inside, self.outside = self.inside + self._in, self.outside + (not self._in)
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)


def build(args: argparse.Namespace) -> PreTrainedModel:
    """A random Llama with an adapter, as PPO trains it."""
    torch.manual_seed(0)
    width = args.width
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=args.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="sdpa",
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    enable_packing(model)
    if args.rank:
        get_peft_model(model, LoraConfig(target_modules="all-linear", r=args.rank))
    return model.to(args.device).eval()


def measure(decode: Callable, model: PreTrainedModel, args: argparse.Namespace) -> dict[str, float]:
    """Operations and milliseconds for each token after the first, of a whole batch."""
    prompts = [[5 + (row + column) % 50 for column in range(args.prompt)] for row in range(args.rows)]
    sampling = Decoding(args.tokens, 1.0, min_new_tokens=args.tokens)

    def write(tokens: int) -> float:
        torch.manual_seed(0)
        draws = torch.rand(args.rows, args.tokens).to(model.device)
        choose = TokenChooser(sampling, [1], prompts, draws)
        clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        start = clock()
        cached = decode is decode_batch  # in a graph autocast remembers nothing
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=cached):
            decode(model, prompts, 0, tokens, [1], choose)  # which ends with a copy to the host
        return clock() - start

    counts = []
    for tokens in (2, args.tokens):
        with Operations(model) as operations:
            write(tokens)
        counts.append((operations.inside, operations.outside))
    seconds = [min(write(tokens) for _ in range(args.repetitions)) for tokens in (2, args.tokens)]
    steps = args.tokens - 2
    return {
        "operations of the pass": (counts[1][0] - counts[0][0]) / steps,
        "operations outside it": (counts[1][1] - counts[0][1]) / steps,
        "ms a token": 1000 * (seconds[1] - seconds[0]) / steps,
    }


def sampling(rows: int, vocabulary: int, repetitions: int, device: str) -> dict[str, float]:
    """Milliseconds to sample a token for each row, and by float64 sums over the whole vocabulary, as it was before."""
    torch.manual_seed(0)
    logits, draws = 3 * torch.randn(rows, vocabulary, device=device), torch.rand(rows, device=device)
    clock = time.process_time if device == "cpu" else time.perf_counter

    def summed() -> torch.Tensor:
        cumulative = logits.softmax(-1).double().cumsum(-1)
        return torch.searchsorted(cumulative, draws.double().unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)

    def milliseconds(sample: Callable[[], torch.Tensor]) -> float:
        times = []
        for _ in range(repetitions):
            start = clock()
            sample().tolist()
            times.append(clock() - start)
        return 1000 * min(times)

    ours = partial(sample_tokens, logits, Decoding(1, 1.0), draws)
    assert torch.equal(ours(), summed())
    return {"sums of blocks": milliseconds(ours), "sums of all": milliseconds(summed)}


def passes(model: PreTrainedModel, texts: int, tokens: int) -> dict[str, dict[str, int]]:
    """Count how often prompts are read, passes for tokens, and the rows of these; texts have 1 to `tokens` tokens."""
    lengths, results = torch.randint(1, tokens + 1, (texts,), generator=torch.Generator().manual_seed(0)), {}
    lengths, at_once, make_reader = lengths.to(model.device), texts // 4, static_decode.make_reader
    for name, size in (("in batches", at_once), ("with refill", texts)):
        reads, rows = [], []

        def read(*given, reads=reads) -> object:
            reads.append(len(given[1]))
            return make_reader(*given)

        def run(step: StaticStep, model: PreTrainedModel, rows=rows) -> torch.Tensor:
            rows.append(len(step.tokens))
            return torch.zeros(len(step.tokens), model.config.vocab_size, device=model.device)

        with patch.object(static_decode, "make_reader", read), patch.object(StaticStep, "run", run):
            for chunk in lengths.split(size):
                prompts, limits = [[5, 6, 7]] * len(chunk), lambda rows, ids, chunk=chunk: ids.shape[1] >= chunk[rows]
                decode_static(model, prompts, 0, tokens, [1], lambda logits, *_: logits.argmax(-1), limits, at_once)
        results[name] = {"reads": len(reads), "passes for tokens": len(rows), "rows of these": sum(rows)}
    return results


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure both ways to decode and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=500)
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; 0: none")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=66)
    parser.add_argument("--texts", type=int, default=256, help="whose passes are counted")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--dtype", default="float32", help="of the base; adapters are in float32")
    args = parser.parse_args(argv)
    model = build(args)
    found = {
        name: measure(decode, model, args)
        for name, decode in (("decode loop", decode_batch), ("static shapes", decode_static))
    }
    compute, results = StaticStep.run, {}

    def once(step: StaticStep, model: PreTrainedModel) -> torch.Tensor:
        if step not in results:
            results[step] = compute(step, model)
        return results[step]

    StaticStep.run = once
    beside = measure(decode_static, model, args)
    found["static shapes without the pass"] = {name: beside[name] for name in ("operations outside it", "ms a token")}
    StaticStep.run = compute
    found |= {f"{args.texts} texts {name}": counts for name, counts in passes(model, args.texts, 128).items()}
    for size in (6000, 50_000):
        found[f"sampling 64 of {size}"] = sampling(64, size, 5 * args.repetitions, args.device)
    for name, numbers in found.items():
        print(name, json.dumps({label: round(number, 2) for label, number in numbers.items()}))
    return found


if __name__ == "__main__":
    main()
