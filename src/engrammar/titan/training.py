"""The seams in torchtitan: ranks share tables, clipping moves to the optimizers, tokens come from our folders."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig
from torchtitan.distributed.pipeline_parallel import (
    _generate_llm_fqn_per_model_part,
    _get_pipeline_metadata,
    pipeline_llm,
)
from torchtitan.models.deepseek_v3 import parallelize_deepseekv3
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.utils import get_local_device
from torchtitan.trainer import Trainer

from engrammar.titan.model import MemoryModel
from engrammar.titan.names import Adapter
from engrammar.titan.optimizers import MemoryOptimizers, after_build
from engrammar.titan.retrieval import Retrieval
from engrammar.train.data import TokenSet

COUNTS = ("tokens_per_expert_E", "gate_total")  # buffers that a pass adds to


def parallelize(model: MemoryModel, *, parallel_dims: Any, **settings: Any) -> Any:
    """torchtitan's own, after the tables have been told which ranks share them: all that see other tokens."""
    if model.retrieval is not None:
        model.retrieval.join(parallel_dims.get_optional_mesh("loss"), get_local_device(), model.layers.keys())
    return parallelize_deepseekv3(model, parallel_dims=parallel_dims, **settings)


def pipeline(
    model: MemoryModel, *, parallel_dims: Any, parallelism: ParallelismConfig, model_config: Any, **settings: Any
) -> tuple[Any, list[nn.Module], bool, bool]:
    """torchtitan's own, with retrieval in the stages that have memory layers, and the head beside the last norm."""
    chosen = {"parallel_dims": parallel_dims, "parallelism": parallelism, "model_config": model_config}
    parts = parallelism.module_fqns_per_model_part
    if parts is None:
        parts = _generate_llm_fqn_per_model_part(*_get_pipeline_metadata(**chosen))
    with_memory = {f"layers.{layer}" for layer in model_config.retrieval.memory.layers}
    parts = [
        [*part, *["retrieval"] * bool(with_memory.intersection(part)), *["head"] * ("norm" in part)] for part in parts
    ]
    chosen["parallelism"] = replace(parallelism, module_fqns_per_model_part=parts)
    schedule, model_parts, is_first, is_last = pipeline_llm(model, **chosen, **settings)
    for part in model_parts:
        _forget_first_pass(part)
    return schedule, model_parts, is_first, is_last


def _forget_first_pass(part: nn.Module) -> None:
    """torch's stages learn their shapes by a pass of values that were never set: it must not be counted."""
    passes: list[None] = []

    def forget(*_: Any) -> None:
        passes.append(None)
        if len(passes) == 2:  # the backward pass of the first, which may compute again and count again, is over
            hook.remove()
            for module in part.modules():
                if isinstance(module, Retrieval):
                    module.forget()
                for name, counts in module.named_buffers(recurse=False):
                    if name in COUNTS:
                        counts.zero_()

    hook = part.register_forward_pre_hook(forget)


def spec(flavor: str, model: MemoryModel.Config) -> ModelSpec:
    return ModelSpec(
        name="engrammar",
        flavor=flavor,
        model=model,
        parallelize_fn=parallelize,
        pipelining_fn=pipeline,
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

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """As in torchtitan; every stage of a pipeline gets the ids."""
        ids = {"ids": input_dict["input"]} if self.parallel_dims.pp_enabled else {}
        return super().post_dataloading_process({**input_dict, **ids}, labels)

    def pp_forward_backward_step(
        self, *, input_dict_mbs: list[dict[str, Tensor]], label_mbs: list[Tensor], global_valid_tokens: Tensor
    ) -> Tensor:
        """torchtitan 0.3.0 hands microbatches to the schedule; that of torch 2.13 takes a batch and cuts it itself."""
        batch = {name: torch.cat([one[name] for one in input_dict_mbs]) for name in input_dict_mbs[0]}
        inputs, labels, others = self.post_dataloading_process(batch, torch.cat(label_mbs))
        losses: list[Tensor] = []
        with self.train_context():
            self.pp_schedule.step(
                *([inputs] if self.pp_has_first_stage else []),
                target=labels if self.pp_has_last_stage else None,
                losses=losses if self.pp_has_last_stage else None,
                loss_kwargs={"global_valid_tokens": global_valid_tokens},
                return_outputs=False,
                **others,
            )
        # Other stages have no loss; torchtitan logs that of the last one.
        return torch.stack(losses).sum().to(self.device) if losses else torch.tensor([-1.0], device=self.device)


class NoTokenizer(BaseTokenizer):
    """For tokens that are prepared: nothing is encoded while training."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        vocab_size: int

    def __init__(self, config: Config, *, tokenizer_path: str | None = None) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size

    def encode(self, *_: Any, **__: Any) -> Any:
        raise ValueError("The tokens are prepared: there is no tokenizer here.")

    decode = encode

    def get_vocab_size(self) -> int:
        return self.vocab_size


class PreparedTokens(BaseDataLoader):
    """Sequences of a folder that `engrammar data` wrote, in order; the same ones a step on any number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """`end_ids`: positions restart after these ids, so that neither attention nor look-back leaves a document."""

        end_ids: tuple[int, ...] = ()

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
        self.end_ids = torch.tensor(config.end_ids, dtype=torch.long)
        self.next = 0  # the first sequence, over all ranks, of the next batch

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            first = self.next + self.rank * self.batch
            rows = [self._read((first + index) % self.num_sequences) for index in range(self.batch)]
            self.next += self.batch * self.num_ranks
            ids_BT = torch.stack(rows)
            inputs_BT = ids_BT[:, :-1].contiguous()
            yield {"input": inputs_BT, "positions": self.positions(inputs_BT, self.end_ids)}, ids_BT[:, 1:].contiguous()

    @staticmethod
    def positions(ids_BT: Tensor, end_ids: Tensor) -> Tensor:
        """Positions that begin at 0 after each of the `end_ids`."""
        positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        starts_BT = torch.zeros_like(ids_BT)
        starts_BT[:, 1:] = positions_BT[:, 1:] * torch.isin(ids_BT[:, :-1], end_ids)
        return positions_BT - starts_BT.cummax(1).values

    def _read(self, sequence: int) -> Tensor:
        start = sequence * self.length
        return torch.from_numpy(self.tokens.read("train", start, start + self.length + 1))

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.next = state_dict.get("next", 0)
