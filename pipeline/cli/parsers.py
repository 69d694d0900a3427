"""What the command lines of all commands of `relay` have in common."""

import argparse
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser that refuses an option given twice, of which argparse would take the last without a word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.register("action", None, _Once)


class _Once(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if option is not None and getattr(namespace, self.dest, self.default) is not self.default:
            raise argparse.ArgumentError(self, "given twice; give it once")
        setattr(namespace, self.dest, values)


def make_parser(name: str, description: str | None, example: str, usage: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of `relay NAME`, whose help ends with an example."""
    return Parser(
        prog=f"relay {name}",
        usage=usage,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
