"""Load the systems of the report and let them complete the test prompts, each process its share."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.config import EvalConfig
from pipeline.evaluation.decodings import DecodedText, decode_rows, draw_samples
from pipeline.evaluation.divergence import measure_samples, measured_rows
from pipeline.evaluation.predictions import predict
from pipeline.evaluation.system_predictions import KeptPredictions, SystemPredictions
from pipeline.models.config import ModelConfig
from pipeline.models.generation import Decoding, refills_rows
from pipeline.models.loading import load_model, load_policy, load_tokenizer
from pipeline.models.prompt_lengths import check_prompt_lengths
from pipeline.models.prompts import encode_rows
from pipeline.models.sequences import length_sorted_blocks
from pipeline.models.sharding import Sharding
from pipeline.models.slices import slice_here
from pipeline.models.states import check_causal
from pipeline.runtime.distributed import gather_rows, on_main
from pipeline.runtime.memory import BatchSize, free_memory
from pipeline.runtime.messages import say

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Source:
    """Where a system is: a model, or a policy that may be an adapter over `base`, whose tokenizer it then has."""

    name: str
    path: Path | str
    config: ModelConfig
    base: Path | str | None = None

    def load(self, sharding: Sharding | None = None) -> Loaded:
        """Load the model with plain weights, on this process's device, and its tokenizer.

        With `sharding`, which every process has to give, a slice of the model may be there: see `Sharding.place`.
        """
        if self.base is None:
            model, tokenizer = load_model(self.path, self.config), load_tokenizer(self.path, self.config)
        else:
            model = load_policy(self.path, self.base, self.config)
            tokenizer = load_tokenizer(self.base, self.config)
        check_causal(model)
        if sharding is None:
            return model.to(PartialState().device).eval(), tokenizer
        sharding.place(model.eval())
        return model, tokenizer


@dataclass(frozen=True)
class Answering:
    """How the systems answer: decodings and sizes of `settings`, and the seed of samples.

    KL and entropy are measured at `temperature`, which is PPO's. Passes are computed in bfloat16 by autocast where
    `bf16` says so. With `strip_thoughts` the texts do not have a `<think>...</think>` at their start.
    """

    settings: EvalConfig
    seed: int = 0
    temperature: float = 1.0
    bf16: bool = False
    strip_thoughts: bool = False

    def greedy(self) -> Decoding:
        """Return the decoding of one beam, from which the others differ in beams or temperature."""
        settings = self.settings
        return Decoding(
            settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens or 0,
            stop_strings=settings.stop_strings or (),
            suppress_tokens=settings.suppress_tokens or (),
        )


def predict_systems(
    sources: Sequence[Source],
    sft: Source | None,
    rows: Dataset,
    answering: Answering,
    kept: KeptPredictions | None = None,
) -> dict[str, SystemPredictions]:
    """Let every system complete the test prompts; all predictions on every process, by system.

    Besides SFT one system at a time is in memory. Without SFT nothing is compared with it. What is `kept` is not
    written again, and what is written is kept before the next system begins.
    """
    sharding, bf16 = Sharding(), answering.bf16
    predictions = {} if kept is None else on_main(lambda: kept.find([source.name for source in sources]))
    missing = [source for source in sources if source.name not in predictions]
    say(*(f"{name}: {len(rows)} completions are there, written before with the same settings" for name in predictions))
    loaded_sft = sft.load(sharding) if sft is not None and missing else None
    batches = BatchSize(answering.settings.per_device_eval_batch_size)
    for source in missing:
        say(f"{source.name}: writing {len(rows)} completions")
        loaded = loaded_sft if source.name == "sft" else source.load(sharding)
        with torch.autocast(PartialState().device.type, torch.bfloat16, enabled=bf16):
            system = predict_system(source.name, loaded_sft, loaded, rows, answering, batches, sharding.gathered)
        if sharding.roots and loaded is not loaded_sft:
            sharding.remove(loaded[0])
        del loaded
        free_memory()  # before the next is loaded; a sharded model is in a circle of references
        system = system.without_thoughts() if answering.strip_thoughts else system
        predictions[source.name] = system
        if kept is not None:
            on_main(lambda name=source.name, system=system: kept.keep(name, system))
    return {source.name: predictions[source.name] for source in sources}


def predict_system(
    name: str,
    sft: Loaded | None,
    loaded: Loaded,
    rows: Dataset,
    answering: Answering,
    batches: BatchSize,
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> SystemPredictions:
    """Let one system complete the test prompts, in batches of prompts alike in length, and measure samples of it.

    An untrained base writes no other decodings, and no samples for the best of n. Of sharded models every process
    computes in blocks of `gathered()`.
    """
    (model, tokenizer), settings, greedy = loaded, answering.settings, answering.greedy()
    prompts = encode_rows(tokenizer, rows, model.config.is_encoder_decoder)
    check_prompt_lengths(prompts, settings.max_new_tokens, model.config, "eval.max_new_tokens", f"test, for {name},")
    blocks = length_sorted_blocks([len(ids) for ids in prompts], batches.initial)
    blocks = _joined(blocks) if refills_rows(model) else blocks
    reported = replace(greedy, num_beams=settings.num_beams)
    predictions = gather_rows(
        blocks, lambda block: predict(model, tokenizer, rows, block, reported, batches), gathered()
    )
    reference = sft[0] if sft is not None and _same_tokens(loaded, sft) else None
    sampling, measured = replace(greedy, temperature=answering.temperature), rows.select(measured_rows(len(rows)))
    measures = measure_samples(model, tokenizer, measured, sampling, batches, answering.seed, reference, gathered())
    same = name != "sft" and sft is not None and same_weights(model, sft[0])
    if name == "base":
        return SystemPredictions(predictions, measures=measures, same_weights_as_sft=same)

    def with_beams(num_beams: int) -> list[DecodedText]:
        other = replace(greedy, num_beams=num_beams)
        return gather_rows(
            blocks, lambda block: decode_rows(model, tokenizer, rows, block, other, batches), gathered()
        )

    samples: list[DecodedText] = []
    if copies := settings.samples_per_prompt:
        first = rows.select(range(min(settings.sample_prompts, len(rows))))
        drawn = replace(greedy, temperature=settings.sample_temperature)
        samples = draw_samples(model, tokenizer, first, copies, drawn, batches, answering.seed, gathered())
    beams = {number: with_beams(number) for number in settings.beam_sizes}
    return SystemPredictions(predictions, beams, samples, measures, same)


def _joined(blocks: Sequence[list[int]]) -> list[list[int]]:
    """Join the blocks that each process computes in `gather_rows`."""
    count = min(PartialState().num_processes, len(blocks))
    return [[row for block in blocks[process::count] for row in block] for process in range(count)]


def _same_tokens(loaded: Loaded, sft: Loaded) -> bool:
    """Check that two models have the same vocabulary, without which a KL between them means nothing."""
    widths = [model.get_output_embeddings().weight.shape[0] for model, _ in (loaded, sft)]
    return widths[0] == widths[1] and loaded[1].get_vocab() == sft[1].get_vocab()


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Check that two models have the same parameters under the same names, bit for bit; every process calls it."""
    weights, others = dict(model.named_parameters()), dict(other.named_parameters())
    same = weights.keys() == others.keys() and all(
        p.shape == others[name].shape and torch.equal(slice_here(p), slice_here(others[name]))
        for name, p in weights.items()
    )
    return all(gather_object([same])) if isinstance(model, FSDPModule) else same
