"""A sequence classifier as a reward: any model with one output, reading texts by its own tokenizer and template."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pipeline.models.config import ModelConfig
from pipeline.models.hub import pinned_revision, read_config, read_tokenizer, unreadable
from pipeline.models.loading import position_limit
from pipeline.models.reward_model import RECORD_FILE
from pipeline.models.sequences import length_sorted_chunks
from pipeline.models.text import plain_text, render_chat
from pipeline.models.weights import check_loaded_weights, empty_model
from pipeline.rewards.metric import text_of


class ClassifierReward:
    """The score of a sequence classifier with one output, which reads texts by its own tokenizer and template.

    What it reads: `template` with `{prompt}` and `{completion}` filled in; without one the tokenizer's chat template;
    without that, prompt and completion as a pair of texts where the tokenizer has a separator, else one after the
    other.
    """

    def __init__(self, path: str, config: ModelConfig, template: str | None = None, batch_size: int = 32) -> None:
        check_classifier(path, config)
        self.path, self.template, self.batch_size = path, template, batch_size
        source = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
        trust = config.trust_remote_code
        self.tokenizer = read_tokenizer(source, trust_remote_code=trust)
        try:
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                source,
                revision=pinned_revision(source),
                dtype=torch.float32,
                trust_remote_code=trust,
                ignore_mismatched_sizes=True,  # refused below, in one sentence
                output_loading_info=True,
            )
        except (pickle.UnpicklingError, SafetensorError) as error:
            raise unreadable(source, "weights", "weight files", error) from error
        check_loaded_weights(self.model.eval(), source, info)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.shift, self.scale = 0.0, 1.0

    def to(self, device: torch.device) -> "ClassifierReward":
        """Move the classifier."""
        self.model.to(device)
        return self

    def calibrate(self, shift: float, scale: float) -> "ClassifierReward":
        """Score `(raw - shift) / scale` from now on."""
        self.shift, self.scale = shift, scale
        return self

    def __call__(self, prompts: list, completions: list, **columns: list) -> list[float]:
        """One score for each completion."""
        return ((self.raw_scores(prompts, completions) - self.shift) / self.scale).tolist()

    @torch.no_grad()
    def raw_scores(self, prompts: list, completions: list) -> Tensor:
        """The classifier's outputs [B], on the CPU in float32.

        Raises:
            ValueError: a text is longer than the classifier can read.
        """
        encoded = [self._encode(p, text_of(c)) for p, c in zip(prompts, completions, strict=True)]
        limit = position_limit(self.model.config)
        longest = max(map(len, encoded))
        if limit is not None and longest > limit:
            raise ValueError(
                f"ppo.reward_model_path: a prompt and its completion are {longest} tokens for the classifier "
                f"{self.path!r}, which reads {limit}; shorten the prompts or lower ppo.response_length"
            )
        scores = torch.zeros(len(encoded))
        for index in length_sorted_chunks(torch.tensor([len(ids) for ids in encoded]), self.batch_size):
            rows = [encoded[r] for r in index.tolist()]
            batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
            scores[index] = self.model(**batch).logits.squeeze(-1).float().cpu()
        return scores

    def _encode(self, prompt: str | list, text: str) -> list[int]:
        tokenizer = self.tokenizer
        plain = plain_text(prompt)
        if self.template is not None:
            return tokenizer(self.template.format(prompt=plain, completion=text))["input_ids"]
        if tokenizer.chat_template is not None:
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            messages = [*messages, {"role": "assistant", "content": text}]
            return tokenizer(render_chat(tokenizer, messages), add_special_tokens=False)["input_ids"]
        if tokenizer.sep_token is not None:
            return tokenizer(plain, text)["input_ids"]
        return tokenizer(plain + text)["input_ids"]


def check_classifier(path: str, config: ModelConfig, key: str = "ppo.reward_model_path") -> None:
    """Refuse what is no reward model, by its configuration and the headers of its weight files alone.

    Raises:
        ValueError: an adapter without a record, an encoder-decoder or language model, more than one label, or weights
            that are missing.
    """
    directory = Path(path).expanduser()
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{key}: {path!r} is an adapter without {RECORD_FILE}, so no reward stage has finished there")
    source = str(directory) if directory.is_dir() else path
    loaded = read_config(source, trust_remote_code=config.trust_remote_code)
    kinds = loaded.architectures or []
    if not any("SequenceClassification" in kind or "RewardModel" in kind for kind in kinds):
        raise ValueError(
            f"{key}: {path!r} is no sequence classifier ({', '.join(kinds) or loaded.model_type}); give one with a "
            "single output, or the reward folder of a run"
        )
    if loaded.num_labels != 1:
        names = ", ".join(map(str, loaded.id2label.values()))
        raise ValueError(
            f"{key}: the classifier {path!r} has {loaded.num_labels} labels ({names}), and a reward is one number: "
            "give a model with num_labels: 1"
        )
    if "auto_map" not in loaded.to_dict():
        try:
            empty_model(AutoModelForSequenceClassification, source, loaded, pinned_revision(source))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
