"""What the command lines of all commands of `relay` have in common."""

import argparse


def make_parser(name: str, description: str | None, example: str, usage: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of `relay NAME`, whose help ends with an example."""
    return argparse.ArgumentParser(
        prog=f"relay {name}",
        usage=usage,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
