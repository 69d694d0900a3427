"""A recipe: one YAML file and overrides -> a typed, checked Recipe."""

from pipeline.recipe.checks import check_recipe, load_checked_recipe
from pipeline.recipe.command_line import (
    exit_with_error,
    parse_arguments_of_stages,
    parse_stage_arguments,
    split_recipe_argument,
)
from pipeline.recipe.document import RecipeError
from pipeline.recipe.load import load_recipe, load_stored_recipe, recipe_values
from pipeline.recipe.types import Recipe, RewardSection, SFTSection, TaskSection

__all__ = [
    "Recipe",
    "RecipeError",
    "RewardSection",
    "SFTSection",
    "TaskSection",
    "check_recipe",
    "exit_with_error",
    "load_checked_recipe",
    "load_recipe",
    "load_stored_recipe",
    "parse_arguments_of_stages",
    "parse_stage_arguments",
    "recipe_values",
    "split_recipe_argument",
]
