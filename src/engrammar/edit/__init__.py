"""Patches: what a model remembers is changed without touching its weights, and changed back to the bit.

Public: what `__all__` names (docs/edit.md).
"""

from engrammar.edit.answers import answer, phrasings_of, reached, says
from engrammar.edit.applying import applied_patches, apply_patch, undo_patch, without_patches
from engrammar.edit.building import build_patch, conflicts, diff, merge
from engrammar.edit.exported import export_overlay
from engrammar.edit.facts import Fact, MultiHop, Refused, read_facts, read_multihop
from engrammar.edit.files import read_patch, write_patch
from engrammar.edit.forgetting import Forgotten, Proof, forget, prove_forgotten
from engrammar.edit.learning import Learned, learn, learn_units, request
from engrammar.edit.overlay import replace_rows
from engrammar.edit.patch import ExactEntry, Patch, Probe, base_of, subject_keys
from engrammar.edit.probing import GatedSettings
from engrammar.edit.solving import RowSettings
from engrammar.edit.uses import uses
from engrammar.edit.vector import VectorSettings
from engrammar.edit.written import (
    drop_patch,
    keep_patch,
    kept_files,
    kept_names,
    patch_folder,
    patches_in,
    unpatch_folder,
)

__all__ = [
    "ExactEntry",
    "Fact",
    "Forgotten",
    "GatedSettings",
    "Learned",
    "MultiHop",
    "Patch",
    "Probe",
    "Proof",
    "Refused",
    "RowSettings",
    "VectorSettings",
    "answer",
    "applied_patches",
    "apply_patch",
    "base_of",
    "build_patch",
    "conflicts",
    "diff",
    "drop_patch",
    "export_overlay",
    "forget",
    "keep_patch",
    "kept_files",
    "kept_names",
    "learn",
    "learn_units",
    "merge",
    "patch_folder",
    "patches_in",
    "phrasings_of",
    "prove_forgotten",
    "reached",
    "read_facts",
    "read_multihop",
    "read_patch",
    "replace_rows",
    "request",
    "says",
    "subject_keys",
    "undo_patch",
    "unpatch_folder",
    "uses",
    "without_patches",
    "write_patch",
]
