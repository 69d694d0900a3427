"""relay completion: print the script by which a shell completes the words of relay."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.main import COMMANDS, code_of
from pipeline.cli.parsers import make_parser

EXAMPLE = """\
examples:
  relay completion bash > ~/.local/share/bash-completion/completions/relay
  relay completion zsh > ~/.zfunc/_relay
"""
SHELLS = ("bash", "zsh", "tcsh")


def completion_command(argv: Sequence[str]) -> int:
    """Print the script; return 2 without the library that writes it."""
    arguments = completion_parser().parse_args(argv)
    try:
        import shtab
    except ImportError:
        print("error: completion: it needs the package shtab: pip install shtab", file=sys.stderr)
        return 2
    parser = relay_parser()
    for action in actions_with_paths(parser):
        action.complete = shtab.FILE
    print(shtab.complete(parser, arguments.shell))
    return 0


def relay_parser() -> argparse.ArgumentParser:
    """Make one parser of all commands; relay itself asks only the one that it runs."""
    parser = argparse.ArgumentParser(prog="relay")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, parents=[code_of(name, "parser")()], add_help=False)
    return parser


def actions_with_paths(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of all commands that take a file or folder."""
    actions = []
    for action in parser._actions:  # argparse has no public name for them
        if isinstance(action.choices, dict):
            actions += [each for command in action.choices.values() for each in actions_with_paths(command)]
        elif action.type is Path or action.dest in ("words", "data"):
            actions.append(action)
    return actions


def completion_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay completion`."""
    parser = make_parser("completion", __doc__, EXAMPLE)
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    return parser
