"""Stub."""


def compare_command(argv) -> int:
    """Stub."""
    return 0
