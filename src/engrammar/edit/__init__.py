"""Patches: what a model remembers is changed without touching its weights, and changed back to the bit.

Public: base_of, subject_keys, ExactEntry, Probe, replace_rows, build_patch, Patch; read_patch, write_patch;
apply_patch, undo_patch, applied_patches, without_patches; patch_folder, unpatch_folder, patches_in; conflicts, diff,
merge; uses; Fact, read_facts, learn, Learned, Refused, GatedSettings, VectorSettings,
RowSettings; MultiHop, read_multihop; export_overlay.
"""

from engrammar.edit.applying import applied_patches, apply_patch, undo_patch, without_patches
from engrammar.edit.building import build_patch, conflicts, diff, merge
from engrammar.edit.exported import export_overlay
from engrammar.edit.facts import Fact, Refused, read_facts
from engrammar.edit.files import read_patch, write_patch
from engrammar.edit.gated import GatedSettings
from engrammar.edit.hashed import RowSettings
from engrammar.edit.learning import Learned, learn
from engrammar.edit.multihop import MultiHop, read_multihop
from engrammar.edit.overlay import replace_rows
from engrammar.edit.patch import ExactEntry, Patch, Probe, base_of, subject_keys
from engrammar.edit.uses import uses
from engrammar.edit.vector import VectorSettings
from engrammar.edit.written import patch_folder, patches_in, unpatch_folder

__all__ = [
    "ExactEntry",
    "Fact",
    "GatedSettings",
    "Learned",
    "MultiHop",
    "Patch",
    "Probe",
    "Refused",
    "RowSettings",
    "VectorSettings",
    "applied_patches",
    "apply_patch",
    "base_of",
    "build_patch",
    "conflicts",
    "diff",
    "export_overlay",
    "learn",
    "merge",
    "patch_folder",
    "patches_in",
    "read_facts",
    "read_multihop",
    "read_patch",
    "replace_rows",
    "subject_keys",
    "undo_patch",
    "unpatch_folder",
    "uses",
    "without_patches",
    "write_patch",
]
