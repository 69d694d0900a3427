"""The folders that SFT and PPO of a speech model leave are read by transformers alone, which writes the same texts."""

from pathlib import Path

import pytest
import torch
from ppo_toys import SMALL
from speech_toys import spoken_examples
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    GenerationConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)

from pipeline.cli.export_command import copy_adapter
from pipeline.cli.finished_models import FinishedModel
from pipeline.evaluation.systems import Source
from pipeline.metrics import load_metric
from pipeline.models.audio import read_samples
from pipeline.models.config import ModelConfig
from pipeline.models.generation import generate
from pipeline.models.loading import load_config, load_model, load_tokenizer, lora_config, plain_model_directory
from pipeline.models.prompts import encode_rows
from pipeline.models.sampling import Decoding
from pipeline.models.speech import language_token
from pipeline.models.text import decode
from pipeline.rewards.metric import metric_reward
from pipeline.trainers.huggingface.gather_weights import save_plain_model
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

LENGTH = 12  # tokens of a text
SFT = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 5e-3, "bf16": False, "max_length": 40}
PPO = {**SMALL, "response_length": LENGTH, "total_episodes": 8, "learning_rate": 0.05}
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]


@pytest.fixture(scope="module")
def openai_directory(whisper_directory, whisper_config, teach_model, tmp_path_factory) -> Path:
    """A tiny model as OpenAI's are: with the Whisper tokenizer of transformers, and given tokens after the texts'."""
    directory = tmp_path_factory.mktemp("models") / "openai"
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=letters, merges=[], pad_token=SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], "<|notimestamps|>"]})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL, "<|notimestamps|>")}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    config, names = load_config(whisper_directory, whisper_config), ("bos_token_id", "eos_token_id", "pad_token_id")
    config.update({"vocab_size": len(tokenizer), "decoder_start_token_id": start, **dict.fromkeys(names, end)})
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        **dict.fromkeys(names, end),
        is_multilingual=True,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={language_token(language): ids[language_token(language)] for language in ("en", "de")},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")},
        begin_suppress_tokens=[end],
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    rows = spoken_examples(tmp_path_factory.mktemp("spoken"), config, 16)
    return teach_model(directory, ModelConfig(str(directory)), directory.with_name("taught-openai"), rows, 60)


@pytest.fixture
def heard(openai_directory, tmp_path):
    """Rows with the clips of the tiny model; their sounds are `tmp_path/train/<row>.wav`."""
    return spoken_examples(tmp_path, load_config(openai_directory, ModelConfig(str(openai_directory))), 16)


def sounds(folder: Path, count: int) -> list:
    return [read_samples(str(folder / "train" / f"{row}.wav"), 16_000) for row in range(count)]


def texts_of_relay(folder: Path, rows) -> list[str]:
    config = ModelConfig(str(folder))
    model, tokenizer = load_model(folder, config).eval(), load_tokenizer(folder, config)
    prompts = encode_rows(tokenizer, rows)
    return decode(tokenizer, generate(model, tokenizer, prompts, Decoding(LENGTH), len(prompts)))


def texts_of_pipeline(folder: Path, data: Path, count: int) -> list[str]:
    recogniser = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    options = {"generate_kwargs": {"language": "en", "max_new_tokens": LENGTH, "num_beams": 1}}
    given = [{"raw": samples, "sampling_rate": 16_000} for samples in sounds(data, count)]
    return [recogniser(sound, **options)["text"].strip() for sound in given]


def texts_of_processor(folder: Path, data: Path, count: int) -> list[str]:
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    features = processor(sounds(data, count), sampling_rate=16_000, return_tensors="pt").input_features
    ids = model.generate(features, language="en", task="transcribe", max_new_tokens=LENGTH)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def train_sft(base: Path, rows, peft: bool, output: Path) -> Path:
    """Train SFT and leave its folder as the stage does."""
    config = ModelConfig(str(base), lora_r=4)
    trainer = build_sft_trainer(
        load_model(base, config),
        sft_arguments(SFT, output, 0),
        load_tokenizer(base, config),
        rows,
        rows,
        lora_config(config) if peft else None,
        output / "metrics.jsonl",
    )
    trainer.train()
    save_plain_model(trainer, base, config, output)
    return output


def train_ppo(base: Path, rows, peft: bool, output: Path) -> Path:
    """Train PPO and leave its folder as the stage does."""
    config = ModelConfig(str(base), lora_r=4)
    trainer = PPOTrainer(
        model=load_model(base, config),
        args=PPOConfig(**PPO, use_peft=peft),
        processing_class=load_tokenizer(base, config),
        reward_funcs=metric_reward(load_metric("wer")),
        train_dataset=rows,
        peft_config=lora_config(config),
        output_dir=output,
    )
    trainer.train()
    trainer.save_model()
    return output


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("train", [train_sft, train_ppo], ids=["sft", "ppo"])
def test_the_pipeline_of_transformers_writes_what_relay_writes(
    openai_directory, heard, train, peft, tmp_path, fresh_accelerate
):
    assert not (openai_directory / "preprocessor_config.json").exists()
    start = openai_directory if train is train_sft else train_sft(openai_directory, heard, True, tmp_path / "sft")
    folder = train(start, heard, peft, tmp_path / "output")
    assert isinstance(WhisperProcessor.from_pretrained(folder).tokenizer, WhisperTokenizer)
    texts = texts_of_relay(folder, heard)
    assert len(set(texts)) > 2 and texts != texts_of_relay(start, heard)
    assert texts_of_pipeline(folder, tmp_path, len(heard)) == texts


def test_exports_and_merged_adapters_have_the_feature_extractor(openai_directory, heard, tmp_path, fresh_accelerate):
    sft, config = train_sft(openai_directory, heard, True, tmp_path / "sft"), ModelConfig(str(openai_directory))
    policy = train_ppo(sft, heard, True, tmp_path / "policy")
    folders = [Path(plain_model_directory(policy, config, tmp_path / "merged")), tmp_path / "adapter"]
    copy_adapter(FinishedModel(Source("ppo", policy, config)), folders[1])
    texts = texts_of_relay(policy, heard)
    for folder in folders:
        assert texts_of_pipeline(folder, tmp_path, len(heard)) == texts


def test_a_model_from_scratch_is_read_by_its_processor(taught_whisper_directory, spoken, tmp_path, fresh_accelerate):
    rows = spoken.select(range(16))
    folder = train_sft(taught_whisper_directory, rows, True, tmp_path / "output")
    spoken_examples(tmp_path, load_config(folder, ModelConfig(str(folder))), 24)  # the same sounds
    texts = texts_of_relay(folder, rows)
    assert len(set(texts)) > 2 and texts_of_processor(folder, tmp_path, 16) == texts
