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
def sizes(taught) -> tuple[int, int]:
    """Weights in layers and outside of them."""
    model = taught()
    layers = sum(p.numel() for p in model.base_model.layers.parameters())
    return layers, sum(p.numel() for p in model.parameters()) - layers


@pytest.mark.parametrize(
    ("bf16", "dtype", "bytes_of"), [(False, None, (4, 4)), (True, None, (2, 4)), (False, "bfloat16", (2, 2))]
)
def test_the_base_is_gathered_whole_where_it_takes_half_a_device(taught_directory, sizes, bf16, dtype, bytes_of):
    """Layers are gathered in what they compute in, and the rest as it is stored."""
    size, recipe = sum(n * b for n, b in zip(sizes, bytes_of, strict=True)), recipe_over(taught_directory, bf16, dtype)
    assert "gather the whole base once each" in sharding_line(recipe, 8, memory=2 * size)
    assert "every layer for every token, all processes in step" in sharding_line(recipe, 8, memory=2 * size - 2)


def test_without_a_configuration_the_rule_is_said(tmp_path):
    assert "where it takes at most 40.0 GB, half of a device" in sharding_line(
        recipe_over(tmp_path, True), 8, 80 * 10**9
    )
