"""Checks of `vit-adala doctor`: the environment, and a model."""
