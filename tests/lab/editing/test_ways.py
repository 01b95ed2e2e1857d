"""The rivals by name, each with settings of its own."""

from dataclasses import is_dataclass
from pathlib import Path

from engrammar_lab.editing.ways import RIVALS, rivals


def test_every_rival_has_a_name_and_frozen_settings():
    assert {"prompt", "retrieval", "fine-tuning", "LoRA", "ROME", "MEMIT", "codebook"} <= set(RIVALS)
    settings = [way.keywords["settings"] for way in RIVALS.values()]
    assert len({repr(one) for one in settings}) == len(settings)
    assert all(is_dataclass(one) and one.__dataclass_params__.frozen for one in settings)
    elsewhere = rivals(Path("elsewhere"))["MEMIT"].keywords["settings"]
    assert elsewhere.keys.cache == Path("elsewhere") != RIVALS["MEMIT"].keywords["settings"].keys.cache
