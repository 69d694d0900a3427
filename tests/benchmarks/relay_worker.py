"""Our PPOTrainer on one specification: `python relay_worker.py SPEC.json`."""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # as the stages set it

import torch
import transformers
import trl
from datasets import Dataset
from measuring import Phases, wait_for_turn
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from pipeline.rewards import RewardConfig
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer


def parity(prompts: list, completions: list, completion_ids: list, **columns: list) -> list[float]:
    """A reward that costs nothing and differs between completions: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def run(spec: dict) -> str:
    """Train as the specification says; the report of the phases."""
    torch.set_num_threads(spec["threads"])
    phases, lengths = Phases(torch.cuda.synchronize if torch.cuda.is_available() else lambda: None), []
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    seq2seq = AutoConfig.from_pretrained(spec["model"]).is_encoder_decoder
    family = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as directory:
        trainer = PPOTrainer(
            model=family.from_pretrained(
                spec["model"],
                attn_implementation=spec["attention"],
                dtype=getattr(torch, spec.get("dtype", "float32")),
            ),
            args=_settings(spec),
            processing_class=tokenizer,
            reward_funcs=parity,
            train_dataset=Dataset.from_dict({"prompt": tokenizer.batch_decode(spec["prompts"])}),
            peft_config=LoraConfig(**{"target_modules": "all-linear", **spec["lora"]}),
            output_dir=directory,
            seed=spec["seed"],
        )
        trainer._prompt_ids = spec["prompts"]  # the very tokens that TRL gets
        _watch(trainer, phases, lengths, spec["forced"])
        wait_for_turn(spec)
        for _ in range(spec["steps"] + 1):
            rollout = trainer.collect_rollout(trainer.prompt_rows(trainer.state.step))
            trainer.update(trainer.compute_advantages(rollout)[0])
            phases.end_step()
            trainer.state = replace(trainer.state, step=trainer.state.step + 1)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return phases.report(spec["batch"], lengths, versions, used)


def _settings(spec: dict) -> PPOConfig:
    is_grouped = spec.get("generations", 1) > 1
    return PPOConfig(
        rewards=(RewardConfig("constant"),),
        total_episodes=spec["batch"] * (spec["steps"] + 1),
        per_device_train_batch_size=spec["micro_batch"],
        gradient_accumulation_steps=spec["batch"] // spec["micro_batch"],
        local_rollout_forward_batch_size=spec["batch"],
        num_ppo_epochs=spec["epochs"],
        num_generations=spec.get("generations", 1),
        group_baseline=is_grouped,
        response_length=spec["response_length"],
        temperature=spec["temperature"],
        learning_rate=1e-5,
        value_learning_rate=None if is_grouped else 1e-5,
        lam=0.95,
        score_scaling="none",
        missing_eos_penalty=None,
        dual_clip=None,
        bf16=spec["bf16"],
    )


def _watch(trainer: PPOTrainer, phases: Phases, lengths: list[float], forced: bool) -> None:
    """Mark the phases; with `forced` no completion ends before the limit, as in TRL without a stop token."""
    generate = trainer.writer.generate

    def generated(prompts: list, decoding):
        if forced:
            decoding = replace(decoding, min_new_tokens=decoding.max_new_tokens)
        completions = generate(prompts, decoding)
        lengths.append(sum(map(len, completions)) / len(completions))
        return completions

    trainer.writer.generate = phases.around(generated, "generate", "generate")
    trainer.compute_advantages = phases.around(trainer.compute_advantages, "score", "score")
    trainer.update = phases.around(trainer.update, "score", "update")


if __name__ == "__main__":
    print(run(json.loads(Path(sys.argv[1]).read_text())))
