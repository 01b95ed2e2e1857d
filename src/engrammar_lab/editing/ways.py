"""The other ways to change facts that the study compares."""

from collections.abc import Mapping

from engrammar_lab.editing.edited import Way

RIVALS: Mapping[str, Way] = {}
