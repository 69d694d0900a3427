"""Ask the Hugging Face Hub for a repository, without a long wait."""

from dataclasses import dataclass
from functools import lru_cache
from threading import Thread

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

PROBE_SECONDS = 4.0


@dataclass(frozen=True)
class HubAnswer:
    """Whether the Hub answered, and why it does not give the repository; `problem` is None where it gives it."""

    answered: bool
    problem: str | None = None


def ask_hub(repository: str, kind: str, revision: str | None = None) -> HubAnswer:
    """Ask the Hub for a repository of a `kind` (model, dataset or space), within PROBE_SECONDS.

    With HF_HUB_OFFLINE set, nothing is asked.
    """
    if constants.HF_HUB_OFFLINE:
        return HubAnswer(False, "HF_HUB_OFFLINE is set and it is not in the local cache")
    return _ask(repository, kind, revision, PROBE_SECONDS)


@lru_cache
def _ask(repository: str, kind: str, revision: str | None, seconds: float) -> HubAnswer:
    answers: list[HubAnswer] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=seconds)
            answers.append(HubAnswer(True))
        except Exception as error:  # the network and the library raise errors of many kinds
            problem = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403, 404)
            # A ValueError says that this is no name of a repository.
            answers.append(HubAnswer(refused or isinstance(error, ValueError), problem))

    # In a thread, because the time limit of a request does not cover the look-up of the host's name.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else HubAnswer(False, "no answer")
