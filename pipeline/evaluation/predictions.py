"""What a system writes for the test prompts, and how likely it finds the references."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import Decoding, finished, generate
from pipeline.models.likelihood import completion_logprobs
from pipeline.models.prompt_lengths import truncate_prompts
from pipeline.models.prompts import encode_rows
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.text import decode, encode_completions
from pipeline.runtime.devices import in_float64
from pipeline.runtime.memory import BatchSize


@dataclass(frozen=True)
class Prediction:
    """One system's completion of one test prompt; `completion_ids` end with EOS if `finished`.

    `reference_nats` is the summed cross-entropy of the first reference, over `reference_tokens` tokens (EOS included).
    """

    index: int
    completion: str
    completion_ids: list[int]
    finished: bool
    reference_nats: float
    reference_tokens: int


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    indices: Sequence[int],
    decoding: Decoding,
    batches: BatchSize,
) -> list[Prediction]:
    """Complete the prompts of `rows[indices]`, and compute how likely the model finds the references.

    References are truncated to the model's context length. They are read in blocks of the initial batch size.
    """
    chosen = rows.select(indices)
    prompts = encode_rows(tokenizer, chosen, model.config.is_encoder_decoder)
    completions = batches.run(lambda size: generate(model, tokenizer, prompts, decoding, size))
    targets = encode_completions(tokenizer, chosen["prompt"], [references[0] for references in chosen["references"]])
    targets, _ = truncate_prompts(prompts, targets, model.config)
    nats: list[float] = []
    for start in range(0, len(prompts), batches.initial):
        block = slice(start, start + batches.initial)
        sequences = make_sequences(prompts[block], targets[block], tokenizer.pad_token_id, model.device)
        nats += batches.run(partial(reference_nats, model, sequences))
    ended, texts = finished(model, tokenizer, completions, decoding), decode(tokenizer, completions)
    return [
        Prediction(
            index=index,
            completion=texts[i],
            completion_ids=completions[i],
            finished=ended[i],
            reference_nats=nats[i],
            reference_tokens=len(targets[i]),
        )
        for i, index in enumerate(indices)
    ]


def reference_nats(model: PreTrainedModel, sequences: Sequences, size: int) -> list[float]:
    """Sum -log p(token), in nats, over the completion tokens of each row; `size` rows are read at once."""
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    for index in sequences.chunks(size):
        sums[index.cpu()] = -in_float64(completion_logprobs(model, sequences.rows(index))).sum(1).cpu()
    return sums.tolist()


def cross_entropy(predictions: Sequence[Prediction]) -> tuple[float, float]:
    """Compute the mean cross-entropy of the references, in nats per token, and its exponential, the perplexity."""
    tokens = sum(prediction.reference_tokens for prediction in predictions)
    value = sum(prediction.reference_nats for prediction in predictions) / tokens
    return value, math.exp(value)


def save_predictions(
    path: Path,
    predictions: Sequence[Prediction],
    rows: Dataset,
    rewards: Mapping[str, Sequence[float]],
    score: Sequence[float],
    metrics: Mapping[str, Sequence[float]],
    clusters: Sequence[int] = (),
) -> None:
    """Write a JSON line for each test example: prompt, references, completion, figures, rewards, sentence scores.

    A reward that does not apply is null. The number of the example's cluster is there where `clusters` are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, prediction in enumerate(predictions):
            row = rows[prediction.index]
            line = {"prompt": row["prompt"], "references": row["references"], **asdict(prediction)}
            line["score"] = score[i] if score else None
            line["rewards"] = {name: _finite(values[i]) for name, values in rewards.items()}
            line["metrics"] = {name: values[i] for name, values in metrics.items()}
            line |= {"cluster": clusters[i]} if clusters else {}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
