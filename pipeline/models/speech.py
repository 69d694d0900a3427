"""What a speech model is given: the sound of a clip, and the tokens that its decoder begins with.

A `SpokenPrompt` stands wherever the token ids of a prompt stand: it is a sequence of the given tokens, and knows its
clip. `Sound` is the same for a batch: the features of each distinct clip once, and which of them every row has.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SPEECH_MODELS = ("whisper",)
START, TRANSCRIBE, NO_TIMESTAMPS = "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"
CLIP = "clip"  # the column of a data set that holds where the features of a row's clip are
MOST_GIVEN = 4  # tokens: the start, the language, the task, no time stamps
POSITIONS_PER_SECOND, FRAMES_PER_POSITION = 50, 2  # of Whisper's encoder: features are made every 10 ms


def reads_sound(config: PretrainedConfig) -> bool:
    """Tell whether a model reads the features of a clip instead of the tokens of a prompt."""
    return config.model_type in SPEECH_MODELS


@dataclass(frozen=True)
class Clip:
    """Where the features of one clip are: `frames` rows from row `start` on, of `num_mel_bins` float32 in a file.

    The features after the clip's end, up to the model's window, are those of silence, which the last frame holds.
    """

    path: str
    start: int
    frames: int
    num_mel_bins: int
    window: int

    def features(self) -> Tensor:
        """Read the features, as the model takes them: [num_mel_bins, window]."""
        rows = _open_features(self.path, self.num_mel_bins)[self.start : self.start + self.frames]
        return torch.from_numpy(np.pad(rows, ((0, self.window - self.frames), (0, 0)), mode="edge").T.copy())


@cache
def _open_features(path: str, num_mel_bins: int) -> NDArray[np.float32]:
    """Map a file of features into memory, of which only what is read is loaded."""
    return np.memmap(path, np.float32, "r").reshape(-1, num_mel_bins)


@dataclass(frozen=True)
class SpokenPrompt:
    """The prompt of a speech model: a sequence of the token `ids` that its decoder is given, and the clip it hears."""

    ids: tuple[int, ...]
    clip: Clip

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> "SpokenPrompt": ...

    def __getitem__(self, index):
        """Return one token, or the same clip with some of the tokens."""
        return replace(self, ids=self.ids[index]) if isinstance(index, slice) else self.ids[index]


@dataclass(frozen=True)
class Sound:
    """The clips of a batch: `features [U, num_mel_bins, T]` of distinct ones, and which one each row has, `index [B]`.

    `states [U, T / 2, H]` is what an encoder made of the features, kept where nothing in the encoder trains.
    """

    features: Tensor
    index: Tensor
    states: Tensor | None = None

    def rows(self, index: Tensor) -> "Sound":
        """Return the clips of the rows at `index`; the features are shared, not copied."""
        return replace(self, index=self.index[index])

    def encoded(self, model: PreTrainedModel, size: int) -> "Sound":
        """Return the same with what the encoder makes of every clip, `size` clips at a time."""
        encoder = model.get_encoder()
        states = [encoder(features).last_hidden_state for features in self.features.to(model.dtype).split(size)]
        return replace(self, states=torch.cat(states))

    def encoder_states(self, model: PreTrainedModel) -> Tensor:
        """Return what the encoder makes of each row's clip, [B, T / 2, H]; each distinct clip is read once."""
        if self.states is not None:
            return self.states.index_select(0, self.index)
        distinct, index = self.index.unique(return_inverse=True)
        features = self.features.index_select(0, distinct).to(model.dtype)  # which the first layer does not cast
        states = model.get_encoder()(features).last_hidden_state
        # Not by indexing, whose gradient adds up in any order where there are several threads.
        return states.index_select(0, index)


def make_sound(prompts: Sequence[Sequence[int]], device: torch.device | str) -> Sound | None:
    """Read the clips of spoken prompts, each distinct clip once; None for prompts of tokens alone."""
    clips = [prompt.clip for prompt in prompts if isinstance(prompt, SpokenPrompt)]
    if not clips:
        return None
    numbers: dict[Clip, int] = {}
    index = [numbers.setdefault(clip, len(numbers)) for clip in clips]
    features = torch.stack([clip.features() for clip in numbers])
    return Sound(features.to(device), torch.tensor(index, device=device))


def probe_sound(model: PreTrainedModel, rows: int) -> Sound:
    """Make a clip of noise for each row, to compare two ways of computing."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    shape = (rows, config.num_mel_bins, FRAMES_PER_POSITION * config.max_source_positions)
    features = torch.rand(shape, generator=generator).to(model.device, model.dtype)
    return Sound(features, torch.arange(rows, device=model.device))


def spoken_prompts(tokenizer: PreTrainedTokenizerBase, clips: Sequence[Mapping[str, object]]) -> list[Sequence[int]]:
    """Make the prompts of rows from their column `clip`: the clip, and the tokens that its language asks for."""
    given = {clip["language"]: tuple(given_tokens(tokenizer, clip["language"])) for clip in clips}
    return [SpokenPrompt(given[clip["language"]], read_clip(clip)) for clip in clips]


def read_clip(clip: Mapping[str, object]) -> Clip:
    """Return where the features of a row of the column `clip` are."""
    return Clip(**{key: value for key, value in clip.items() if key != "language"})


def given_tokens(tokenizer: PreTrainedTokenizerBase, language: str | None) -> list[int]:
    """Return what the decoder begins with to write down speech; None: a model of one language, which it is not told.

    Raises:
        ValueError: the tokenizer has no such language.
    """
    told = [] if language is None else [language_token(language), TRANSCRIBE]
    tokens, vocabulary = [START, *told, NO_TIMESTAMPS], tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no token {missing[0]}")
    return [vocabulary[token] for token in tokens]


def language_token(language: str) -> str:
    """Return the token of a language, such as <|en|>."""
    return f"<|{language}|>"


def is_multilingual(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a speech model is told the language of a clip. OpenAI's models for English have 51864 tokens."""
    return TRANSCRIBE in tokenizer.get_vocab() and model_config.vocab_size != 51864


@dataclass(frozen=True)
class ForbiddenTokens:
    """Tokens that a speech model never writes: at all, and as the first token of a completion."""

    always: tuple[int, ...] = ()
    first: tuple[int, ...] = ()


def forbidden_tokens(model: PreTrainedModel) -> ForbiddenTokens:
    """Return what the generation config of a speech model forbids, which is part of how it was trained to be used."""
    if not reads_sound(model.config):
        return ForbiddenTokens()
    settings = model.generation_config
    return ForbiddenTokens(tuple(settings.suppress_tokens or ()), tuple(settings.begin_suppress_tokens or ()))
