"""An encoder-decoder against a decoder-only model of its size: `python tests/benchmarks/encoder_decoder.py`.

Both have random weights, the same prompts of one length and completions forced to full length, so that the arithmetic
is known. The encoder-decoder trains an adapter everywhere, or on its decoder alone, where its encoder's states are
kept. What running the encoder again for each token would cost is counted, not run. `--quick` is a smoke test.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from ppo_vs_trl import HERE, measure

WIDTH, VOCABULARY, LLAMA_LAYERS, LLAMA_FEED, T5_FEED, T5_LAYERS = 256, 4000, 5, 704, 832, (3, 2)
CASES = {"decoder-only": "all-linear", "encoder-decoder": "all-linear", "decoder trained": "decoder-linear"}


def operations(case: str, prompt: int, response: int, epochs: int = 4) -> float:
    """Multiplications and additions an episode of one PPO step: writing, two scoring passes, `epochs` there and back.

    A pass back costs a pass forward: the weights of the base get no gradient. Attention scores are left out, the head
    runs at completion tokens alone. `encoder for each token` is a pass there and back for every token of the
    completion over the prompt and what is written so far, as environments whose step is a token have it.
    """
    square, head = WIDTH**2, WIDTH * VOCABULARY
    if case == "decoder-only":
        once = LLAMA_LAYERS * (4 * square + 3 * WIDTH * LLAMA_FEED) * (prompt + response) + head * response
        return 2 * once * (1 + 2 + 2 * epochs)
    encoder = T5_LAYERS[0] * (4 * square + 2 * WIDTH * T5_FEED) * prompt
    cross = T5_LAYERS[1] * 2 * square * prompt
    token = T5_LAYERS[1] * (6 * square + 2 * WIDTH * T5_FEED)
    decoder = cross + (token + head) * response
    if case == "encoder for each token":
        prefixes = sum(encoder + cross + token * written + head for written in range(1, response + 1))
        return 2 * (encoder + decoder + prefixes * (2 + 2 * epochs))
    if case == "decoder trained":  # the encoder to write, and once more for all passes
        return 2 * (2 * encoder + decoder * (1 + 2 + 2 * epochs))
    return 2 * (encoder + decoder) * (1 + 2 + 2 * epochs)


def build(directory: Path, case: str, quick: bool) -> Path:
    """A random model of about 5M weights, and any tokenizer: the prompts are made of ids."""
    sys.path.insert(0, str(HERE.parent.parent))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    from pipeline.models.from_scratch import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a few words"], 300)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 400 if quick else VOCABULARY}
    if case == "decoder-only":
        sizes = {"hidden_size": WIDTH, "intermediate_size": LLAMA_FEED, "num_hidden_layers": LLAMA_LAYERS}
        more = {"num_attention_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **more, **special))
    else:
        sizes = {"d_model": WIDTH, "d_kv": WIDTH // 4, "num_heads": 4, "d_ff": T5_FEED, "decoder_start_token_id": 1}
        layers = {"num_layers": T5_LAYERS[0], "num_decoder_layers": T5_LAYERS[1]}
        model = T5ForConditionalGeneration(T5Config(**sizes, **layers, **special))
    print(f"{case}: {sum(p.numel() for p in model.parameters()):,} weights", file=sys.stderr, flush=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print; returns what was measured for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--response", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="measured PPO steps, behind one to warm up")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.prompt, args.response, args.batch, args.steps = 4, 2, 4, 1
    found = {}
    for case, targets in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            run = measure(sys.executable, "relay_worker.py", _specification(args, directory, case, targets))
        counted = operations(case, args.prompt, args.response)
        seconds = median(run["cpu"]) / args.batch
        found[case] = {"seconds": seconds, "memory": run["memory"], "counted": counted}
        phases = {name: round(value / args.batch, 4) for name, value in run["phase_cpu"].items()}
        print(
            f"{case:16s} {1 / seconds:6.2f} episodes a CPU second, {run['memory'] / 1e9:.2f} GB above imports, "
            f"{counted / 1e6:,.0f} MFLOP counted, CPU s an episode by phase {json.dumps(phases)}",
            flush=True,
        )
    counted = operations("encoder for each token", args.prompt, args.response)
    ratio = counted / found["encoder-decoder"]["counted"]
    print(f"encoder for each token: {counted / 1e6:,.0f} MFLOP counted, {ratio:.1f} times the encoder-decoder's")
    return found


def _specification(args: argparse.Namespace, directory: str, case: str, targets: str) -> dict:
    return {
        "model": str(build(Path(directory) / "model", case, args.quick)),
        "prompts": [[3 + (row * 7 + i) % 250 for i in range(args.prompt)] for row in range(args.batch * 2)],
        "attention": "eager",
        "batch": args.batch,
        "micro_batch": min(16, args.batch),
        "epochs": 4,
        "steps": args.steps,
        "response_length": args.response,
        "forced": True,
        "bf16": False,
        "temperature": 1.0,
        "threads": 1,
        "seed": 0,
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": targets},
    }


if __name__ == "__main__":
    main()
