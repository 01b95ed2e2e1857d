"""Conditional memory for language models: train it, attach it, place it, edit it, measure it."""

__version__ = "0.1.0"
