"""One side of `gpu.py` in a process of its own: `python gpu_worker.py SIDE SPEC.json`; prints one JSON line."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from measuring import Phases, wait_for_turn
from peft import LoraConfig, get_peft_model
from relay_worker import parity
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, TrainerCallback

VERSIONS = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


def wait() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def used() -> int | None:
    """Bytes of the accelerator at its highest."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def load(spec: dict) -> PreTrainedModel:
    """The model without an adapter, on the device."""
    options = {"attn_implementation": spec["attention"], "dtype": getattr(torch, spec["dtype"])}
    return AutoModelForCausalLM.from_pretrained(spec["model"], **options).to(spec["device"])


def lora(spec: dict) -> LoraConfig:
    """The adapter of every side."""
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **spec["lora"])


def trl_rloo(spec: dict) -> dict:
    """TRL's RLOOTrainer; with `continuous`, by transformers' continuous batching."""
    phases, lengths, continuous = Phases(wait), [], spec.get("continuous", False)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    with tempfile.TemporaryDirectory() as directory:
        args = trl.RLOOConfig(
            output_dir=directory,
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["batch"] // spec["micro_batch"],
            num_generations=spec["generations"],
            num_iterations=spec["epochs"],
            max_completion_length=spec["response_length"],
            temperature=spec["temperature"],
            learning_rate=1e-5,
            bf16=spec["bf16"],
            use_cpu=spec["device"] == "cpu",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=spec["seed"],
            max_steps=spec["epochs"] * (spec["steps"] + 1),
            logging_steps=10**6,
            use_transformers_continuous_batching=continuous,
            model_init_kwargs={"dtype": spec["dtype"], "attn_implementation": spec["attention"]},
            generation_kwargs=None if continuous else {"min_new_tokens": spec["response_length"]},
        )
        trainer = trl.RLOOTrainer(
            model=spec["model"],
            reward_funcs=parity,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": tokenizer.batch_decode(spec["prompts"])}),
            processing_class=tokenizer,
            peft_config=lora(spec),
        )
        generate, score = trainer._generate_single_turn, trainer._generate_and_score_completions

        def scored(*args, **kwargs):
            phases.mark("update")
            if lengths:
                phases.end_step()
            result = score(*args, **kwargs)
            lengths.append(float(result["completion_mask"].sum(1).float().mean()))
            phases.mark("score")
            return result

        trainer._generate_single_turn = phases.around(generate, "score", "generate")
        trainer._generate_and_score_completions = scored
        wait_for_turn(spec)
        trainer.train()
        phases.mark("update")
        phases.end_step()
    return json.loads(phases.report(spec["batch"], lengths, VERSIONS, used()))


