"""Saves what makes the inputs of a model, so that transformers reads a model's directory by itself."""

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.models.clips import feature_extractor
from pipeline.models.speech import reads_sound


def save_processor(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, directory: str | Path) -> None:
    """Save the tokenizer, and the feature extractor too where the model of this configuration reads sound."""
    tokenizer.save_pretrained(directory)
    if reads_sound(config):
        feature_extractor(config).save_pretrained(directory)
