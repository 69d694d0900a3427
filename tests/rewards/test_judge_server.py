"""The example of a reward that is a server: requests together, again after a failure, within a time, and once."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.rewards import Handling, RewardConfig, build_rewards, compute_rewards

FILE = Path(__file__).resolve().parents[2] / "recipes" / "judge_server.py"
TEXTS = ["one", "two", "three", "four"]


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that marks an answer by its length, and misbehaves where it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.freed = threading.Lock(), threading.Event()
        self.requests, self.now, self.most, self.wait_for = [], 0, 0, 1
        self.failing, self.hanging, self.code, self.reply = set(), set(), 500, "{}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def log_message(self, *args) -> None:
        """Nothing: tests are quiet."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"].rsplit("Answer:\n", 1)[1]
        with server.lock:
            server.requests.append((text, self.headers["Authorization"]))
            server.now += 1
            server.most = max(server.most, server.now)
            fails, hangs = text in server.failing, text in server.hanging
            server.failing.discard(text)
            server.hanging.discard(text)
        ends = time.monotonic() + 20
        while server.most < server.wait_for and time.monotonic() < ends:  # until all are under way
            time.sleep(0.005)
        if hangs:
            server.freed.wait(60)
        answer = {"choices": [{"message": {"role": "assistant", "content": f"Mark: {len(text)}"}}]}
        with server.lock:
            server.now -= 1
        self.send_response(server.code if fails else 200)
        self.end_headers()
        self.wfile.write((server.reply if fails else json.dumps(answer)).encode())


@pytest.fixture
def server():
    server = Server()
    yield server
    server.freed.set()
    server.shutdown()


def ask(server, texts=TEXTS, on_error="stop", **options):
    """What a recipe's reward says of the texts."""
    options = {"url": server.url, "model": "judge", "pause": 0.01, **options}
    rewards = build_rewards([RewardConfig(f"{FILE}:JudgeServer", options=options)])
    columns = {"completion_ids": [[1]] * len(texts)}
    return compute_rewards(rewards, ["say"] * len(texts), texts, columns, Handling(on_error, 60.0))


def test_requests_do_not_wait_for_each_other(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.wait_for = 4  # none is answered before all are there
    outputs = ask(server, key_variable="JUDGE_KEY")
    assert outputs.weighted_sum.tolist() == pytest.approx([0.3, 0.3, 0.5, 0.4])
    assert server.most == 4 and {key for _, key in server.requests} == {"Bearer secret"}


def test_a_limit_on_requests_at_once(server):
    ask(server, concurrency=1)
    assert server.most == 1 and len(server.requests) == 4


def test_a_request_that_fails_once_is_made_again(server):
    server.failing = {"two"}
    assert ask(server).weighted_sum.tolist() == pytest.approx([0.3, 0.3, 0.5, 0.4])
    assert [text for text, _ in server.requests].count("two") == 2 and len(server.requests) == 5


def test_a_request_that_hangs_is_given_up_and_made_again(server):
    server.hanging = {"three"}
    assert ask(server, timeout=0.5).weighted_sum.tolist() == pytest.approx([0.3, 0.3, 0.5, 0.4])
    assert [text for text, _ in server.requests].count("three") == 2


def test_an_answer_that_no_retry_mends_costs_its_completion_alone(server):
    server.failing, server.code = {"two"}, 404
    outputs = ask(server, on_error="skip", retries=0)
    assert list(outputs.failures) in ([], [1])  # the search asks again, and then the server answers
    assert outputs.by_name[f"{FILE}:JudgeServer"][[0, 2, 3]].tolist() == pytest.approx([0.3, 0.5, 0.4])
    assert [text for text, _ in server.requests].count("one") == 1  # its mark was kept


def test_nothing_is_asked_twice(server, tmp_path):
    cache = str(tmp_path / "marks.sqlite")
    first = ask(server, [*TEXTS, "one"], cache=cache)
    assert len(server.requests) == 4 and first.log.metrics == {"judge/asked": [0.8]}
    again = ask(server, [*TEXTS, "one"], cache=cache)  # another object, as in a resumed run
    assert len(server.requests) == 4 and again.log.metrics == {"judge/asked": [0.0]}
    assert again.weighted_sum.tolist() == first.weighted_sum.tolist()
