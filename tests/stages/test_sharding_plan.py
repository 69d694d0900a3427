"""What the plan says of rollouts of a sharded base, with sizes worked out by hand."""

from types import SimpleNamespace

import pytest

from pipeline.models.config import ModelConfig
from pipeline.stages.sharding_plan import sharding_line


def recipe_over(path: object, bf16: bool, dtype: str | None = None) -> SimpleNamespace:
    """The keys of a recipe that the plan reads."""
    ppo = SimpleNamespace(sft_model_path=None, use_peft=True, bf16=bf16)
    model = ModelConfig(model_name_or_path=str(path), dtype=dtype)
    return SimpleNamespace(ppo=ppo, model=model, sft_is_external=False)


@pytest.fixture
def weights(taught) -> int:
    """How many the model has."""
    return sum(p.numel() for p in taught().parameters())


@pytest.mark.parametrize(("dtype", "bytes_of"), [(None, 4), ("bfloat16", 2)])
def test_the_base_is_gathered_whole_where_it_takes_half_a_device(taught_directory, weights, dtype, bytes_of):
    """Weights are gathered as they are stored, whatever passes compute in."""
    size, recipe = weights * bytes_of, recipe_over(taught_directory, True, dtype)
    assert "gather the whole base once each" in sharding_line(recipe, 8, memory=2 * size)
    assert "every layer for every token, all processes in step" in sharding_line(recipe, 8, memory=2 * size - 2)


def test_without_a_configuration_the_rule_is_said(tmp_path):
    assert "where it takes at most 40.0 GB, half of a device" in sharding_line(
        recipe_over(tmp_path, True), 8, 80 * 10**9
    )
