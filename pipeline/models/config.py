"""Which model a recipe trains: the `model:` section."""

from dataclasses import dataclass

FROM_SCRATCH_ARCHITECTURES = ("llama", "gpt_neox")
DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class FromScratchConfig:
    """A small randomly initialised model with a BPE tokenizer trained on the task's own training text.

    `llama` is the modern block (RMSNorm, SwiGLU) and has no dropout; `gpt_neox` has dropout after the embeddings, the
    attention and the feed-forward layer, which a model trained for many epochs on little data needs. Sizes are those
    of `transformers.LlamaConfig` and `transformers.GPTNeoXConfig`.
    """

    architecture: str = "llama"
    vocab_size: int = 6000
    hidden_size: int = 256
    intermediate_size: int | None = None  # llama: 8/3 of hidden_size, rounded up to 32; gpt_neox: 4 times
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True
    dropout: float = 0.0  # gpt_neox only; PPO switches it off

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
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.from_scratch.{name}: must be at least 1, found {getattr(self, name)}")
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
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers."""
        if self.intermediate_size:
            return self.intermediate_size
        return 4 * self.hidden_size if self.architecture == "gpt_neox" else -(-self.hidden_size * 8 // 3 // 32) * 32


@dataclass(frozen=True)
class ModelConfig:
    """The model every stage shares. Names are those of `trl.ModelConfig`; defaults differ where noted.

    Exactly one of `model_name_or_path` (a directory or Hub id of any causal language model) and `from_scratch`.
    """

    model_name_or_path: str | None = None
    from_scratch: FromScratchConfig | None = None
    model_revision: str = "main"
    dtype: str = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    use_peft: bool = True  # TRL: False. One shared base with adapters is what makes PPO small.
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05  # SFT only: PPO runs without dropout, or its first ratio would not be 1
    lora_target_modules: list[str] | str | None = "all-linear"  # TRL: None, which is q and v only for most models
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.from_scratch is None):
            found = "neither" if self.model_name_or_path is None else "both"
            raise ValueError(f"model: set exactly one of model_name_or_path and from_scratch, found {found}")
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.lora_r < 1:
            raise ValueError(f"model.lora_r: must be at least 1, found {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"model.lora_dropout: must be in [0, 1), found {self.lora_dropout}")
