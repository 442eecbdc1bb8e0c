"""Ablations: variants of a recipe, each trained and evaluated, in one table."""
