"""The recipe: what a user writes, checked before anything runs."""

from trainer.config.load import load_recipe, recipe_from, save_recipe
from trainer.config.schema import Recipe

__all__ = ["Recipe", "load_recipe", "recipe_from", "save_recipe"]
