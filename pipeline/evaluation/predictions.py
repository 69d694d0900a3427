"""What a system writes for the test prompts, and how likely it finds that and the references."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.generation import Decoding, finished, generate
from pipeline.models.prompt_lengths import truncate_prompts
from pipeline.models.sequences import Sequences, length_sorted_chunks, make_sequences
from pipeline.models.text import decode, encode_completions, encode_prompts
from pipeline.runtime.devices import in_float64


@dataclass(frozen=True)
class Prediction:
    """One system's completion of one test prompt; `completion_ids` end with EOS if `finished`.

    `reference_nats` is the summed cross-entropy of the first reference, over `reference_tokens` tokens (EOS included);
    `entropy` and `kl_to_sft` the sums over the completion's positions of the system's entropy and of
    KL(system || SFT), over the whole vocabulary, in nats.
    """

    index: int
    completion: str
    completion_ids: list[int]
    finished: bool
    reference_nats: float
    reference_tokens: int
    entropy: float
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
    """Complete the prompts of `rows[indices]`, and compute how likely the model finds completions and references.

    With `sft`, the KL to the SFT model is computed as well. References are truncated to the model's context length.
    """
    chosen = rows.select(indices)
    prompts = encode_prompts(tokenizer, chosen["prompt"], model.config.is_encoder_decoder)
    completions = generate(model, tokenizer, prompts, decoding, batch_size)
    targets = encode_completions(tokenizer, chosen["prompt"], [references[0] for references in chosen["references"]])
    targets, _ = truncate_prompts(prompts, targets, model.config)
    pad, device = tokenizer.pad_token_id, model.device
    chunks = length_sorted_chunks(torch.tensor([len(prompt) for prompt in prompts]), batch_size)
    nats = reference_nats(model, make_sequences(prompts, targets, pad, device), chunks)
    written = make_sequences(prompts, completions, pad, device)
    entropies, divergence = _entropy_and_divergence(model, written, chunks, sft)
    ended, texts = finished(model, tokenizer, completions, decoding), decode(tokenizer, completions)
    return [
        Prediction(
            index=index,
            completion=texts[i],
            completion_ids=completions[i],
            finished=ended[i],
            reference_nats=nats[i],
            reference_tokens=len(targets[i]),
            entropy=entropies[i],
            kl_to_sft=divergence[i] if sft is not None else None,
        )
        for i, index in enumerate(indices)
    ]


def length_sorted_blocks(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split the rows into batches of prompts alike in length, the same for any number of processes."""
    return [chunk.tolist() for chunk in length_sorted_chunks(torch.tensor(lengths), batch_size)]


@torch.no_grad()
def reference_nats(model: PreTrainedModel, sequences: Sequences, chunks: Sequence[Tensor]) -> list[float]:
    """Sum -log p(token), in nats, over the completion tokens of each row; `chunks` are the batches, row numbers."""
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    for index in chunks:
        batch = sequences.rows(index)
        logprobs = log_softmax(model, batch).gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)
        sums[index] = -in_float64(logprobs * batch.completion_mask).sum(1).cpu()
    return sums.tolist()


@torch.no_grad()
def _entropy_and_divergence(
    model: PreTrainedModel, sequences: Sequences, chunks: Sequence[Tensor], sft: PreTrainedModel | None
) -> tuple[list[float], list[float]]:
    """Sum the entropy and KL(model || sft), in nats (0 without `sft`), over the completion positions of each row."""
    sums = torch.zeros(2, len(sequences), dtype=torch.float64)
    for index in chunks:
        batch = sequences.rows(index)
        logprobs = log_softmax(model, batch)
        probabilities, mask = logprobs.exp(), batch.completion_mask
        sums[0, index] = -in_float64((probabilities * logprobs).sum(-1) * mask).sum(1).cpu()
        if sft is not None and sft is not model:
            kl = (probabilities * (logprobs - log_softmax(sft, batch))).sum(-1)
            sums[1, index] = in_float64(kl * mask).sum(1).cpu()
    return sums[0].tolist(), sums[1].tolist()


def log_softmax(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Compute the log-probabilities [B, C, V] of every token of the vocabulary at each completion position."""
    width = sequences.completion_ids.shape[1]
    if model.config.is_encoder_decoder:
        ids, mask = sequences.encoder_inputs()
        given = torch.tensor(decoder_prefix(model), device=ids.device).expand(len(ids), -1)
        read = torch.cat([given, sequences.completion_ids[:, :-1]], dim=1)
        output = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=read, use_cache=False)
        return torch.log_softmax(output.logits[:, -width:].float(), dim=-1)
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
) -> None:
    """Write a JSON line for each test example: prompt, references, completion, figures, rewards, sentence scores.

    A reward that does not apply is null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, prediction in enumerate(predictions):
            row = rows[prediction.index]
            line = {"prompt": row["prompt"], "references": row["references"], **asdict(prediction)}
            line["score"] = score[i] if score else None
            line["rewards"] = {name: _finite(values[i]) for name, values in rewards.items()}
            line["metrics"] = {name: values[i] for name, values in metrics.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
