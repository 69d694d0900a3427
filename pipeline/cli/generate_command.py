"""relay generate: let a model of a run, or any model in a folder, answer a prompt, or talk to it."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.cli.finished_models import (
    FAILURES,
    SYSTEMS,
    FinishedModel,
    find_model,
    find_systems,
    is_chat_run,
    prompt_from,
)
from pipeline.cli.parsers import make_parser
from pipeline.evaluation.pages.page import print_table, visible
from pipeline.evaluation.pages.tables import Table
from pipeline.models.generation import Watch, generate
from pipeline.models.prompt_lengths import answer_room, unfit_prompts
from pipeline.models.sampling import Decoding
from pipeline.models.speech import reads_sound
from pipeline.models.text import decode, encode_prompts
from pipeline.runtime.libraries import quiet_libraries
from pipeline.tasks.chats import Message

EXAMPLE = """\
examples:
  relay generate runs/quickstart "The old man reads a book."
  relay generate runs/quickstart "The old man reads a book." --system sft
  relay generate runs/quickstart "The old man reads a book." --compare
  relay generate runs/my_run --interactive
  relay generate runs/my_run/sft "Good morning" --temperature 0.7 --seed 1
"""
INTERACTIVE = "a line is a prompt, an empty line begins a new chat, Ctrl-C stops an answer, Ctrl-D ends"


@dataclass(frozen=True)
class Writer:
    """A model in memory, and how it answers: in fewer tokens than its default where no more fit after a prompt."""

    finished: FinishedModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    length_is_given: bool  # by --max-new-tokens

    def prompt(self, text: str) -> str | list[Message]:
        """Return what the model reads of a text."""
        return prompt_from(self.finished.recipe, text, self.tokenizer.chat_template is not None)

    def answer(self, prompt: str | list[Message], watch: Watch | None = None) -> str:
        """Complete a prompt.

        Raises:
            ValueError: the prompt is empty or leaves no room for an answer, or the model hears sound.
        """
        if reads_sound(self.model.config):
            raise ValueError("this model hears sound, and generate has texts alone for prompts; see docs/speech.md")
        ids = encode_prompts(self.tokenizer, [prompt], self.model.config.is_encoder_decoder)
        decoding, room = self.decoding, answer_room(ids[0], self.model.config)
        if not self.length_is_given and room is not None:
            decoding = replace(decoding, max_new_tokens=max(1, min(decoding.max_new_tokens, room)))
        key = "--max-new-tokens" if self.length_is_given else "PROMPT"
        for reason in unfit_prompts(ids, decoding.max_new_tokens, self.model.config, key).values():
            raise ValueError(reason)
        return decode(self.tokenizer, generate(self.model, self.tokenizer, ids, decoding, 1, watch))[0]

    def show(self, prompt: str | list[Message]) -> str:
        """Print an answer, in a terminal token by token, and return it."""
        shown = ""

        def show_more(rows: list[list[int]]) -> None:
            nonlocal shown
            text = decode(self.tokenizer, rows)[0]
            if text.startswith(shown) and not text.endswith("\ufffd"):  # the first bytes of a character
                print(visible(text[len(shown) :]), end="", flush=True)
                shown = text

        answer = self.answer(prompt, show_more if sys.stdout.isatty() else None)
        print(visible(answer[len(shown) :] if answer.startswith(shown) else ""), flush=True)
        return answer


def generate_command(argv: Sequence[str]) -> int:
    """Print completions; return 2 where there is no such model, or the prompt is one that it cannot take."""
    arguments = parse_generate_arguments(argv)
    quiet_libraries()
    try:
        if arguments.compare:
            print_side_by_side(arguments)
        elif arguments.interactive:
            converse(load_writer(find_model(arguments.path, arguments.system), arguments))
        else:
            writer = load_writer(find_model(arguments.path, arguments.system), arguments)
            writer.show(writer.prompt(arguments.prompt))
    except FAILURES as error:
        print(f"error: generate: {error}", file=sys.stderr)
        return 2
    return 0


def load_writer(finished: FinishedModel, arguments: argparse.Namespace) -> Writer:
    """Load a model, and seed what it draws."""
    model, tokenizer = finished.source.load()
    torch.manual_seed(arguments.seed)  # after the load, which may draw numbers too
    length = arguments.max_new_tokens
    return Writer(finished, model, tokenizer, finished.decoding(length, arguments.temperature), length is not None)


def print_side_by_side(arguments: argparse.Namespace) -> None:
    """Print what base, SFT and PPO answer, one model at a time in memory and each with the same seed."""
    answers = {}
    for finished in find_systems(arguments.path):
        writer = load_writer(finished, arguments)
        answers[finished.source.name] = writer.answer(writer.prompt(arguments.prompt))
    print_table(Table("", list(answers), [list(answers.values())]), Console())


def converse(writer: Writer) -> None:
    """Answer one line after the other; where the prompts are chats the model sees the earlier turns."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit a line and remember the earlier ones
    print(INTERACTIVE, file=sys.stderr)
    chat: list[Message] = []
    while (line := next_line()) is not None:
        prompt = writer.prompt(line)
        if not line.strip():
            chat = []
        elif isinstance(prompt, str) or not is_chat_run(writer.finished.recipe):
            try_answer(writer, prompt)
        else:
            turns = [*chat, *(prompt[-1:] if chat else prompt)]
            answer = try_answer(writer, turns)
            chat = chat if answer is None else [*turns, {"role": "assistant", "content": answer}]


def next_line() -> str | None:
    """Read a line; None at the end of the input, or where Ctrl-C asks for it."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def try_answer(writer: Writer, prompt: str | list[Message]) -> str | None:
    """Print an answer and return it; None where it was stopped, or the prompt is one that the model cannot take."""
    try:
        return writer.show(prompt)
    except KeyboardInterrupt:
        print()
    except ValueError as error:
        print(f"error: generate: {error}", file=sys.stderr)
    return None


def parse_generate_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words after `relay generate`, and refuse those that do not go together."""
    parser = generate_parser()
    arguments = parser.parse_args(argv)
    if arguments.temperature is not None and not arguments.temperature > 0:
        parser.error(f"argument --temperature: must be above 0, found {arguments.temperature}")
    if (arguments.prompt is None) != arguments.interactive:
        parser.error("give either a PROMPT or --interactive")
    if arguments.compare and arguments.system:
        parser.error("argument --compare: it shows every system, so --system would do nothing")
    return arguments


def generate_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay generate`."""
    parser = make_parser("generate", __doc__, EXAMPLE)
    parser.add_argument("path", type=Path, metavar="RUN|DIR", help="a run directory, or the folder of a model")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="of a run over parallel files: a source text")
    parser.add_argument("--system", choices=SYSTEMS, help="of a run; default: ppo, or sft where there is no ppo")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--compare", action="store_true", help="show the answers of base, SFT and PPO side by side")
    shown.add_argument("--interactive", action="store_true", help="answer line after line; a chat where there is one")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: as in the run's evaluation")
    parser.add_argument("--temperature", type=float, metavar="T", help="draw a sample; default: the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample")
    return parser


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)
