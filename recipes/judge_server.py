"""A reward that is a server: a language model behind an OpenAI-compatible endpoint marks each completion.

```yaml
ppo:
  rewards:
    - {name: "judge_server.py:JudgeServer", url: "http://localhost:8000/v1", model: Qwen/Qwen2.5-7B-Instruct}
  reward_timeout: 300
  on_reward_error: skip
```

All requests of a rollout are under way together, at most `concurrency` at once. Nothing but Python's library is used.
"""

import asyncio
import hashlib
import json
import os
import re
import sqlite3
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

QUESTION = """Mark the answer from 0 (useless) to 10 (perfect). Write the number alone.

Task:
{prompt}

Answer:
{completion}"""


class JudgeServer:
    """Ask a server for a mark of each completion: a number in [0, 1].

    Args:
        url: The endpoint, up to and with `/v1`.
        model: The model's name on the server.
        question: What is asked; `{prompt}` and `{completion}` are filled in.
        highest: The highest mark.
        timeout: Seconds to wait for one answer.
        retries: How often a request is made again after the first, each time after twice as long a pause.
        pause: Seconds before the second request.
        concurrency: Requests that are under way at once.
        cache: A file that keeps the marks, so that a resumed run asks nothing twice; None: they stay in memory.
        key_variable: The environment variable with the key of the server, where it wants one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str = QUESTION,
        highest: float = 10.0,
        timeout: float = 30.0,
        retries: int = 3,
        pause: float = 0.5,
        concurrency: int = 32,
        cache: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        self.url, self.model, self.question, self.highest = url.rstrip("/"), model, question, highest
        self.timeout, self.retries, self.pause, self.key_variable = timeout, retries, pause, key_variable
        self.cache = cache
        self._marks: dict[str, float] = {}
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")

    async def __call__(self, prompts, completions, log_metric) -> list[float]:
        """Mark all completions; equal ones are asked once."""
        pairs = zip(prompts, completions, strict=True)
        texts = [self.question.format(prompt=_text(prompt), completion=_text(answer)) for prompt, answer in pairs]
        keys = [hashlib.sha256(f"{self.url} {self.model} {text}".encode()).hexdigest() for text in texts]
        self._load(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._marks}
        answers = await asyncio.gather(*map(self._ask, missing.values()), return_exceptions=True)
        marks = {key: answer for key, answer in zip(missing, answers, strict=True) if isinstance(answer, float)}
        self._save(marks)  # those that came before one failed are not asked again
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        log_metric("judge/asked", len(missing) / len(texts))
        return [self._marks[key] for key in keys]

    async def _ask(self, text: str) -> float:
        """Ask for a mark, again where the server does not answer or answers with an error of its own."""
        loop, pause = asyncio.get_running_loop(), self.pause
        for attempt in range(self.retries + 1):
            try:
                return self._mark(await loop.run_in_executor(self._threads, partial(self._request, text)))
            except (OSError, ValueError) as error:  # URLError, time-outs and broken JSON among them
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
                if refused or attempt == self.retries:
                    raise
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError

    def _request(self, text: str) -> str:
        """Make one request in a thread; return what the model wrote."""
        messages = [{"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": 8}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = json.load(response)
        try:
            return answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.url} answered {str(answer)[:100]!r}, which has no message") from error

    def _mark(self, answer: str) -> float:
        """Read the first number of an answer."""
        number = re.search(r"\d+(\.\d+)?", answer or "")
        if number is None:
            raise ValueError(f"the judge answered {answer!r}, expected a number from 0 to {self.highest:g}")
        return min(float(number[0]), self.highest) / self.highest

    def _load(self, keys: list[str]) -> None:
        """Read the marks of these keys from the file."""
        if self.cache is None or all(key in self._marks for key in keys):
            return
        with closing(self._open()) as file:
            for key in set(keys):
                self._marks.update(file.execute("SELECT key, mark FROM marks WHERE key = ?", (key,)).fetchall())

    def _save(self, marks: dict[str, float]) -> None:
        """Keep new marks."""
        self._marks.update(marks)
        if self.cache is not None and marks:
            with closing(self._open()) as file, file:
                file.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?)", marks.items())

    def _open(self) -> sqlite3.Connection:
        """Open the file, which several processes may share."""
        file = sqlite3.connect(self.cache, timeout=60)
        file.execute("CREATE TABLE IF NOT EXISTS marks (key TEXT PRIMARY KEY, mark REAL)")
        return file


def _text(value: str | list) -> str:
    """Return the text of a prompt or completion; of a chat of several messages with their roles."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return value[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)
