"""The end of SFT: what share of validation completions does not end, and when that is said."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from pipeline.evaluation.config import EvalConfig
from pipeline.stages import endings
from pipeline.stages.endings import check_endings


@pytest.fixture
def check(taught, tokenizer, examples, fresh_accelerate):
    """Each call checks the taught model on some validation rows; keywords are keys of `eval`."""

    def call(model=None, rows=40, **settings):
        recipe = SimpleNamespace(eval=EvalConfig(**{"max_new_tokens": 16, **settings}))
        task = SimpleNamespace(validation=examples.select(range(rows)))
        trainer = SimpleNamespace(model=model or taught(), accelerator=Accelerator(cpu=True))
        return check_endings(recipe, task, trainer, tokenizer)

    return call


def test_a_model_that_ends_its_texts_is_recorded_and_not_warned_of(check, capsys):
    assert check()["unfinished_share"] <= endings.WARN_ABOVE
    assert "warning" not in capsys.readouterr().err


def test_a_model_that_does_not_end_is_warned_of_with_what_helps(check, taught, tokenizer, capsys):
    adapter = get_peft_model(taught(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert check(adapter, suppress_tokens=(tokenizer.eos_token_id,)) == {"unfinished_share": 1.0}
    printed = capsys.readouterr().err
    for words in ("100% of 40 validation completions", "within 16 tokens", "sft.num_train_epochs", "stop_strings"):
        assert words in printed


def test_a_stop_string_is_an_end_and_prompts_without_room_are_left_out(check, tokenizer, capsys):
    never = {"suppress_tokens": (tokenizer.eos_token_id,)}
    assert check(**never, stop_strings=tuple("abcdefghijklmnopqrstuvwxyz"))["unfinished_share"] == 0.0
    assert check(**never, max_new_tokens=64) == {}  # the model has 64 positions, so no prompt leaves room


def test_weights_that_an_engine_shards_are_not_tried(check, monkeypatch):
    monkeypatch.setattr(endings, "launched_engine", lambda: "FSDP")
    assert check() == {}
