"""A few examples token by token: what RL made likelier, where it looks in the prompt, what the critic expects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.gains import Gains
from pipeline.evaluation.predictions import log_softmax
from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.sequences import make_sequences
from pipeline.models.states import completion_states
from pipeline.models.text import encode_completions, encode_prompts

MAX_TOKENS = 200  # of a completion that is shown token by token
MAX_CELLS = 4000  # of a heat map: prompt tokens times completion tokens

# Row, values [C], log-probs [1, C] under PPO and under SFT -> the advantage of each token; empty without rewards.
Advantages = Callable[[int, Tensor, Tensor, Tensor], list[float]]


@dataclass(frozen=True)
class Token:
    """A token of a passage and its log-probability (nats) under SFT and under PPO."""

    text: str
    sft: float
    ppo: float

    @property
    def change(self) -> float:
        """How much likelier PPO made it, in nats."""
        return self.ppo - self.sft


@dataclass(frozen=True)
class Passage:
    """A completion of the example's prompt: whose it is, and its tokens."""

    title: str
    tokens: list[Token]


@dataclass(frozen=True)
class Attention:
    """How much each token of PPO's completion looks at each prompt token: `weights [C, P]`, over layers and heads."""

    prompt: list[str]
    completion: list[str]
    weights: list[list[float]]


@dataclass(frozen=True)
class Credit:
    """The critic's value before each token of a completion, and the token's advantage; both in reward."""

    tokens: list[str]
    values: list[float]
    advantages: list[float]


@dataclass(frozen=True)
class Inspection:
    """One test example: why it was chosen, and what can be seen in it."""

    index: int
    reason: str
    prompt: str
    passages: list[Passage] = field(default_factory=list)
    attention: Attention | None = None
    credit: Credit | None = None


def token_logprobs(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]], pad_id: int
) -> list[list[float]]:
    """The log-probability in nats of each completion token, one list for each of the few completions."""
    sequences = make_sequences(prompts, completions, pad_id, model.device)
    with torch.no_grad():
        logprobs = log_softmax(model, sequences)
    chosen = logprobs.gather(-1, sequences.completion_ids.unsqueeze(-1)).squeeze(-1).tolist()
    return [row[: len(ids)] for row, ids in zip(chosen, completions, strict=True)]


def compare_passage(
    title: str,
    prompt: list[int],
    completion: list[int],
    sft: PreTrainedModel,
    ppo: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Passage:
    """One completion's tokens under both models."""
    before, after = (token_logprobs(model, [prompt], [completion], tokenizer.pad_token_id)[0] for model in (sft, ppo))
    texts = token_texts(tokenizer, completion)
    return Passage(title, [Token(*token) for token in zip(texts, before, after, strict=True)])


@torch.no_grad()
def attention_to_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]
) -> Attention | None:
    """Row t is where the model looks as it writes token t, the mean over layers and heads; None where it cannot say.

    An encoder-decoder looks by its cross-attention, whose weights on the prompt sum to 1. Only eager attention gives
    its weights, so the model is left with it.
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


@torch.no_grad()
def token_values(
    model: PreTrainedModel, pad_id: int, head_file: Path, prompt: list[int], completion: list[int]
) -> Tensor | None:
    """The critic's value [C] before each completion token; None where the head beside the policy does not fit it."""
    if not head_file.is_file():
        return None
    head = load_file(str(head_file))
    if head.keys() != {"weight", "bias"}:
        return None
    states = completion_states(model, make_sequences([prompt], [completion], pad_id, model.device))[0]
    if states.shape[1] != head["weight"].shape[1]:
        return None
    weight, bias = head["weight"].float().to(states.device), head["bias"].float().to(states.device)
    return (states.float() @ weight.T + bias).squeeze(-1).cpu()


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as text, white space that a reader could not see made visible."""
    texts = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text.replace("\n", "⏎").replace("\t", "⇥") for text in texts]


def inspect_examples(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    chosen: Sequence[tuple[int, str]],
    written: tuple[Sequence[list[int]], Sequence[list[int]]],
    value_head: Path,
    advantages: Advantages,
) -> list[Inspection]:
    """The chosen rows (number, reason) token by token under `models` SFT and PPO, which have `written` these ids."""
    sft, ppo = models
    found = []
    for index, reason in chosen:
        row = rows[index]
        prompt = encode_prompts(tokenizer, [row["prompt"]], sft.config.is_encoder_decoder)[0]
        reference = encode_completions(tokenizer, [row["prompt"]], [row["references"][0]])[0]
        before, after = (ids[index][:MAX_TOKENS] for ids in written)
        shown = {"reference": reference[:MAX_TOKENS], "SFT's completion": before, "PPO's completion": after}
        passages = [compare_passage(title, prompt, ids, sft, ppo, tokenizer) for title, ids in shown.items()]
        credit, values = None, token_values(ppo, tokenizer.pad_token_id, value_head, prompt, after)
        if values is not None and len(after) == len(written[1][index]):
            under = [torch.tensor([[getattr(t, name) for t in passages[2].tokens]]) for name in ("ppo", "sft")]
            found_advantages = advantages(index, values, *under)
            if found_advantages:
                credit = Credit(token_texts(tokenizer, after), values.tolist(), found_advantages)
        small = len(prompt) * len(after) <= MAX_CELLS
        attention = attention_to_prompt(ppo, tokenizer, prompt, after) if small else None
        text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        found.append(Inspection(index, reason, text, passages, attention, credit))
    return found


def chosen_examples(gains: Gains | None, count: int) -> list[tuple[int, str]]:
    """Up to `count` examples and why: a large gain, a large loss and a typical change in turn, none twice."""
    if gains is None:
        return []
    groups = {"a large gain": gains.best, "a large loss": gains.worst, "a typical change": gains.typical}
    chosen: dict[int, str] = {}
    for place in range(max(map(len, groups.values()))):
        for reason, group in groups.items():
            if place < len(group):
                chosen.setdefault(group[place].index, reason)
    return list(chosen.items())[:count]
