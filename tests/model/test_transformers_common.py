"""transformers' own tests of a model (tests/test_modeling_common.py in its source archive), run on ours."""

import importlib
import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM, EngrammarModel
from engrammar.tables.shards import BACKBONE
from fetched import DATA, fetch
from models import VOCABULARY, tiny_config, tiny_memory

VERSION = "5.23.0"
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"
MODULE = "test_modeling_common"
NOT_IN_THE_ARCHIVE = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
LEFT_OUT = ("test_inputs_embeds", "test_inputs_embeds_matches_input_ids")  # memory is addressed by ids: docs say why
# The starts of the reasons for which transformers may skip: what this machine lacks, and what our models are not.
MAY_SKIP = (
    "test requires",
    "test is slow",
    "This model has no sparse experts",
    "Model is not a composite model",
    "This model is not composite",
    "No subconfigs",
    "No conversion found",
    "No sequence-to-sequence language modeling head",
    "EngrammarModel does not support SDPA",  # said of every model that is not composite
    "Model does not have position embeddings",
    "This model does not have partial rope",
    "Model does not support sliding window mask",
    "<class 'engrammar.model.modeling.EngrammarModel'> has no axial RoPE layer",
)


@pytest.fixture(scope="module")
def common() -> Iterator[Any]:
    """transformers' module of tests, imported from below `data/`."""
    if transformers.__version__ != VERSION:
        pytest.fail(f"transformers is {transformers.__version__}; this file knows the hash of {VERSION} only.")
    folder = DATA / f"transformers-{VERSION}"
    member = f"transformers-{VERSION}/tests/{MODULE}.py"
    fetch(f"transformers=={VERSION}", SHA256, {member: folder / f"{MODULE}.py"}, "--no-binary=:all:")
    with pytest.MonkeyPatch.context() as patch:

        def add(name: str, path: list[str], **content: Any) -> None:
            module = types.ModuleType(name)
            module.__dict__.update(content, __path__=path)
            patch.setitem(sys.modules, name, module)

        add("their_tests", [str(folder)])
        for name, mixin in NOT_IN_THE_ARCHIVE.items():
            add(f"their_tests.{name.split('.')[0]}", [])
            add(f"their_tests.{name}", [], **{mixin: type(mixin, (), {})})
        patch.setattr(pytest.mark, "_config", None)  # their marks are not in our list of marks
        patch.setitem(MODEL_MAPPING_NAMES, "engrammar", "EngrammarModel")
        patch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "engrammar", "EngrammarForCausalLM")
        module = importlib.import_module(f"their_tests.{MODULE}")
        patch.setattr(module, "safe_open", open_backbone)
        yield module
        del sys.modules[module.__name__]


def open_backbone(path: str, **settings: Any) -> Any:
    """`safe_open`; where there are tables, what they call model.safetensors is our backbone.safetensors."""
    backbone = Path(path).with_name(BACKBONE)
    return safe_open(str(backbone) if backbone.exists() else path, **settings)


class ModelTester:
    batch_size, seq_length, is_training = 3, 7, True
    base_model_class, causal_lm_class = EngrammarModel, EngrammarForCausalLM

    def __init__(self, dialect: str | None, num_branches: int) -> None:
        self.dialect, self.num_branches = dialect, num_branches
        config = self.get_config()
        self.num_hidden_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> EngrammarConfig:
        """Two layers, both with memory. Raw ids are hashed: a fresh model runs, as it has no class map to set."""
        memory = self.dialect and tiny_memory(self.dialect) | {"layers": [0, 1], "compression": "none"}
        return tiny_config(None, self.num_branches, num_hidden_layers=2, max_position_embeddings=64, memory=memory)

    def prepare_config_and_inputs_for_common(self) -> tuple[EngrammarConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, VOCABULARY, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.slow
@pytest.mark.parametrize(("dialect", "num_branches"), [("paper", 3), ("qwen_next", 1), (None, 2)])
def test_transformers_own_model_tests_pass(common, dialect, num_branches):
    class ModelTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
        all_model_classes = (EngrammarModel, EngrammarForCausalLM)
        test_can_init_all_missing_weights_before_2023 = True  # else a model whose file has no date is skipped

        def setUp(self) -> None:
            self.model_tester = ModelTester(dialect, num_branches)
            if dialect is not None and self._testMethodName in LEFT_OUT:
                self.skipTest("left out")

    result = unittest.TestResult()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unittest.defaultTestLoader.loadTestsFromTestCase(ModelTest).run(result)
    failed = {test.id().rsplit(".", 1)[-1]: trace for test, trace in (*result.failures, *result.errors)}
    assert not failed, f"{len(failed)} of {result.testsRun}: {', '.join(failed)}\n" + "\n".join(failed.values())
    skipped = {test.id().rsplit(".", 1)[-1]: why for test, why in result.skipped if not why.startswith(MAY_SKIP)}
    assert set(skipped) == (set() if dialect is None else set(LEFT_OUT)), skipped
    assert result.testsRun - len(result.skipped) > 90
