"""What a PPOTrainer is given, in any form that TRL's trainers take, as what PPO works with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, WhisperProcessor

from pipeline.models.config import ModelConfig
from pipeline.models.decoder_start import check_decoder, set_decoder_start
from pipeline.models.hub import ADAPTER_FILE
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.processors import save_processor
from pipeline.models.speech import reads_sound
from pipeline.models.text import set_chat_template
from pipeline.trainers.ppo.config import PPOConfig

# Held-out prompts: one set, or several by name.
EvalData = Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset]
SINGLE = ""  # the name of an evaluation set that has none


@dataclass(frozen=True)
class Policy:
    """The model that PPO starts from, with plain weights, its tokenizer, and the adapter that is put on it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    peft_config: LoraConfig | None


def load_start(
    model: object, tokenizer: object, peft_config: PeftConfig | None, args: PPOConfig, directory: Path
) -> Policy:
    """Load what is given by its path or Hub id, and merge an adapter.

    A PeftModel is merged into plain weights, from which the policy starts and which are the reference; a new adapter
    of the same kind, or `peft_config`, is trained over them. They are saved in `directory/base`, which the policy's
    adapter needs.

    Raises:
        ValueError: something that is no language model, no tokenizer, or no adapter that can be trained or merged.
    """
    is_adapter = isinstance(model, str | Path) and (Path(model).expanduser() / ADAPTER_FILE).is_file()
    if isinstance(model, str | Path):
        path = str(model)
        config = ModelConfig(model_name_or_path=path)
        model = load_model(path, config)
        tokenizer = load_tokenizer(path, config) if tokenizer is None else tokenizer
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ValueError(
            f"model: expected a language model of transformers, a PeftModel, a directory or a Hub id, found a "
            f"{type(model).__name__}"
        )
    if not isinstance(model, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "model: an adapter is inside it, as transformers' from_pretrained puts that of a directory there, and a "
            "new one would take its place; give the directory as a text, or PeftModel.from_pretrained(base, adapter)"
        )
    tokenizer = _tokenizer(tokenizer, model, args)
    base = directory / "base" if args.use_peft else None
    if isinstance(model, PeftModel):
        peft_config = _own_config(model) if peft_config is None else peft_config
        model = merge_policy(model, tokenizer, base)
    elif is_adapter and base is not None:
        save_base(model, tokenizer, base)
    if model.config.is_encoder_decoder and not reads_sound(model.config):  # as where it is loaded by its path
        check_decoder(model)
        set_decoder_start(model, tokenizer)
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise ValueError(
            f"peft_config: PPO trains LoRA adapters, found a {type(peft_config).__name__}; give a peft.LoraConfig, or "
            "set ppo.use_peft: false"
        )
    return Policy(model, tokenizer, peft_config)


def _tokenizer(tokenizer: object, model: PreTrainedModel | PeftModel, args: PPOConfig) -> PreTrainedTokenizerBase:
    """Return the policy's tokenizer, with the variables of its chat template set."""
    if tokenizer is None:
        source = model.config.name_or_path
        if not source:
            raise ValueError("processing_class: missing, and the model was not loaded from a directory that has one")
        tokenizer = load_tokenizer(source, ModelConfig(model_name_or_path=source))
    if isinstance(tokenizer, WhisperProcessor):
        tokenizer = tokenizer.tokenizer
    if isinstance(tokenizer, ProcessorMixin):
        raise ValueError(
            "processing_class: a processor of images or of other sound than Whisper's; give its tokenizer"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class: expected a tokenizer of transformers, found a {type(tokenizer).__name__}")
    if args.chat_template_kwargs:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"ppo.chat_template_kwargs: they would do nothing: the tokenizer {tokenizer.name_or_path!r} has no "
                "chat template; set tokenizer.chat_template, or remove them"
            )
        set_chat_template(tokenizer, None, args.chat_template_kwargs)
    return tokenizer


def _own_config(model: PeftModel) -> PeftConfig:
    """Return the configuration of a model's adapter for a new one over the merged weights."""
    return replace(model.active_peft_config, inference_mode=False, base_model_name_or_path=None)


