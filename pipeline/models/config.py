"""Which model a recipe trains: the `model:` section."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

FROM_SCRATCH_ARCHITECTURES = ("llama", "gpt_neox", "t5", "bart", "whisper")
ENCODER_DECODERS = ("t5", "bart", "whisper")
DTYPES = ("float32", "bfloat16", "float16", "auto")
QUANT_TYPES = ("nf4", "fp4")
# What a chat template gets anyway.
TEMPLATE_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")


@dataclass(frozen=True)
class FromScratchConfig:
    """A small randomly initialised model with a BPE tokenizer trained on the task's own training text.

    `llama` is the modern block (RMSNorm, SwiGLU) and has no dropout; `gpt_neox` has dropout after the embeddings, the
    attention and the feed-forward layer, which a model trained for many epochs on little data needs. `t5` (layer norm
    first, relative positions, ReLU) and `bart` (layer norm last, learned positions, GELU) are encoder-decoders with
    dropout. `whisper` is one that hears speech, for the task `speech`. Sizes are those of `transformers.LlamaConfig`,
    `GPTNeoXConfig`, `T5Config`, `BartConfig` and `WhisperConfig`.
    """

    architecture: str = "llama"  # llama is modern; gpt_neox has dropout; t5, bart and whisper are encoder-decoders
    vocab_size: int = 6000  # of the BPE tokenizer that is trained on the training texts
    hidden_size: int = 256  # width
    intermediate_size: int | None = None  # llama: 8/3 of hidden_size, rounded up to 32; the others: 4 times
    num_hidden_layers: int = 4  # of an encoder-decoder: of its encoder
    num_decoder_layers: int | None = None  # of encoder-decoders: None is as many as num_hidden_layers
    num_attention_heads: int = 4  # hidden_size must be an even multiple of it
    max_position_embeddings: int = 512  # t5 has no such limit: longer texts are cut to it in SFT all the same
    tie_word_embeddings: bool = True  # one matrix for input and output
    dropout: float = 0.0  # not llama; PPO switches it off
    num_mel_bins: int = 80  # whisper: of the features that are made of sound
    max_seconds: int = 30  # whisper: its window; longer clips are left out, and shorter ones padded with silence

    def __post_init__(self) -> None:
        if self.architecture not in FROM_SCRATCH_ARCHITECTURES:
            raise ValueError(
                f"model.from_scratch.architecture: {self.architecture!r} is not one of "
                f"{', '.join(FROM_SCRATCH_ARCHITECTURES)}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.from_scratch.dropout: must be in [0, 1), found {self.dropout}")
        if self.dropout and self.architecture == "llama":
            raise ValueError(
                f"model.from_scratch.dropout: llama has no dropout, found {self.dropout}; use architecture: gpt_neox"
            )
        if self.architecture == "t5" and not self.tie_word_embeddings:
            raise ValueError("model.from_scratch.tie_word_embeddings: a t5 always shares them, found false; use bart")
        if self.num_decoder_layers is not None and not (self.is_encoder_decoder and self.num_decoder_layers > 0):
            raise ValueError(
                "model.from_scratch.num_decoder_layers: must be at least 1, and is for encoder-decoders "
                f"({', '.join(ENCODER_DECODERS)}) alone, found {self.num_decoder_layers} with {self.architecture}"
            )
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.from_scratch.{name}: must be at least 1, found {getattr(self, name)}")
        for name in ("num_mel_bins", "max_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.from_scratch.{name}: must be at least 1, found {getattr(self, name)}")
            if self.architecture != "whisper" and getattr(self, name) != getattr(FromScratchConfig, name):
                raise ValueError(
                    f"model.from_scratch.{name}: it would do nothing: {self.architecture} hears no sound; use whisper"
                )
        if self.architecture == "whisper" and not self.tie_word_embeddings:
            raise ValueError("model.from_scratch.tie_word_embeddings: a whisper always shares them, found false")
        if self.vocab_size < 260:
            raise ValueError(
                f"model.from_scratch.vocab_size: a byte-level tokenizer needs at least 260 entries "
                f"(256 bytes and the special tokens), found {self.vocab_size}"
            )
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"model.from_scratch.num_attention_heads: hidden_size {self.hidden_size} must be an even multiple "
                f"of it, found {self.num_attention_heads}"
            )

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt and a decoder writes the completion."""
        return self.architecture in ENCODER_DECODERS

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers."""
        if self.intermediate_size:
            return self.intermediate_size
        return -(-self.hidden_size * 8 // 3 // 32) * 32 if self.architecture == "llama" else 4 * self.hidden_size


@dataclass(frozen=True)
class ModelConfig:
    """The model every stage shares. Names are those of `trl.ModelConfig`; defaults differ where noted.

    Exactly one of `model_name_or_path` (a directory or Hub id of any causal or encoder-decoder language model) and
    `from_scratch`. `src_lang` and `tgt_lang` are for tokenizers that write language codes (mBART, NLLB, M2M100).
    """

    model_name_or_path: str | None = None  # directory or Hub id of any causal or encoder-decoder model
    from_scratch: FromScratchConfig | None = None  # a small model with random weights instead
    model_revision: str = "main"  # branch, tag or commit of a Hub model
    # of the weights; None: bfloat16 on a GPU where an adapter alone trains, which stays in float32, else float32
    dtype: str | None = None
    attn_implementation: str | None = None  # as in transformers; None: its default
    trust_remote_code: bool = False  # allow code that comes with the model; stands in the record of the run
    src_lang: str | None = None  # of mBART, NLLB and M2M100: the tokenizer's own code, such as en_XX or eng_Latn
    tgt_lang: str | None = None  # the language of the completions, likewise
    chat_template: str | None = None  # a Jinja template, or a file of one beside the recipe; None: the tokenizer's own
    # variables of the chat template, such as {enable_thinking: false}; saved with the model
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    use_peft: bool = True  # TRL: False; one shared base with adapters is what makes PPO small
    lora_r: int = 16  # rank of the adapter
    lora_alpha: int = 32  # its scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # SFT only: PPO runs without dropout, or its first ratio would not be 1
    # TRL: None, which is q and v only for most models; `decoder-linear` is the decoder alone of an encoder-decoder
    lora_target_modules: list[str] | str | None = "all-linear"
    lora_modules_to_save: list[str] | None = None  # modules trained whole beside the adapter
    use_rslora: bool = False  # scale lora_alpha / sqrt(lora_r)
    use_dora: bool = False  # weight-decomposed adapters
    # QLoRA: weights under an adapter that trains are held in 4 bits; what is saved and evaluated never is.
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "nf4"  # of the 4-bit weights
    use_bnb_nested_quant: bool = False  # quantise the scales as well: 0.52 instead of 0.56 bytes a weight

    def in_own_template(self) -> "ModelConfig":
        """Return the same for a model of another kind, which is asked in the chat template of its own tokenizer."""
        return replace(self, chat_template=None, chat_template_kwargs={})

    def revision_of(self, path: object) -> str:
        """Return the revision at which a Hub model is read: `model_revision` is that of the recipe's own model."""
        return self.model_revision if str(path) == self.model_name_or_path else "main"

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.from_scratch is None):
            found = "neither" if self.model_name_or_path is None else "both"
            raise ValueError(f"model: set exactly one of model_name_or_path and from_scratch, found {found}")
        if (self.src_lang is None) != (self.tgt_lang is None):
            missing = "tgt_lang" if self.tgt_lang is None else "src_lang"
            raise ValueError(f"model.{missing}: missing: src_lang and tgt_lang go together")
        for name in self.chat_template_kwargs:
            if not name.isidentifier() or name in TEMPLATE_ARGUMENTS:
                rule = "is set by Relay" if name in TEMPLATE_ARGUMENTS else "is not the name of a variable"
                raise ValueError(f"model.chat_template_kwargs: {name!r} {rule}; name a variable of the template")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"model.dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.bnb_4bit_quant_type not in QUANT_TYPES:
            raise ValueError(
                f"model.bnb_4bit_quant_type: {self.bnb_4bit_quant_type!r} is not one of {', '.join(QUANT_TYPES)}"
            )
        if not self.load_in_4bit and (self.bnb_4bit_quant_type != QUANT_TYPES[0] or self.use_bnb_nested_quant):
            key = "use_bnb_nested_quant" if self.use_bnb_nested_quant else "bnb_4bit_quant_type"
            raise ValueError(f"model.{key}: it would do nothing without model.load_in_4bit: true")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "model.load_in_4bit: needs bitsandbytes, which is not installed; install Relay with its extra "
                "`quantization`, or leave the key out"
            )
        if self.lora_r < 1:
            raise ValueError(f"model.lora_r: must be at least 1, found {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"model.lora_dropout: must be in [0, 1), found {self.lora_dropout}")
