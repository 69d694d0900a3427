"""A few examples token by token: which tokens PPO made likelier, and which prompt tokens it attends to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.gains import Gains
from pipeline.evaluation.report import Outputs
from pipeline.evaluation.systems import Source
from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.likelihood import completion_logprobs
from pipeline.models.prompt_lengths import truncate_prompts
from pipeline.models.prompts import encode_rows
from pipeline.models.sequences import make_sequences
from pipeline.models.sharding import SHARE_OF_MEMORY, device_memory, shards_models
from pipeline.models.speech import SpokenPrompt
from pipeline.models.text import encode_completions, plain_text
from pipeline.runtime.messages import say

MAX_TOKENS = 200  # of a completion that is shown token by token
MAX_CELLS = 4000  # of a heat map: prompt tokens times completion tokens


@dataclass(frozen=True)
class Token:
    """A token of a passage and its log-probability (nats) under SFT and under PPO."""

    text: str
    sft: float
    ppo: float

    @property
    def change(self) -> float:
        """Return how much likelier PPO made the token, in nats."""
        return self.ppo - self.sft


@dataclass(frozen=True)
class Passage:
    """A completion of the example's prompt: a title that says who wrote it, and its tokens."""

    title: str
    tokens: list[Token]


@dataclass(frozen=True)
class Attention:
    """Attention of each token of PPO's completion to each prompt token: `weights [C, P]`, over layers and heads."""

    prompt: list[str]
    completion: list[str]
    weights: list[list[float]]


@dataclass(frozen=True)
class Inspection:
    """One test example: why it was chosen, and what can be seen in it."""

    index: int
    reason: str
    prompt: str
    passages: list[Passage] = field(default_factory=list)
    attention: Attention | None = None


def passage_logprobs(model: PreTrainedModel, prompt: Sequence[int], completion: list[int], pad_id: int) -> list[float]:
    """Compute the log-probability, in nats, of each token of a completion."""
    sequences = make_sequences([prompt], [completion], pad_id, model.device)
    return completion_logprobs(model, sequences)[0].tolist()


def compare_passage(
    title: str,
    prompt: Sequence[int],
    completion: list[int],
    sft: PreTrainedModel,
    ppo: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Passage:
    """Compare the log-probabilities of one completion's tokens under both models."""
    before, after = (passage_logprobs(model, prompt, completion, tokenizer.pad_token_id) for model in (sft, ppo))
    texts = token_texts(tokenizer, completion)
    return Passage(title, [Token(*token) for token in zip(texts, before, after, strict=True)])


@torch.no_grad()
def attention_to_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], completion: list[int]
) -> Attention | None:
    """Compute the attention to the prompt at the position that writes each token; None where the model gives none.

    For an encoder-decoder this is the cross-attention, whose weights on the prompt sum to 1. Only eager attention
    returns weights, so the model is switched to it and stays so.
    """
    try:
        model.set_attn_implementation("eager")
    except (ValueError, ImportError):  # a model with one implementation of its own
        return None
    prefix = decoder_prefix(model)
    if prefix:
        ids, read = (torch.tensor([row], device=model.device) for row in (prompt, prefix + completion[:-1]))
        output = model(input_ids=ids, decoder_input_ids=read, output_attentions=True, use_cache=False)
        layers = output.cross_attentions
    else:
        ids = torch.tensor([prompt + completion[:-1]], device=model.device)
        layers = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    layers = [layer for layer in layers or () if layer is not None]  # linear attention has no weights
    if not layers:
        return None
    mean = torch.stack([layer[0].float().mean(0) for layer in layers]).mean(0)
    rows = mean[-len(completion) :, : len(prompt)]
    return Attention(token_texts(tokenizer, prompt), token_texts(tokenizer, completion), rows.tolist())


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode each token alone, with line breaks and tabs made visible."""
    texts = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text.replace("\n", "⏎").replace("\t", "⇥") for text in texts]


def inspect_examples(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    chosen: Sequence[tuple[int, str]],
    completion_ids: tuple[Sequence[list[int]], Sequence[list[int]]],
) -> list[Inspection]:
    """Compare the chosen rows (number, reason) token by token under `models` (SFT, PPO) and their completions."""
    sft, ppo = models
    inspections = []
    for index, reason in chosen:
        row = rows[index]
        prompt = encode_rows(tokenizer, rows.select([index]), sft.config.is_encoder_decoder)[0]
        reference = encode_completions(tokenizer, [row["prompt"]], [row["references"][0]])
        [reference], _ = truncate_prompts([prompt], reference, sft.config)
        before, after = (ids[index][:MAX_TOKENS] for ids in completion_ids)
        shown = {"reference": reference[:MAX_TOKENS], "SFT's completion": before, "PPO's completion": after}
        passages = [compare_passage(title, prompt, ids, sft, ppo, tokenizer) for title, ids in shown.items()]
        small = len(prompt) * len(after) <= MAX_CELLS and not isinstance(prompt, SpokenPrompt)  # sound has no tokens
        attention = attention_to_prompt(ppo, tokenizer, prompt, after) if small else None
        inspections.append(Inspection(index, reason, plain_text(row["prompt"]), passages, attention))
    return inspections


def inspect_systems(
    sources: Sequence[Source], rows: Dataset, outputs: Mapping[str, Outputs], gains: Gains | None, count: int
) -> list[Inspection]:
    """Inspect the `count` examples with the largest gains and losses and typical ones, under SFT and PPO."""
    chosen = chosen_examples(gains, count)
    if not chosen:
        return []
    by_name = {source.name: source for source in sources}
    if shards_models() and 2 * directory_bytes(by_name["sft"].path) > SHARE_OF_MEMORY * device_memory():
        say("eval: no examples are inspected: the main process would need both models whole, which do not fit")
        return []
    (sft, tokenizer), (ppo, _) = (by_name[name].load() for name in ("sft", "ppo"))
    completions = tuple([p.completion_ids for p in outputs[name].predictions] for name in ("sft", "ppo"))
    return inspect_examples((sft, ppo), tokenizer, rows, chosen, completions)


def directory_bytes(path: object) -> int:
    """Count the bytes of the weights in a directory; 0 for what is none."""
    return sum(file.stat().st_size for file in Path(str(path)).glob("*.safetensors"))


def chosen_examples(gains: Gains | None, count: int) -> list[tuple[int, str]]:
    """Choose up to `count` examples and say why: in turn a large gain, a large loss, a typical change; none twice."""
    if gains is None:
        return []
    groups = {"a large gain": gains.best, "a large loss": gains.worst, "a typical change": gains.typical}
    chosen: dict[int, str] = {}
    for rank in range(max(map(len, groups.values()))):
        for reason, group in groups.items():
            if rank < len(group):
                chosen.setdefault(group[rank].index, reason)
    return list(chosen.items())[:count]