def merge_policy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path | None) -> PreTrainedModel:
    """Merge an adapter into its base, and save the result in `directory` if there is one; every process calls it.

    Raises:
        ValueError: an adapter that is no change of weights, or one over quantised weights.
    """
    if not isinstance(model.base_model, BaseTuner):
        raise ValueError(
            f"model: a {type(model.active_peft_config).__name__} cannot be merged into the weights; give a model "
            "with a LoRA adapter, or one without an adapter"
        )
    if "quantization_config" in model.config.to_dict():
        raise ValueError(
            "model: merging an adapter would round it to the bits of its base; give the directory of the adapter, "
            "or load the base without quantization"
        )
    merged = model.merge_and_unload()
    if directory is not None:
        save_base(merged, tokenizer, directory)
    return merged


def save_base(merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save the model that a new adapter is put on, and name it after its directory; every process calls it."""
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            merged.save_pretrained(directory)
            save_processor(tokenizer, merged.config, directory)
    # peft writes it into the policy's adapter as the base to load.
    merged.name_or_path = merged.config.name_or_path = str(directory.absolute())


def training_examples(dataset: object, args: PPOConfig, num_processes: int) -> Dataset:
    """Return the training data; of a stream as many examples as the run reads.

    Raises:
        ValueError: none, several splits, no column `prompt`, or images.
    """
    if dataset is None:
        raise ValueError("train_dataset: missing; give a datasets.Dataset with a column `prompt`")
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"train_dataset: it has the splits {', '.join(map(str, dataset))}; give one of them, such as "
            f"dataset[{next(iter(dataset), 'train')!r}]"
        )
    if isinstance(dataset, IterableDataset):
        prompts = args.num_steps(num_processes) * args.batch_size(num_processes) // args.num_generations
        dataset = _first_of(dataset, prompts)
    return _checked(dataset, "train_dataset")


def held_out_sets(dataset: object, args: PPOConfig, name: str = "eval_dataset") -> dict[str, Dataset]:
    """Return the held-out data by the name of each set; one that has none is called `SINGLE`.

    Of each set the first `args.eval_examples` count.

    Raises:
        ValueError: no column `prompt`, images, or a stream whose end is not known.
    """
    if dataset is None:
        return {}
    sets = dict(dataset) if isinstance(dataset, Mapping) else {SINGLE: dataset}
    chosen = {}
    for key, examples in sets.items():
        where = f"{name}[{key!r}]" if key else name
        if isinstance(examples, IterableDataset):
            if args.eval_examples is None:
                raise ValueError(
                    f"{where}: a stream may have no end; set ppo.eval_examples to how many of its examples count"
                )
            examples = _first_of(examples, args.eval_examples)
        examples = _checked(examples, where)
        if args.eval_examples is not None:
            examples = examples.select(range(min(args.eval_examples, len(examples))))
        if len(examples) or key:
            chosen[str(key)] = examples
    return chosen


def _first_of(stream: IterableDataset, count: int) -> Dataset:
    return Dataset.from_list(list(islice(stream, count)), features=stream.features)


def _checked(dataset: object, name: str) -> Dataset:
    """Refuse what is no data set of prompts.

    Raises:
        ValueError: saying what to give instead.
    """
    if not isinstance(dataset, Dataset):
        splits = isinstance(dataset, DatasetDict | IterableDatasetDict)
        instead = "one of its splits" if splits else "datasets.Dataset.from_list(rows)"
        raise ValueError(f"{name}: expected a datasets.Dataset, found a {type(dataset).__name__}; give {instead}")
    if "prompt" not in dataset.column_names and len(dataset):
        raise ValueError(
            f"{name}: it has no column `prompt` (text or chat messages), only {', '.join(dataset.column_names)}; "
            "rename one with dataset.rename_column"
        )
    pictures = [key for key, feature in dataset.features.items() if isinstance(feature, Image)]
    pictures += [key for key in ("image", "images") if key in dataset.column_names and key not in pictures]
    if pictures:
        raise ValueError(
            f"{name}: the column {pictures[0]!r} holds images, and PPO here reads text alone; remove it with "
            "dataset.remove_columns, or train with TRL's GRPOTrainer"
        )
    return dataset
