"""A system from its directory to what it has to say about the test set, each process to its share of it."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.config import EvalConfig
from pipeline.evaluation.predictions import Prediction, predict, share_of_rows
from pipeline.evaluation.sampling import Text, decode_rows, draw_samples
from pipeline.models.config import ModelConfig
from pipeline.models.generation import Decoding
from pipeline.models.loading import load_model, load_policy, load_tokenizer
from pipeline.models.prompt_lengths import check_prompt_lengths
from pipeline.models.text import encode_prompts


@dataclass(frozen=True)
class Source:
    """Where a system is: a model, or a policy that may be an adapter over `base`, which then has the tokenizer."""

    name: str
    path: Path | str
    base: Path | str | None = None

    def load(self, config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model with plain weights, on this process's device, ready to answer; and its tokenizer."""
        model = load_model(self.path, config) if self.base is None else load_policy(self.path, self.base, config)
        tokenizer = load_tokenizer(self.path if self.base is None else self.base, config)
        return model.to(PartialState().device).eval(), tokenizer


@dataclass(frozen=True)
class Answers:
    """What one process wrote for its share of the test prompts as a system: predictions; texts under other numbers of
    beams; samples, each prompt's one after the other; and whether the weights are those of SFT, bit for bit."""

    predictions: list[Prediction]
    beams: dict[int, list[Text]] = field(default_factory=dict)
    samples: list[Text] = field(default_factory=list)
    same_weights_as_sft: bool = False


def answer(
    source: Source,
    sft: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    rows: Dataset,
    settings: EvalConfig,
    seed: int,
) -> Answers:
    """The answers to this process's share of the rows, in whole batches, shortest prompts first.

    An untrained base is not asked for more than its predictions.
    """
    model, tokenizer = loaded
    state, size = PartialState(), settings.per_device_eval_batch_size
    written = Decoding(
        settings.max_new_tokens, min_new_tokens=settings.min_new_tokens or 0, stop_strings=settings.stop_strings or ()
    )
    prompts = encode_prompts(tokenizer, rows["prompt"], model.config.is_encoder_decoder)
    check_prompt_lengths(
        prompts, settings.max_new_tokens, model.config, "eval.max_new_tokens", f"test, for {source.name},"
    )
    lengths = [len(ids) for ids in prompts]
    share = share_of_rows(lengths, size, state.process_index, state.num_processes)
    reference = sft[0] if _same_tokens(loaded, sft) else None
    decoding = replace(written, num_beams=settings.num_beams)
    predictions = predict(model, tokenizer, rows, share, decoding, size, reference)
    beams: dict[int, list[Text]] = {}
    samples: list[Text] = []
    if source.name != "base":
        for beam in settings.beam_sizes:
            beams[beam] = decode_rows(model, tokenizer, rows, share, replace(written, num_beams=beam), size)
        if settings.samples_per_prompt:
            first = rows.select(range(min(settings.sample_prompts, len(rows))))
            samples = draw_samples(
                model,
                tokenizer,
                first,
                settings.samples_per_prompt,
                replace(written, temperature=settings.sample_temperature),
                size,
                seed,
                state.process_index,
                state.num_processes,
            )
    return Answers(
        predictions=predictions,
        beams=beams,
        samples=samples,
        same_weights_as_sft=source.name != "sft" and same_weights(model, sft[0]),
    )


def _same_tokens(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], sft: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> bool:
    """Whether a KL to SFT means something: the same tokens under the same numbers."""
    widths = [model.get_output_embeddings().weight.shape[0] for model, _ in (loaded, sft)]
    return widths[0] == widths[1] and loaded[1].get_vocab() == sft[1].get_vocab()


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models have the same parameters under the same names, bit for bit."""
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    return own.keys() == others.keys() and all(
        p.shape == others[name].shape and torch.equal(p, others[name]) for name, p in own.items()
    )
