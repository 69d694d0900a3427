"""The whole chain of one recipe: what is done and unchanged is skipped, what was interrupted continues.

python pipeline/run.py recipes/quickstart.yaml sft.num_train_epochs=2
python pipeline/run.py recipes/quickstart.yaml --dry-run
python pipeline/run.py recipes/quickstart.yaml --from ppo -- --num_processes 1
python pipeline/run.py recipes/quickstart.yaml --seeds 0,1,2
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import sys
from collections.abc import Sequence

from pipeline.cli.run_command import run_script


def main(argv: Sequence[str]) -> int:
    """Run the chain; return its exit code."""
    return run_script(argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
