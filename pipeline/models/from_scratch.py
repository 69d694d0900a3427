"""A tokenizer and a small random model made from a task's own text: what a run without a Hub starts from."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from pipeline.models.config import FromScratchConfig
from pipeline.models.loading import language_model_class
from pipeline.models.processors import save_processor
from pipeline.models.speech_from_scratch import speech_config, speech_generation_config, train_speech_tokenizer
from pipeline.runtime.seeds import keep_random_state

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: any text can be written and read back exactly; pad, bos and eos are distinct."""
    tokenizer = Tokenizer(models.BPE())
    # A leading space makes a word at the start of a text the same token as inside it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def build_from_scratch(
    config: FromScratchConfig, texts: Sequence[str], seed: int, directory: Path, languages: Sequence[str] = ()
) -> Path:
    """Train the tokenizer, draw the weights from `seed` and save both as a `from_pretrained` directory, once.

    `languages` are those that a `whisper` is told; none: a model of one language. A directory built from the same
    arguments is left as it is. One process builds, others wait.
    """
    with PartialState().main_process_first():
        digest = _digest(config, texts, seed, languages)
        marker = directory / "stage.json"
        if not marker.is_file() or json.loads(marker.read_text()).get("fingerprint") != digest:
            temporary = directory.with_name(directory.name + ".tmp")
            for stale in (temporary, directory):
                shutil.rmtree(stale, ignore_errors=True)
            _build(config, texts, seed, temporary, languages)
            (temporary / "stage.json").write_text(json.dumps({"stage": "base", "fingerprint": digest}, indent=2))
            temporary.rename(directory)
    return directory


def _digest(config: FromScratchConfig, texts: Iterable[str], seed: int, languages: Sequence[str]) -> str:
    settings = [asdict(config), seed, *([sorted(languages)] if languages else [])]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _build(
    config: FromScratchConfig, texts: Iterable[str], seed: int, directory: Path, languages: Sequence[str]
) -> None:
    is_whisper = config.architecture == "whisper"
    if is_whisper:
        tokenizer = train_speech_tokenizer(texts, config.vocab_size, languages)
        model_config = speech_config(config, tokenizer)
    else:
        tokenizer = train_tokenizer(texts, config.vocab_size)
        model_config = _architecture(config, tokenizer)
        _end_prompts(tokenizer, config.is_encoder_decoder)
    tokenizer.model_max_length = config.max_position_embeddings
    with keep_random_state():
        torch.manual_seed(seed)
        model = language_model_class(model_config).from_config(model_config)
        if config.architecture == "t5":
            # T5's own scale of 1 suits an optimizer that steps in proportion to a weight; Adam would hardly move them.
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.hidden_size**-0.5)
    directory.mkdir(parents=True)
    if is_whisper:
        model.generation_config = speech_generation_config(model_config, tokenizer, languages)
    model.save_pretrained(directory)
    save_processor(tokenizer, model_config, directory)


def _end_prompts(tokenizer: PreTrainedTokenizerFast, is_encoder_decoder: bool) -> None:
    """Let an encoder see where its text ends, as T5's does; a causal model's prompts are padded on the left."""
    if is_encoder_decoder:
        ends = TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)])
        tokenizer.backend_tokenizer.post_processor = ends
    else:
        tokenizer.padding_side = "left"


def _architecture(config: FromScratchConfig, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    shared = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if config.is_encoder_decoder:
        shared["decoder_start_token_id"] = tokenizer.bos_token_id
        return (_t5 if config.architecture == "t5" else _bart)(config, shared)
    shared |= {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
    }
    if config.architecture == "llama":
        return LlamaConfig(num_key_value_heads=config.num_attention_heads, **shared)
    return GPTNeoXConfig(
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        use_parallel_residual=False,  # the parallel form is for speed at scale; a shallow model learns better without
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        **shared,
    )


def _t5(config: FromScratchConfig, shared: dict[str, object]) -> T5Config:
    return T5Config(
        d_model=config.hidden_size,
        d_kv=config.hidden_size // config.num_attention_heads,
        d_ff=config.feed_forward_size,
        num_layers=config.num_hidden_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_attention_heads,
        dropout_rate=config.dropout,
        scale_decoder_outputs=False,  # it belongs to embeddings of T5's own scale
        **shared,
    )


def _bart(config: FromScratchConfig, shared: dict[str, object]) -> BartConfig:
    sizes = {}
    layers = {"encoder": config.num_hidden_layers, "decoder": config.num_decoder_layers or config.num_hidden_layers}
    for side, count in layers.items():
        sizes[f"{side}_layers"] = count
        sizes[f"{side}_attention_heads"] = config.num_attention_heads
        sizes[f"{side}_ffn_dim"] = config.feed_forward_size
    return BartConfig(
        d_model=config.hidden_size,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        max_position_embeddings=config.max_position_embeddings,
        scale_embedding=True,  # else the small embeddings of a new model drown in its positions
        forced_eos_token_id=None,  # BART's own default ends every text at its length limit
        **sizes,
        **shared,
    )
