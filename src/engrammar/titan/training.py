"""The seams in torchtitan: ranks share tables, clipping moves to the optimizers, tokens come from our folders."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.deepseek_v3 import parallelize_deepseekv3
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.utils import get_local_device
from torchtitan.trainer import Trainer

from engrammar.titan.model import MemoryModel
from engrammar.titan.names import Adapter
from engrammar.titan.optimizers import MemoryOptimizers, after_build
from engrammar.train.data import TokenSet


def parallelize(model: MemoryModel, *, parallel_dims: Any, **settings: Any) -> Any:
    """torchtitan's own, after the tables have been told which ranks share them: all that see other tokens."""
    model.retrieval.join(parallel_dims.get_optional_mesh("loss"), get_local_device())
    return parallelize_deepseekv3(model, parallel_dims=parallel_dims, **settings)


def spec(flavor: str, model: MemoryModel.Config) -> ModelSpec:
    return ModelSpec(
        name="engrammar",
        flavor=flavor,
        model=model,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=after_build,
        state_dict_adapter=Adapter,
    )


class MemoryTrainer(Trainer):
    """torchtitan's Trainer; `training.max_norm` clips rows too."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config) -> None:
        assert isinstance(config.optimizer, MemoryOptimizers.Config)
        config.optimizer.max_norm, config.training.max_norm = config.training.max_norm, math.inf
        super().__init__(config)


class NoTokenizer(BaseTokenizer):
    """For tokens that are prepared: nothing is encoded while training."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        vocab_size: int

    def __init__(self, config: Config, *, tokenizer_path: str | None = None) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise ValueError("The tokens are prepared: there is no tokenizer here.")

    def decode(self, *_: Any, **__: Any) -> str:
        raise ValueError("The tokens are prepared: there is no tokenizer here.")

    def get_vocab_size(self) -> int:
        return self.vocab_size


class PreparedTokens(BaseDataLoader):
    """Sequences of a folder that `engrammar data` wrote, in order; the same ones a step on any number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, **settings: Any) -> None:
        if not config.dataset_path:
            raise ValueError("--dataloader.dataset_path names no folder: give one that `engrammar data` wrote.")
        self.length, self.batch = settings["seq_len"], settings["local_batch_size"]
        self.rank, self.num_ranks = settings["dp_rank"], settings["dp_world_size"]
        self.tokens = TokenSet.open(Path(config.dataset_path))
        if self.tokens.vocab_size > (size := settings["tokenizer"].get_vocab_size()):
            raise ValueError(
                f"{config.dataset_path} has a vocabulary of {self.tokens.vocab_size} ids, the model one of {size}: "
                "prepare the text with the model's tokenizer."
            )
        self.num_sequences = (self.tokens.num_tokens("train") - 1) // self.length
        if self.num_sequences < self.batch * self.num_ranks:
            raise ValueError(f"{config.dataset_path} has {self.num_sequences} sequences, fewer than a step reads.")
        self.next = 0  # the first sequence, over all ranks, of the next batch

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            first = self.next + self.rank * self.batch
            rows = [self._read((first + index) % self.num_sequences) for index in range(self.batch)]
            self.next += self.batch * self.num_ranks
            ids_BT = torch.stack(rows)
            positions_BT = torch.arange(self.length).expand(self.batch, -1).contiguous()
            yield {"input": ids_BT[:, :-1].contiguous(), "positions": positions_BT}, ids_BT[:, 1:].contiguous()

    def _read(self, sequence: int) -> Tensor:
        start = sequence * self.length
        return torch.from_numpy(self.tokens.read("train", start, start + self.length + 1))

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.next = state_dict.get("next", 0)
