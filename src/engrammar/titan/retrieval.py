"""The tables of a model, over all ranks that see other tokens: rows for the ids of a pass.

Letters: B batch, T tokens, H columns, E width of a token's rows, R rows of a table.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torchtitan.protocols.module import Module

from engrammar.addressing import derive_geometry
from engrammar.config import MemoryConfig
from engrammar.memory import Memory
from engrammar.model.configuration import EngrammarConfig
from engrammar.train.exchange import Sharing, Traffic, share
from engrammar.train.placement import TablePlacement, Where
from engrammar.vocabulary import compress_vocabulary, load_tokenizer

# embedding_BTE, dead_BT, starts_BT: arguments of `Fusion.forward`
Found = tuple[Tensor | None, Tensor | None, Tensor | None]
SEED_STEP = 2**40  # between the seeds of two tables, more than the blocks of rows of one


class Retrieval(Module):
    """Looks up the rows of every memory layer. Nothing of it is a parameter, so nothing wraps, cuts or moves the rows.

    In a state dict the tables are `DTensor`s cut along their rows, so that torch's distributed checkpoints bring them
    to any number of ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """`tokenizer`: the folder of the tokenizer whose ids are compressed; empty without compression."""

        memory: MemoryConfig
        vocab_size: int
        num_ids: int
        num_classes: int
        fill_class: int
        std: float = 0.02
        seed: int = 0
        tokenizer: str = ""
        where: Where = "device"
        folder: str = "tables"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings = config
        self.mesh: DeviceMesh | None = None  # of the ranks that share the tables
        self.device = torch.device("cpu")
        self.placement: TablePlacement | None = None
        self.layers = list(config.memory.layers)  # those whose tables are here
        self._hidden: tuple[Memory, ...] = ()  # a tuple: not a submodule
        self.register_state_dict_post_hook(_add_rows)
        self.register_load_state_dict_pre_hook(_take_rows)

    def join(self, mesh: DeviceMesh | None, device: torch.device, blocks: Collection[str]) -> None:
        """Says which ranks share the tables (None: this one alone), where the model is, and which blocks are here."""
        self.mesh, self.device = mesh, device
        self.layers = [layer for layer in self.layers if str(layer) in blocks]

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Draws the rows, the same ones for any number of ranks."""
        config = self.settings
        with torch.device("cpu"):
            memory = Memory(
                config.memory,
                derive_geometry(config.memory, num_classes=config.num_classes, fill_class=config.fill_class),
                num_ids=config.num_ids,
                vocab_size=config.vocab_size,
                tables="external",
            )
            if config.memory.compression != "none":
                memory.set_classes(torch.from_numpy(classes_of(config.tokenizer)))
        for index, layer in enumerate(memory.layers):
            memory.table(layer).init_seed = config.seed + index * SEED_STEP
        memory.keep(self.layers)
        memory.to(self.device)
        tables = {str(layer): memory.table(layer) for layer in memory.layers}
        group = None if self.mesh is None or self.mesh.size() == 1 else self.mesh.get_group()
        shared: Sharing = {"group": None, "reduce": "sum"}
        if group is not None:
            shared = share(on_device=config.where == "device", group=group, reduce="sum")
        self._hidden = (memory,)
        self.placement = TablePlacement(
            tables, where=config.where, folder=Path(config.folder), overlap="none", **shared
        )
        self.placement.take(config.std, self.device, torch.float32, None)

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None) -> dict[int, Found]:
        """The rows of each memory layer, by its index in the model. All ranks must call it together."""
        (memory,) = self._hidden
        retrieved = memory.retrieve(ids_BT, None, positions_BT)
        return {layer: (*retrieved.wait(layer), retrieved.starts_BT) for layer in memory.layers}

    def forget(self) -> None:
        """Drops what was read and counted so far in this step."""
        assert self.placement is not None
        self.placement.open.clear()
        self.placement.traffic = Traffic()

    @property
    def class_of_id(self) -> Tensor | None:
        """The class of each id, if ids are compressed."""
        return self._hidden[0].class_of_id

    def whole(self, name: str, own: Tensor) -> Tensor:
        """This rank's rows (or their state) of the table `name`, as a part of the whole table."""
        assert self.placement is not None
        if self.placement.group is None:
            return own.detach()
        assert self.mesh is not None
        shape = torch.Size((self.placement.modules[name].shape[0], *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own.detach(), self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def of_model(config: EngrammarConfig, **settings: Any) -> Retrieval.Config:
    """The retrieval of a model of ours."""
    assert config.memory_config is not None
    return Retrieval.Config(
        memory=config.memory_config,
        vocab_size=config.vocab_size,
        num_ids=config.num_ids or config.vocab_size,
        num_classes=config.memory_geometry.num_classes,
        fill_class=config.memory_geometry.fill_class,
        std=config.initializer_range,
        **settings,
    )


def classes_of(tokenizer: str) -> Any:
    """The class of each id of the tokenizer in this folder; raises a ValueError if no folder is given."""
    if not tokenizer:
        raise ValueError(
            "This memory compresses ids, which needs the tokenizer: give its folder with "
            "--hf_assets_path, or a memory with compression='none'."
        )
    return compress_vocabulary(load_tokenizer(tokenizer))


def own_values(given: Tensor) -> Tensor:
    return given.to_local() if isinstance(given, DTensor) else given


def _add_rows(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    if module.placement is not None:
        module.placement.flush()
        for name, own in module.placement.tables.items():
            state[f"{prefix}tables.{name}.weight"] = module.whole(name, own)


def _take_rows(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if module.placement is not None:
        for name, own in module.placement.tables.items():
            given = state.pop(f"{prefix}tables.{name}.weight", None)
            if given is not None and own_values(given).data_ptr() != own.data_ptr():
                own.data.copy_(own_values(given))
