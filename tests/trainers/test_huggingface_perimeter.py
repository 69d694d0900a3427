"""The private names of transformers and TRL that `pipeline/trainers/huggingface` relies on, as they are installed."""

import ast
import inspect
import re
from pathlib import Path

import transformers
import trl
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import RewardTrainer, SFTTrainer

from pipeline.trainers import huggingface

TRAINERS = (Trainer, SFTTrainer, RewardTrainer)
VERSIONS = f"transformers {transformers.__version__}, trl {trl.__version__}"
# Methods that are overridden or called, and the parameters they take, in this order.
METHODS: dict[str, str] = {
    "_defer_fsdp_gradient_reduction": "",
    "_finalize_training": "trial num_train_samples start_time",
    "_get_grad_norm": "model grad_norm",
    "_get_train_sampler": "train_dataset",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_maybe_log_save_evaluate": "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    "_move_model_to_device": "model device",
    "_run_epoch": (
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
        "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
    ),
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_scaler": "output_dir",
    "_set_signature_columns_if_needed": "",
    "_track_num_input_tokens": "inputs",
}
# Attributes, and the methods that set them to their start.
IN_THE_LOOP, AT_THE_START = (
    ((Trainer, "_inner_training_loop"),),
    ((SFTTrainer, "__init__"), (RewardTrainer, "__init__")),
)
ATTRIBUTES = {
    "_globalstep_last_logged": IN_THE_LOOP,
    "_initial_global_step": IN_THE_LOOP,
    "_tr_loss": IN_THE_LOOP,
    "_total_loss_scalar": IN_THE_LOOP,
    "_signature_columns": ((Trainer, "__init__"), (Trainer, "_set_signature_columns_if_needed")),
    "_metrics": AT_THE_START,
    "_total_train_tokens": AT_THE_START,
}


def private_names_of_the_libraries() -> set[str]:
    source = "".join(inspect.getsource(trainer) for trainer in TRAINERS)
    attributes = set(re.findall(r"self\.(_[a-z]\w*)", source))
    return attributes | {name for trainer in TRAINERS for name in dir(trainer) if re.match(r"_[a-z]", name)}


def names_in_the_package() -> set[str]:
    names = set()
    for path in Path(huggingface.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {node.attr} if isinstance(node, ast.Attribute) else set()
            names |= {node.name} if isinstance(node, ast.FunctionDef) else set()
    return names


def test_the_private_names_are_those_of_the_installed_versions():
    for name, expected in METHODS.items():
        for trainer in TRAINERS:
            method = getattr(trainer, name, None)
            assert method is not None, f"{VERSIONS}: {trainer.__name__}.{name} is gone"
            parameters = " ".join(list(inspect.signature(method).parameters)[1:])
            assert parameters == expected, f"{VERSIONS}: {method.__qualname__} takes ({parameters}), not ({expected})"
    for name, places in ATTRIBUTES.items():
        for trainer, method in places:
            is_set = re.search(rf"self\.{name} = ", inspect.getsource(getattr(trainer, method)))
            assert is_set, f"{VERSIONS}: {trainer.__name__}.{method} no longer sets {name}"
    prepare = inspect.getsource(Trainer._prepare_for_training)
    assert "if self.is_distributed_loading_by_transformers:" in prepare and "create_optimizer()" in prepare, VERSIONS
    sampler = inspect.getsource(LengthGroupedSampler.__init__)
    for name in ("batch_size", "lengths", "generator"):
        assert f"self.{name} = " in sampler, f"{VERSIONS}: LengthGroupedSampler.{name} is gone"


def test_the_package_uses_and_names_these_alone():
    """Otherwise a name of Relay could also hide one of a library."""
    used = names_in_the_package() & private_names_of_the_libraries()
    assert used == METHODS.keys() | ATTRIBUTES.keys()
    assert set(re.findall(r"`(_\w+)`", huggingface.__doc__)) == used