def generation(spec: dict) -> dict:
    """Tokens a second of ways to write the same number of tokens, with the adapter unmerged."""
    from pipeline.models import generation
    from pipeline.models.adapters import fuse_adapter
    from pipeline.models.generation import Decoding, generate
    from pipeline.models.kernels.packing import enable_packing

    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    model, length = load(spec).eval(), spec["response_length"]
    prompts = spec["prompts"][: spec["batch"]]
    settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_k": 0}
    config = GenerationConfig(**settings, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    ids = torch.tensor(prompts, device=model.device)

    def library() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    def relay(devices: set[str]) -> Callable[[], object]:
        def write() -> None:
            with patch.object(generation, "STATIC_DEVICES", devices):
                generate(model, tokenizer, prompts, Decoding(length, 1.0, min_new_tokens=length), len(prompts))

        return write

    wait_for_turn(spec)
    ways = {"transformers generate, no adapter": library, "static shapes, no adapter": relay({spec["device"]})}
    speeds = {name: _tokens_a_second(write, spec) for name, write in ways.items()}
    enable_packing(model)
    fuse_adapter(get_peft_model(model, lora(spec)))
    for name, devices in (("decode loop", set()), ("static shapes", {spec["device"]})):
        speeds[name] = _tokens_a_second(relay(devices), spec)
    return {"tokens_a_second": speeds, "memory": used(), "versions": VERSIONS}


def _tokens_a_second(write: Callable[[], None], spec: dict) -> float:
    device, autocast = spec["device"], spec["bf16"]
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        write()  # warms up, and captures
        wait()
        start = time.perf_counter()
        for _ in range(spec["steps"]):
            write()
        wait()
    return spec["steps"] * spec["batch"] * spec["response_length"] / (time.perf_counter() - start)


def _sft_rows(spec: dict) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    texts = tokenizer.batch_decode([row[: spec["sft_tokens"] // 2] for row in spec["prompts"]])
    return Dataset.from_dict({"prompt": texts, "completion": texts})


class Clock(TrainerCallback):
    """The time after each optimizer step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        wait()
        self.marks.append(time.perf_counter())

    def report(self, spec: dict) -> dict:
        seconds = [later - earlier for earlier, later in pairwise(self.marks)]
        tokens = spec["sft_batch"] * spec["sft_tokens"] * len(seconds) / sum(seconds)
        return {"wall": seconds, "tokens_a_second": tokens, "memory": used(), "versions": VERSIONS}


def _sft_settings(spec: dict) -> dict:
    settings = {"max_steps": spec["sft_steps"] + 2, "gradient_checkpointing": False, "bf16": spec["bf16"]}
    return settings | {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 10**6, "learning_rate": 1e-4}


def sft(spec: dict) -> dict:
    """Relay's SFT, as its stage builds it; two micro-batches are asked for, which one accelerator computes as one."""
    from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments

    clock, rows = Clock(), _sft_rows(spec)
    with tempfile.TemporaryDirectory() as directory:
        settings = _sft_settings(spec) | {"eval_strategy": "no", "per_device_train_batch_size": spec["sft_batch"] // 2}
        args = sft_arguments(settings | {"gradient_accumulation_steps": 2}, Path(directory), spec["seed"])
        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        file = Path(directory) / "metrics.jsonl"
        trainer = build_sft_trainer(load(spec), args, tokenizer, rows, rows, lora(spec), file)
        trainer.add_callback(clock)
        wait_for_turn(spec)
        trainer.train()
    return clock.report(spec)


def trl_sft(spec: dict) -> dict:
    """TRL's SFTTrainer, the whole batch at once."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        args = trl.SFTConfig(
            output_dir=directory,
            per_device_train_batch_size=spec["sft_batch"],
            use_cpu=spec["device"] == "cpu",
            report_to="none",
            seed=spec["seed"],
            **_sft_settings(spec),
        )
        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        trainer = trl.SFTTrainer(
            model=load(spec),
            args=args,
            train_dataset=_sft_rows(spec),
            processing_class=tokenizer,
            peft_config=lora(spec),
            callbacks=[clock],
        )
        wait_for_turn(spec)
        trainer.train()
    return clock.report(spec)


def evaluation(spec: dict) -> dict:
    """The evaluation of three models: tokens a second of the texts that it scores, by its greedy decodes alone and by
    the whole stage, which also loads, samples for entropy, scores and writes the report."""
    from ruamel.yaml import YAML

    from pipeline import eval as stage
    from pipeline.evaluation import predictions

    tokenizer, length, seconds = AutoTokenizer.from_pretrained(spec["model"]), spec["eval_tokens"], []
    texts = tokenizer.batch_decode([spec["prompts"][i % len(spec["prompts"])] for i in range(spec["eval_texts"])])
    generate, systems = predictions.generate, [{"name": name, "path": spec["model"]} for name in ("a", "b", "c")]

    def timed(*args, **kwargs):
        wait()
        start = time.perf_counter()
        completions = generate(*args, **kwargs)
        wait()
        seconds.append(time.perf_counter() - start)
        return completions

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for split in ("train", "validation", "test"):
            lines = [json.dumps({"prompt": text, "completion": text}) for text in texts]
            (folder / f"{split}.jsonl").write_text("\n".join(lines))
        columns = {"path": str(folder / "{split}.jsonl"), "prompt": "prompt", "references": "completion"}
        recipe = {
            "name": "speed",
            "output_dir": str(folder / "runs"),
            "model": {"model_name_or_path": spec["model"]},  # in float32, which is the default of the evaluation
            "task": {"name": "columns", "language": "en", **columns},
            "eval": {"systems": systems, "metrics": ["chrf"], "max_new_tokens": length, "min_new_tokens": length},
        }
        with (folder / "recipe.yaml").open("w") as file:
            YAML(typ="safe").dump(recipe, file)
        wait_for_turn(spec)
        start = time.perf_counter()
        with patch.object(predictions, "generate", timed):
            code = stage.main([str(folder / "recipe.yaml")])
        whole = time.perf_counter() - start
    if code:
        raise RuntimeError(f"the evaluation ended with {code}")
    written = len(systems) * len(texts) * length
    speeds = {"its greedy decodes": written / sum(seconds), "the whole stage": written / whole}
    return {"tokens_a_second": speeds, "memory": used(), "versions": VERSIONS}


SIDES = {"trl_rloo": trl_rloo, "generation": generation, "sft": sft, "trl_sft": trl_sft, "evaluation": evaluation}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
