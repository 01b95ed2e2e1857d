"""Settings are checked when they are made, and survive JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from engrammar import config
from engrammar.addressing import derive_geometry
from engrammar.config import DIALECTS, Geometry, MemoryConfig


@pytest.mark.parametrize("name", DIALECTS)
def test_config_and_geometry_survive_json(name):
    config = DIALECTS[name]
    assert MemoryConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    geometry = derive_geometry(config, num_classes=98_627, fill_class=2)
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry


def test_a_preset_takes_replacements():
    config = MemoryConfig.from_json({"dialect": "paper", "layers": [0, 2], "head_dim": 7})
    assert config == replace(DIALECTS["paper"], layers=(0, 2), head_dim=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, "layers"),
        ({"layers": [3, 1]}, "ascending"),
        ({"layers": [-1]}, "a list of integers of 0 or more"),
        ({"layers": [1.9]}, "a list of integers"),
        ({"layers": "12"}, "a list of integers"),
        ({"seed": -1}, "seed is -1; allowed: an integer of 0 or more"),
        ({"num_heads": 2.5}, "num_heads"),
        ({"fill_id": -1}, "fill_id"),
        ({"key_norm_eps": -1.0}, "key_norm_eps"),
        ({"boundary": "dead", "dead_ids": [-5]}, "dead_ids"),
        ({"max_ngram_size": 1, "rows_per_head": []}, "max_ngram_size"),
        ({"rows_per_head": [100]}, "rows_per_head"),
        ({"rows_per_head": [100, 1]}, "rows_per_head"),
        ({"num_heads": 0}, "num_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"conv_kernel": 1}, "conv_kernel"),
        ({"gate": "softmax"}, "one of signed_root, sigmoid, none"),
        ({"boundary": "dead"}, "dead_ids"),
        ({"end_ids": [1]}, "end_ids"),
        ({"rows_multiple": 0}, "rows_multiple"),
        ({"rows": 5}, "unknown settings rows"),
        ({"dialect": "mine"}, "allowed: paper, demo, deepseek_v41, qwen_next"),
    ],
)
def test_contradictory_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig.from_json({"dialect": "paper"} | settings)


def test_bytes_per_token_are_those_of_the_released_rows():
    assert DIALECTS["deepseek_v41"].bytes_per_token == 2 * 24 * 264  # 256 fp8 values and 8 scales a row
    assert DIALECTS["qwen_next"].bytes_per_token == 16 * 160
    assert DIALECTS["paper"].bytes_per_token == 2 * 16 * 80 * 2


def test_the_fill_class_must_be_a_class():
    with pytest.raises(ValueError, match="fill_class is 9"):
        derive_geometry(DIALECTS["paper"], num_classes=9, fill_class=9)


def test_neither_a_dialect_nor_what_has_no_default_is_refused():
    with pytest.raises(
        ValueError, match=r"memory lacks layers and rows_per_head: give them, or a memory.dialect .*paper"
    ):
        MemoryConfig.from_json({"head_dim": 7})


def test_a_norm_without_an_epsilon_is_refused_where_there_is_no_smallest_step():
    assert MemoryConfig.from_json({"dialect": "demo"}).key_norm_eps is None
    for value in (None, True, "1e-6"):
        with pytest.raises(ValueError, match="conv_norm_eps is .*; allowed: a number of 0 or more"):
            MemoryConfig.from_json({"dialect": "demo", "conv_norm_eps": value})


def test_settings_are_checked_even_where_annotations_are_text():
    """`from __future__ import annotations` turns every annotation into text, which must not switch the checks off."""
    source = "from __future__ import annotations\n" + Path(config.__file__).read_text().split('"""', 2)[2]
    module = ModuleType("settings_as_text")
    sys.modules[module.__name__] = module  # where dataclasses and get_type_hints look names up
    try:
        exec(compile(source, module.__name__, "exec"), module.__dict__)
        made = module.MemoryConfig.from_json(config.DIALECTS["demo"].to_json())
        assert made.to_json() == config.DIALECTS["demo"].to_json() and made.layers == (1, 15)
        for name, value in {"gate": "softmax", "num_heads": 2.5, "conv_norm_eps": "no", "layers": [1.9]}.items():
            with pytest.raises(ValueError, match=f"memory.{name} is .*; allowed"):
                replace(made, **{name: value})
    finally:
        del sys.modules[module.__name__]
