"""Train a reward adapter and its head over the SFT model, and save them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.reward_model import RewardNetwork, RewardRecord, tokenizer_digest, weights_digest
from pipeline.models.text import encode_prompts
from pipeline.rewards.learned import score_token_ids
from pipeline.rewards.pairs import Pair
from pipeline.rewards.raw_scores import UncalibratedReward
from pipeline.runtime.memory import BatchSize
from pipeline.runtime.signals import stop_signals
from pipeline.trainers.huggingface.resumable import last_checkpoint
from pipeline.trainers.huggingface.reward import build_reward_trainer, reward_arguments, save_network


def train_reward_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    lora: LoraConfig,
    arguments: Mapping[str, Any],
    directory: Path,
    seed: int,
    batch_size: int,
) -> UncalibratedReward:
    """Train on the pairs, from the last checkpoint if there is one, and save adapter, head and tokenizer.

    `arguments` are the `reward:` section's for `trl.RewardConfig`; `batch_size` texts are scored at once afterwards.
    """
    digests = {"base_digest": weights_digest(model), "tokenizer_digest": tokenizer_digest(tokenizer)}
    args = reward_arguments(arguments, directory, seed)
    trainer = build_reward_trainer(model, args, tokenizer, pairs, lora, directory / "metrics.jsonl")
    with stop_signals():
        result = trainer.train(resume_from_checkpoint=last_checkpoint(args))
    network: RewardNetwork = trainer.accelerator.unwrap_model(trainer.model).eval()
    save_network(network, directory)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(directory)
    trainer.accelerator.wait_for_everyone()
    device, encoder_decoder = trainer.accelerator.device, model.config.is_encoder_decoder

    batches = BatchSize(batch_size)

    def scorer(prompts: list, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Tensor:
        prompt_ids = encode_prompts(tokenizer, prompts, encoder_decoder)
        return score_token_ids(prompt_ids, ids, tokenizer, network.scores, device, batches)

    summary = {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "mixed_precision": trainer.accelerator.mixed_precision,
    }
    record = RewardRecord("adapter", model.config.name_or_path, 0.0, 1.0, None, 0, **digests)
    return UncalibratedReward(record, scorer, summary, trainer.sharding.gathered)
