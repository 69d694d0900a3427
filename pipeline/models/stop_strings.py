"""Which texts hold one of the stop strings, with little decoding for each token that is written."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pipeline.models.sampling import Decoding

# Tokens before those that a stop string can reach over: the text of the first ones depends on what stood before them.
MARGIN = 8


class StopStrings:
    """Looks for the stop strings of `decoding` in texts that grow by one token at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> None:
        self._tokenizer, self._ends = tokenizer, decoding.stop_strings
        self._first = max(decoding.min_new_tokens, 1)
        self._special = set(tokenizer.all_special_ids) if self._ends else set()
        # A token that writes anything writes at least one byte.
        self._reach = MARGIN + max((len(end.encode()) for end in self._ends), default=0)

    def in_text(self, ids: Sequence[int]) -> bool:
        """Return whether the text of `ids` holds a stop string, and is long enough to end."""
        return len(ids) >= self._first and self._holds(ids)

    def in_new_text(self, ids: Sequence[int]) -> bool:
        """Return the same for `ids` whose text did not end before the last token: only the last tokens are decoded."""
        if len(ids) > self._first and not self._holds([i for i in ids if i not in self._special][-self._reach :]):
            return False
        return self.in_text(ids)

    def _holds(self, ids: Sequence[int]) -> bool:
        if not self._ends:
            return False
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(end in text for end in self._ends)
