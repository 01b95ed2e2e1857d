"""`import engrammar`: what users find, what it registers, and what it leaves alone."""

import importlib
import subprocess
import sys

import pytest

import engrammar

PACKAGES = (
    "",
    ".model",
    ".attach",
    ".edit",
    ".tables",
    ".tables.released",
    ".stores",
    ".stores.mooncake",
    ".train",
    ".planning",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_listed(package):
    module = importlib.import_module("engrammar" + package)
    assert module.__all__ == sorted(set(module.__all__), key=lambda name: (name[0].islower(), name))
    assert set(module.__all__) <= set(dir(module))
    assert ("Public: " if package else "`__all__`") in module.__doc__
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.slow
def test_importing_registers_the_auto_classes_and_loads_neither_trainer_nor_data_sets_nor_pictures():
    code = """
import sys
import engrammar
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.for_model("engrammar").model_type == "engrammar"
assert AutoModelForCausalLM._model_mapping[engrammar.EngrammarConfig] is engrammar.EngrammarForCausalLM
heavy = {"transformers.trainer", "datasets", "pyarrow", "matplotlib", "fpdf", "mooncake", "lm_eval"} & set(sys.modules)
assert not heavy, heavy
assert engrammar.EngrammarTrainer.__name__ == "EngrammarTrainer"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_star_import_brings_the_public_names():
    names = {}
    exec("from engrammar import *", names)
    assert set(engrammar.__all__) <= set(names)
