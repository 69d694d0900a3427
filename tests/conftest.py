"""A tiny language, and models of a few thousand weights that speak it: built in a second, offline, on the CPU."""

import atexit
import os
import platform
import shutil
import signal
import tempfile
import threading

# Before any library reads them: the suite never reaches for a network or an accelerator.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "HF_DATASETS_CACHE" not in os.environ:  # each run of the suite has its own, which goes with it
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="relay-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# A forked child has none of its parent's threads, and hangs at the first operation that is handed to them.
os.environ["OMP_NUM_THREADS"] = "1"
if platform.machine() in ("x86_64", "AMD64"):  # the same kernels on every machine, and bf16 only where a test asks
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ppo_toys import colours, small
from speech_toys import TONES, spoken_examples
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.config import FromScratchConfig, ModelConfig
from pipeline.models.from_scratch import build_from_scratch
from pipeline.models.loading import load_config, load_model, load_tokenizer, lora_config
from pipeline.models.prompts import encode_rows
from pipeline.models.sequences import Sequences, make_sequences
from pipeline.models.states import completion_states, lm_head
from pipeline.models.text import encode_completions
from pipeline.trainers.ppo.trainer import PPOTrainer

# A suite in the background of a script ignores Ctrl-C, and so would every process that it sends one.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
torch.set_num_threads(1)
tqdm.monitor_interval = 0  # its thread may hold the lock of all bars in the moment of a fork, in the child for ever
tqdm.set_lock(threading.RLock())  # the default is one for forked children too: killed in a bar they keep it

TESTS = Path(__file__).resolve().parent
# Folders and files of tests that start processes, kill runs again and again, or train every architecture with every
# option. `make test-fast` leaves them out.
SLOW = (
    "benchmarks",
    "cli/test_transcripts.py",
    "cli/test_wheel.py",
    "evaluation/test_browser.py",
    "evaluation/test_clusters.py",
    "evaluation/test_crossed.py",
    "evaluation/test_hostile_texts.py",
    "evaluation/test_runs.py",
    "evaluation/test_significance.py",
    "faults",
    "models/test_decoding.py",
    "models/test_states.py",
    "models/test_static_decode.py",
    "models/test_weights.py",
    "runtime/test_shared_work.py",
    "runtime/test_systems.py",
    "runtime/test_user_code.py",
    "stages/test_recipe_task.py",
    "stages/test_speech_stages.py",
    "test_accelerate_configs.py",
    "test_chain.py",
    "test_gpu.py",
    "test_notebooks.py",
    "test_reward_stage.py",
    "test_run.py",
    "test_stages_in_two.py",
    "test_stages_sharded.py",
    "test_two_machines.py",
    "trainers/test_communication.py",
    "trainers/test_deepspeed.py",
    "trainers/test_distributed.py",
    "trainers/test_experiment.py",
    "trainers/test_export.py",
    "trainers/test_invariants.py",
    "trainers/test_invariants_architectures.py",
    "trainers/test_mixture_of_experts.py",
    "trainers/test_ppo_config.py",
    "trainers/test_ppo_options.py",
    "trainers/test_reward.py",
    "trainers/test_sft_config.py",
    "trainers/test_sharded_ppo.py",
    "trainers/test_sharded_sft.py",
    "trainers/test_sharded_speech.py",
    "trainers/test_sft_encoder_decoder.py",
    "trainers/test_speech_folders.py",
    "trainers/test_speech_training.py",
    "trainers/test_trl_algorithms.py",
    "trainers/test_value_from_reward.py",
)
COLOURS = ("red", "blue", "green", "white", "black")
NUMBERS = ("one", "two", "three", "four", "five")
PLACES = ("north", "south", "east", "west")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add where the tests with the mark `gpu` run."""
    parser.addoption(
        "--gpu-device", choices=("cuda", "cpu"), default="cuda", help="tests of GPUs: cpu runs them small"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test of the files and folders in `SLOW` as slow, and skip those of GPUs where there is none."""
    if config.getoption("--gpu-device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu"))
    slow = [TESTS / name for name in SLOW]
    assert all(path.exists() for path in slow), "SLOW in tests/conftest.py names a file that does not exist"
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker(pytest.mark.slow)


