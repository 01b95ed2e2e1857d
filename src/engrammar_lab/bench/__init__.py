"""Measurements of speed and memory use, each compared with a baseline of the same run."""
