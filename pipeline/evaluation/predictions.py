"""What each system writes for the test prompts, and how likely it finds the references."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import Decoding, eos_token_ids, generate
from pipeline.models.sequences import Sequences, length_sorted_chunks, make_sequences
from pipeline.models.text import decode, encode_completions, encode_prompts


@dataclass(frozen=True)
class Prediction:
    """One test example answered by one system; `completion_ids` end with EOS if `finished`.

    `reference_nats` is the summed cross-entropy of the first reference, over `reference_tokens` tokens (EOS included);
    `kl_to_sft` the sum over the completion's positions of KL(system || SFT), over the whole vocabulary, in nats.
    """

    index: int
    completion: str
    completion_ids: list[int]
    finished: bool
    reference_nats: float
    reference_tokens: int
    kl_to_sft: float | None


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    indices: Sequence[int],
    decoding: Decoding,
    batch_size: int,
    sft: PreTrainedModel | None = None,
) -> list[Prediction]:
    """Answer the prompts of `rows[indices]`. With `sft`, each system's own outputs are also compared with SFT's."""
    part = rows.select(indices)
    prompts = encode_prompts(tokenizer, part["prompt"])
    completions = generate(model, tokenizer, prompts, decoding, batch_size)
    targets = encode_completions(tokenizer, part["prompt"], [references[0] for references in part["references"]])
    pad, device = tokenizer.pad_token_id, model.device
    nats = _token_sums(model, make_sequences(prompts, targets, pad, device), batch_size)
    divergence: list[float | None] = [None] * len(prompts)
    if sft is not None:
        divergence = _token_sums(model, make_sequences(prompts, completions, pad, device), batch_size, sft)
    ends, texts = eos_token_ids(model, tokenizer), decode(tokenizer, completions)
    return [
        Prediction(
            index, texts[i], completions[i], completions[i][-1] in ends, nats[i], len(targets[i]), divergence[i]
        )
        for i, index in enumerate(indices)
    ]


@torch.no_grad()
def _token_sums(
    model: PreTrainedModel, sequences: Sequences, batch_size: int, other: PreTrainedModel | None = None
) -> list[float]:
    """Per row, the sum over completion tokens of -log p(token), or with `other` of KL(model || other), in nats."""
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    for index in length_sorted_chunks(sequences.lengths, batch_size):
        part = sequences.rows(index)
        logprobs = _log_softmax(model, part)
        if other is None:
            values = -logprobs.gather(-1, part.completion_ids.unsqueeze(-1)).squeeze(-1)
        else:
            values = (logprobs.exp() * (logprobs - _log_softmax(other, part))).sum(-1)
        sums[index] = (values * part.completion_mask).double().sum(1).cpu()
    return sums.tolist()


def _log_softmax(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Log-probabilities [B, C, V] of the next token before each completion token."""
    width = sequences.completion_ids.shape[1]
    ids = torch.cat([sequences.prompt_ids, sequences.completion_ids[:, :-1]], dim=1)
    mask = torch.cat([sequences.prompt_mask, sequences.completion_mask[:, :-1]], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        logits_to_keep=width,
        use_cache=False,
    )
    return torch.log_softmax(output.logits[:, -width:].float(), dim=-1)


def cross_entropy(predictions: Sequence[Prediction]) -> tuple[float, float]:
    """Mean cross-entropy of the references in nats per token, and its exponential, the perplexity."""
    tokens = sum(prediction.reference_tokens for prediction in predictions)
    value = sum(prediction.reference_nats for prediction in predictions) / tokens
    return value, math.exp(value)


def save_predictions(
    path: Path, predictions: Sequence[Prediction], rows: Dataset, rewards: dict[str, list[float]], score: list[float]
) -> None:
    """One JSON line per test example: prompt, references, completion, figures, rewards (null where none applies)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, prediction in enumerate(predictions):
            row = rows[prediction.index]
            line = {"prompt": row["prompt"], "references": row["references"], **asdict(prediction)}
            line["score"] = score[i] if score else None
            line["rewards"] = {name: _finite(values[i]) for name, values in rewards.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