def make_examples(count: int, seed: int) -> Dataset:
    """Rows such as `say north east` -> `east red two`: the last place, then colours and numbers, equally likely."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        places = chance.choices(PLACES, k=chance.randint(1, 4))
        prompt = f"say {' '.join(places)}"
        text = " ".join([places[-1], *chance.choices(COLOURS + NUMBERS, k=chance.randint(1, 4))])
        rows.append({"prompt": prompt, "completion": text, "references": [text], "tag": f"{number} {prompt}"})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def examples() -> Dataset:
    """64 rows with prompt, completion, references and a tag that repeats the prompt."""
    return make_examples(64, seed=0)


@pytest.fixture(scope="session")
def scratch_config() -> FromScratchConfig:
    """About 20 000 weights in one layer."""
    return FromScratchConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )


@pytest.fixture(scope="session")
def model_config(scratch_config) -> ModelConfig:
    """A `model:` section for the tiny model."""
    return ModelConfig(from_scratch=scratch_config, lora_r=4, lora_alpha=8)


@pytest.fixture(scope="session")
def base_directory(examples, scratch_config, tmp_path_factory) -> Path:
    """The tiny model with random weights, and its tokenizer."""
    texts = [*examples["prompt"], *examples["completion"]]
    return build_from_scratch(scratch_config, texts, 0, tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def taught_directory(base_directory, model_config, tmp_path_factory) -> Path:
    """The tiny model after it has learnt to answer with a few colours and numbers: the SFT model of these tests."""
    return teach(base_directory, model_config, tmp_path_factory.mktemp("models") / "taught")


@pytest.fixture(scope="session")
def teach_model() -> Callable[[Path, ModelConfig, Path], Path]:
    """Train another model as the taught ones were: `teach`."""
    return teach


def teach(base: Path, config: ModelConfig, directory: Path, rows: Dataset | None = None, passes: int = 20) -> Path:
    """Train the model in `base` on rows (None: 256 examples) and save it in `directory`, with its tokenizer."""
    model, tokenizer = load_model(base, config), load_tokenizer(base, config)
    rows = make_examples(256, seed=1) if rows is None else rows
    prompts = encode_rows(tokenizer, rows, model.config.is_encoder_decoder)
    answers = encode_completions(tokenizer, rows["prompt"], rows["completion"])
    sequences = make_sequences(prompts, answers, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(passes):
        for index in torch.randperm(len(sequences)).split(min(32, len(sequences) // 3)):
            completion_loss(model, sequences.rows(index)).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def completion_loss(model: PreTrainedModel, sequences: Sequences) -> torch.Tensor:
    """Mean cross-entropy of the completion tokens."""
    mask = sequences.completion_mask
    logits = lm_head(model)(completion_states(model, sequences)[mask])
    return torch.nn.functional.cross_entropy(logits, sequences.completion_ids[mask])


@pytest.fixture(scope="session")
def t5_config(scratch_config) -> ModelConfig:
    """A `model:` section for a tiny encoder-decoder."""
    return ModelConfig(from_scratch=replace(scratch_config, architecture="t5"), lora_r=4, lora_alpha=8)


@pytest.fixture(scope="session")
def taught_t5_directory(examples, t5_config, tmp_path_factory) -> Path:
    """The tiny encoder-decoder after it has learnt the same."""
    directory, texts = tmp_path_factory.mktemp("models"), [*examples["prompt"], *examples["completion"]]
    base = build_from_scratch(t5_config.from_scratch, texts, 0, directory / "base")
    return teach(base, t5_config, directory / "taught")


@pytest.fixture(scope="session")
def whisper_config(scratch_config) -> ModelConfig:
    """A `model:` section for a tiny model that hears."""
    scratch = replace(scratch_config, architecture="whisper", num_mel_bins=16, max_seconds=1, vocab_size=300)
    return ModelConfig(from_scratch=scratch, lora_r=4, lora_alpha=8)


@pytest.fixture(scope="session")
def whisper_directory(whisper_config, tmp_path_factory) -> Path:
    """The tiny model that hears, with random weights, which is told English or German."""
    directory = tmp_path_factory.mktemp("models") / "whisper"
    return build_from_scratch(whisper_config.from_scratch, list(TONES), 0, directory, ["en", "de"])


@pytest.fixture(scope="session")
def spoken(whisper_directory, whisper_config, tmp_path_factory) -> Dataset:
    """24 rows of tones that stand for words, with the clips that the tiny model hears."""
    config = load_config(whisper_directory, whisper_config)
    return spoken_examples(tmp_path_factory.mktemp("spoken"), config, 24)


@pytest.fixture(scope="session")
def taught_whisper_directory(whisper_directory, whisper_config, spoken, tmp_path_factory) -> Path:
    """The tiny model after it has learnt to write down some words."""
    return teach(whisper_directory, whisper_config, tmp_path_factory.mktemp("models") / "taught-whisper", spoken, 60)


@pytest.fixture
def taught_whisper(taught_whisper_directory, whisper_config) -> Callable[[], PreTrainedModel]:
    """Each call loads the taught model that hears afresh."""
    return lambda: load_model(taught_whisper_directory, whisper_config)


@pytest.fixture
def whisper_tokenizer(taught_whisper_directory, whisper_config) -> PreTrainedTokenizerBase:
    """Its tokenizer, as every stage loads it."""
    return load_tokenizer(taught_whisper_directory, whisper_config)


@pytest.fixture
def t5_tokenizer(taught_t5_directory, t5_config) -> PreTrainedTokenizerBase:
    """Its tokenizer, as every stage loads it."""
    return load_tokenizer(taught_t5_directory, t5_config)


@pytest.fixture
def taught_t5(taught_t5_directory, t5_config) -> Callable[[], PreTrainedModel]:
    """Each call loads the taught encoder-decoder afresh."""
    return lambda: load_model(taught_t5_directory, t5_config)


@pytest.fixture
def tokenizer(base_directory, model_config) -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer, as every stage loads it."""
    return load_tokenizer(base_directory, model_config)


@pytest.fixture
def taught(taught_directory, model_config) -> Callable[[], PreTrainedModel]:
    """Each call loads the taught model afresh."""
    return lambda: load_model(taught_directory, model_config)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the life of a process; tests that choose others need them forgotten."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


@pytest.fixture
def make_trainer(taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate) -> Callable[..., PPOTrainer]:
    """Each call builds a trainer over a fresh copy of the taught model; keywords of PPOConfig change `SMALL`."""

    def make(
        output: str | Path = "ppo",
        reward=colours,
        seed: int = 0,
        train=examples,
        validation=None,
        processing_class=tokenizer,
        compute_metrics=None,
        model=None,
        peft_config=None,
        **settings,
    ) -> PPOTrainer:
        return PPOTrainer(
            model=model or taught(),
            args=small(**settings),
            processing_class=processing_class,
            reward_funcs=reward,
            train_dataset=train,
            eval_dataset=validation,
            peft_config=peft_config or lora_config(model_config),
            output_dir=tmp_path / output,
            seed=seed,
            compute_metrics=compute_metrics,
        )

    return make
