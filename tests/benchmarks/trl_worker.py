"""TRL 1.12's PPOTrainer on one specification, in TRL's own environment: `python trl_worker.py SPEC.json`."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from measuring import Phases, wait_for_turn
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    if spec["bf16"]:  # its Accelerator takes the precision from here alone
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    cuda = spec.get("device", "cpu") == "cuda"
    phases, lengths = Phases(torch.cuda.synchronize if cuda else lambda: None), []
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    options = {"attn_implementation": spec["attention"], "dtype": getattr(torch, spec.get("dtype", "float32"))}
    rows = Dataset.from_dict({"input_ids": spec["prompts"]})
    with tempfile.TemporaryDirectory() as directory:
        args = PPOConfig(
            output_dir=directory,
            total_episodes=spec["batch"] * (spec["steps"] + 1),
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["batch"] // spec["micro_batch"],
            local_rollout_forward_batch_size=spec["batch"],
            num_ppo_epochs=spec["epochs"],
            num_mini_batches=1,
            response_length=spec["response_length"],
            stop_token=None if spec["forced"] else "eos",
            temperature=spec["temperature"],
            learning_rate=1e-5,
            bf16=False,
            use_cpu=not cuda,
            gradient_checkpointing=False,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=spec["seed"],
        )
        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(spec["model"], **options),
            ref_model=None,
            reward_model=_tiny_classifier(len(tokenizer), tokenizer.pad_token_id).to("cuda" if cuda else "cpu"),
            value_model=AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(spec["batch"])),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **spec["lora"]),
        )
        _watch(trainer, phases, lengths, tokenizer.pad_token_id)
        wait_for_turn(spec)
        trainer.train()
    used = torch.cuda.max_memory_allocated() if cuda else None
    print(phases.report(spec["batch"], lengths, _versions(), used))


def _tiny_classifier(vocab_size: int, pad: int) -> torch.nn.Module:
    """The reward, which has to be a classifier here: one layer of width 32, so that it costs next to nothing."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=pad,
    )
    return AutoModelForSequenceClassification.from_config(config)


def _watch(trainer: PPOTrainer, phases: Phases, lengths: list[float], pad: int) -> None:
    """Mark the phases: everything between generation and the first training forward is scoring."""
    generate, forward, log, compute = ppo_trainer.batch_generation, trainer.model.forward, trainer.log, {"on": False}

    def generated(*args, **kwargs):
        phases.mark("generate")  # the data loader's part
        result = generate(*args, **kwargs)
        phases.mark("generate")
        lengths.append(float((result[0][:, args[1].shape[1] :] != pad).sum(1).float().mean()))
        compute["on"] = False
        return result

    def trained(*args, **kwargs):
        if not compute["on"]:
            phases.mark("score")
            compute["on"] = True
        return forward(*args, **kwargs)

    def logged(*args, **kwargs):
        phases.mark("update")
        phases.end_step()
        return log(*args, **kwargs)

    ppo_trainer.batch_generation, trainer.model.forward, trainer.log = generated, trained, logged


def _versions() -> dict[str, str]:
    return {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    main()
