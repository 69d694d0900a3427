"""relay generate: let a model of a run, or any model in a folder, answer a prompt."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.cli.finished_models import SYSTEMS, FinishedModel, find_model, prompt_from
from pipeline.models.generation import Decoding, generate
from pipeline.models.text import decode, encode_prompts
from pipeline.runtime.libraries import quiet_libraries

EXAMPLE = """\
examples:
  relay generate runs/quickstart "The old man reads a book."
  relay generate runs/quickstart "The old man reads a book." --system sft
  relay generate runs/my_run/sft "Good morning" --temperature 0.7 --seed 1
"""


def generate_command(argv: Sequence[str]) -> int:
    """Print the completion; return 2 where there is no such model."""
    arguments = parse_generate_arguments(argv)
    quiet_libraries()
    try:
        finished = find_model(arguments.path, arguments.system)
        print(answer(finished, arguments.prompt, arguments.max_new_tokens, arguments.temperature, arguments.seed))
    except (ValueError, OSError) as error:
        print(f"error: generate: {error}", file=sys.stderr)
        return 2
    return 0


def answer(
    finished: FinishedModel, text: str, max_new_tokens: int | None, temperature: float | None, seed: int
) -> str:
    """Load a model and complete one prompt: greedily without a temperature."""
    model, tokenizer = finished.source.load()
    prompt = prompt_from(finished.recipe, text, tokenizer.chat_template is not None)
    ids = encode_prompts(tokenizer, [prompt], model.config.is_encoder_decoder)
    torch.manual_seed(seed)
    completion = generate(model, tokenizer, ids, Decoding(max_new_tokens or finished.max_new_tokens, temperature), 1)
    return decode(tokenizer, completion)[0]


def parse_generate_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words after `relay generate`."""
    parser = argparse.ArgumentParser(
        prog="relay generate",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="RUN|DIR", help="a run directory, or the folder of a model")
    parser.add_argument("prompt", metavar="PROMPT", help="of a run over parallel files: a source text")
    parser.add_argument("--system", choices=SYSTEMS, help="of a run; default: ppo, or sft where there is no ppo")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: as in the run's evaluation")
    parser.add_argument("--temperature", type=float, metavar="T", help="draw a sample; default: the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample")
    arguments = parser.parse_args(argv)
    if arguments.temperature is not None and not arguments.temperature > 0:
        parser.error(f"argument --temperature: must be above 0, found {arguments.temperature}")
    return arguments


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)
