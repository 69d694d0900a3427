"""Let a language model choose between the texts of two systems of a finished run, and print how often each wins.

    python recipes/judge_pairs.py runs/scitldr --url http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct

The judge, behind an OpenAI-compatible endpoint, reads each prompt with both texts, once in either order: a system wins
where the judge prefers it both times, and an order that decides is half a win for each. Equal texts are half a win
without a question. Answers are kept in eval/judge.sqlite, and the result in eval/judge_A_B.json.
"""

import argparse
import asyncio
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.evaluation.proportions import Share, share

QUESTION = """Which answer to the task is better, the first or the second? Write 1 or 2 alone.

Task:
{prompt}

{completion}"""
FIRST, SECOND = 0.5, 1.0  # the marks 1 and 2, of 2


def judge_server():
    """Load the class of the file beside this one, which need not be a package, and let it answer with neither."""
    spec = importlib.util.spec_from_file_location("judge_server", Path(__file__).with_name("judge_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class JudgeOfPairs(module.JudgeServer):
        def _mark(self, answer: str) -> float:
            """Read the number of an answer; 0, neither of the two, where it has none."""
            try:
                return super()._mark(answer)
            except ValueError:
                return 0.0

    return JudgeOfPairs


def read_rows(run: Path, system: str) -> list[dict]:
    """Read what a system wrote for the test prompts."""
    file = run / "eval" / "predictions" / f"{system}.jsonl"
    if not file.is_file():
        raise SystemExit(f"error: no file {str(file)!r}; finish the evaluation of the run, or name another system")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def win_rate(judge, rows_a: Sequence[dict], rows_b: Sequence[dict], name: str) -> Share:
    """Return how often system B wins against system A, with a 95 % interval that knows the clusters of the rows."""
    texts = [(a["completion"], b["completion"]) for a, b in zip(rows_a, rows_b, strict=True)]
    asked = [row for row, (a, b) in enumerate(texts) if a != b]
    prompts = [rows_a[row]["prompt"] for row in asked]
    pairs = [texts[row] for row in asked] + [texts[row][::-1] for row in asked]
    answers = [f"First answer:\n{first}\n\nSecond answer:\n{second}" for first, second in pairs]
    marks = asyncio.run(judge(prompts * 2, answers, lambda *_: None)) if asked else []
    wins = [0.5] * len(texts)
    for number, row in enumerate(asked):
        straight, swapped = marks[number], marks[number + len(asked)]
        wins[row] = (_preference(straight, SECOND) + _preference(swapped, FIRST)) / 2
    return share(name, wins, [row.get("cluster", number) for number, row in enumerate(rows_a)])


def _preference(mark: float, wanted: float) -> float:
    """Return 1 where the judge chose the wanted answer, 0 where it chose the other, and 0.5 for neither."""
    return 0.5 if mark not in (FIRST, SECOND) else float(mark == wanted)


def main(argv: Sequence[str] | None = None) -> int:
    """Judge the systems and print the win rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with a finished evaluation")
    parser.add_argument("--systems", nargs=2, default=("sft", "ppo"), metavar=("A", "B"), help="default: sft ppo")
    parser.add_argument("--url", required=True, help="the endpoint, up to and with /v1")
    parser.add_argument("--model", required=True, help="the model's name on the server")
    parser.add_argument("--first", type=int, default=None, metavar="N", help="judge the first N prompts only")
    arguments = parser.parse_args(argv)
    a, b = arguments.systems
    rows_a, rows_b = (read_rows(arguments.run, system)[: arguments.first] for system in (a, b))
    cache = str(arguments.run / "eval" / "judge.sqlite")
    judge = judge_server()(arguments.url, arguments.model, question=QUESTION, highest=2.0, cache=cache)
    result = win_rate(judge, rows_a, rows_b, f"{b} against {a}")
    print(
        f"{b} wins {result.value:.1%} against {a} [{result.low:.1%}, {result.high:.1%}], {result.count} prompts, "
        f"judged by {arguments.model}"
    )
    file = arguments.run / "eval" / f"judge_{a}_{b}.json"
    file.write_text(json.dumps({**asdict(result), "judge": arguments.model, "url": arguments.url}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
