"""A small Whisper from scratch: its tokenizer with the given tokens, its configuration and what it never writes."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    WhisperConfig,
)

from pipeline.models.config import FromScratchConfig
from pipeline.models.speech import (
    NO_TIMESTAMPS,
    POSITIONS_PER_SECOND,
    START,
    TRANSCRIBE,
    language_token,
)

END = "<|endoftext|>"
SPACE = "Ġ"  # what byte-level tokenizers write for a space


def train_speech_tokenizer(texts: Iterable[str], vocab_size: int, languages: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE over `texts`, with Whisper's special tokens; one of each of the `languages`.

    Without languages the model is of one language, which it is not told. The end token serves as padding.
    """
    told = [*map(language_token, sorted(languages)), TRANSCRIBE] if languages else []
    special = [END, START, *told, NO_TIMESTAMPS]
    tokenizer = Tokenizer(models.BPE())
    # A leading space makes a word at the start of a text the same token as inside it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": END}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special[1:], **names)
    numbers = [(token, wrapped.convert_tokens_to_ids(token)) for token in (START, NO_TIMESTAMPS, END)]
    ends = TemplateProcessing(single=f"{START} {NO_TIMESTAMPS} $A {END}", special_tokens=numbers)
    wrapped.backend_tokenizer.post_processor = ends
    return wrapped


def speech_config(config: FromScratchConfig, tokenizer: PreTrainedTokenizerBase) -> WhisperConfig:
    """Describe a Whisper of the sizes of a recipe."""
    sizes = {}
    layers = {"encoder": config.num_hidden_layers, "decoder": config.num_decoder_layers or config.num_hidden_layers}
    for side, count in layers.items():
        sizes[f"{side}_layers"] = count
        sizes[f"{side}_attention_heads"] = config.num_attention_heads
        sizes[f"{side}_ffn_dim"] = config.feed_forward_size
    return WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=config.hidden_size,
        num_mel_bins=config.num_mel_bins,
        max_source_positions=POSITIONS_PER_SECOND * config.max_seconds,
        max_target_positions=config.max_position_embeddings,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        begin_suppress_tokens=None,  # they stand in the generation config
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(START),
        **sizes,
    )


def speech_generation_config(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, languages: Sequence[str]
) -> GenerationConfig:
    """Forbid what Whisper's do: special tokens other than the end, and an end or a space alone at the beginning."""
    special = [number for number in tokenizer.all_special_ids if number != tokenizer.eos_token_id]
    told = {}
    if languages:  # what `generate(language=...)` of transformers reads
        told["lang_to_id"] = {
            token: tokenizer.convert_tokens_to_ids(token) for token in map(language_token, languages)
        }
        told["task_to_id"] = {"transcribe": tokenizer.convert_tokens_to_ids(TRANSCRIBE)}
    return GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        suppress_tokens=sorted(special),
        begin_suppress_tokens=[tokenizer.convert_tokens_to_ids(SPACE), tokenizer.eos_token_id],
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids(NO_TIMESTAMPS),
        is_multilingual=bool(languages),
        **told,
    )
