"""The pairwise judge of a finished run: both orders, a judge that minds the order alone, equal texts, the cache."""

import importlib.util
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.evaluation.proportions import share

FILE = Path(__file__).resolve().parents[2] / "recipes" / "judge_pairs.py"
spec = importlib.util.spec_from_file_location("judge_pairs", FILE)
judge_pairs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(judge_pairs)


class Handler(BaseHTTPRequestHandler):
    """Choose the longer answer, or always the first."""

    def log_message(self, *args) -> None:
        """Nothing: tests are quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        self.server.asked.append(text)
        first, second = re.search(r"First answer:\n(.*)\n\nSecond answer:\n(.*)", text).groups()
        choice = 1 if self.server.always_first or len(first) > len(second) else 2
        choice = "Both are good." if "say 0" in text and self.server.undecided else choice
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": f"{choice}"}}]}).encode())


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.always_first, server.undecided = [], False, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def judge(server, tmp_path, capsys):
    """Each call judges six prompts of a run; it returns what is printed and what is saved."""
    texts = {"sft": ["aa", "b", "ccc", "dd", "e", "ff"], "ppo": ["aaa", "bb", "cc", "dd", "eee", "fff"]}
    (tmp_path / "eval" / "predictions").mkdir(parents=True)
    for system, completions in texts.items():
        rows = [{"prompt": f"say {i}", "completion": text, "cluster": i // 2} for i, text in enumerate(completions)]
        file = tmp_path / "eval" / "predictions" / f"{system}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*options):
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        assert judge_pairs.main([str(tmp_path), "--url", url, "--model", "m", *options]) == 0
        return capsys.readouterr().out, json.loads((tmp_path / "eval" / "judge_sft_ppo.json").read_text())

    return call


def test_the_win_rate_is_that_of_both_orders_with_its_interval(judge, server):
    """PPO is longer four times, shorter once and equal once: 4.5 of 6."""
    printed, saved = judge()
    expected = share("", [1, 1, 0, 0.5, 1, 1], [0, 0, 1, 1, 2, 2])
    assert saved["value"] == pytest.approx(4.5 / 6) and (saved["count"], saved["clusters"]) == (6, 3)
    assert (saved["low"], saved["high"]) == pytest.approx((expected.low, expected.high))
    assert printed.startswith("ppo wins 75.0% against sft [") and "judged by m" in printed
    assert len(server.asked) == 10  # five prompts in two orders; the equal texts are no question
    judge()
    assert len(server.asked) == 10  # every answer was kept


def test_a_judge_that_prefers_the_first_place_decides_nothing(judge, server):
    server.always_first = True
    _, saved = judge("--first", "3")
    assert (saved["value"], saved["count"]) == (0.5, 3)


def test_an_answer_without_a_number_is_for_neither(judge, server):
    server.undecided = True
    _, saved = judge()
    assert saved["value"] == pytest.approx(4 / 6) and len(server.asked) == 10


def test_a_system_that_is_not_there_is_named(judge):
    with pytest.raises(SystemExit, match=r"base\.jsonl"):
        judge("--systems", "sft", "base")
