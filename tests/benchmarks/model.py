"""The benchmarks' model: a small Llama taught on the generated phrasebook for a minute or two."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.models.config import FromScratchConfig, ModelConfig
from pipeline.models.from_scratch import build_from_scratch
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.sequences import make_sequences
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.tasks import parallel
from pipeline.trainers.precision import native_bf16

FIVE_MILLION = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 6000}
PHRASEBOOK = Path(__file__).resolve().parents[2] / "recipes" / "phrasebook"
TRAINING_PAIRS = slice(768, 8768)  # of test, validation and train, one after the other
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 400}


def model_config(sizes: dict[str, int]) -> ModelConfig:
    """The `model:` section of the benchmarks."""
    return ModelConfig(
        from_scratch=FromScratchConfig(max_position_embeddings=1024, **sizes), lora_r=16, attn_implementation="eager"
    )


def teach(directory: Path, sizes: dict[str, int], epochs: int, seed: int = 0) -> Path:
    """Build the model and teach it the phrasebook once; a directory that is there is used as it is."""
    if (directory / "config.json").is_file():
        return directory
    prompts, completions = training_pairs()
    config = model_config(sizes)
    base = build_from_scratch(
        config.from_scratch, [*prompts, *completions], seed, directory.with_name(directory.name + "-base")
    )
    model, tokenizer = load_model(base, config), load_tokenizer(base, config)
    if epochs:
        _train(model, tokenizer, prompts, completions, epochs, seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def training_pairs() -> tuple[list[str], list[str]]:
    """Return the prompts and completions that the model learns."""
    data = parallel.Config(data_dir=str(PHRASEBOOK), source="{split}.en", target="{split}.de")
    task = parallel.load(data)
    splits = (task.test, task.validation, task.train)
    prompts, completions = (
        [text for split in splits for text in split[column]] for column in ("prompt", "completion")
    )
    return prompts[TRAINING_PAIRS], completions[TRAINING_PAIRS]


def _train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    completions: list[str],
    epochs: int,
    seed: int,
    size: int = 64,
) -> None:
    prompt_ids = encode_prompts(tokenizer, prompts)
    completion_ids = encode_completions(tokenizer, prompts, completions)
    sequences = make_sequences(prompt_ids, completion_ids, tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * -(-len(sequences) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(sequences), generator=generator).split(size):
            part = sequences.rows(rows)
            ids = torch.cat([part.prompt_ids, part.completion_ids], 1)
            mask = torch.cat([part.prompt_mask, part.completion_mask], 1)
            answered = torch.cat([torch.zeros_like(part.prompt_mask), part.completion_mask], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16()):
                labels = ids.masked_fill(~answered, -100)
                loss = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
