"""A backbone that FSDP2 has cut along dimension 0: checkpoints into which each rank writes its rows.

The files are plain safetensors, as of a backbone in one piece: `from_pretrained` reads the weights, and any number of
ranks reads weights and optimizer state.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainingArguments

from engrammar.tables.headers import read_header
from engrammar.tables.shards import WHOLE, is_table, lay_out, read_rows, weight_map, write_rows
from engrammar.train.exchange import own_rows
from engrammar.train.optimizer import MixedOptimizer, OptimizerSettings

OPTIMIZER = "optimizer.safetensors"
GROUPS = "optimizer.json"


def save_model(folder: Path, model: nn.Module) -> None:
    """Writes the weights of a model, except tables and tied weights, into one file. All ranks must call it."""
    _write(folder / WHOLE, _backbone(model))


def load_model(folder: Path, model: nn.Module) -> None:
    """Reads the weights of a checkpoint, each rank its part; raises a ValueError if it is of another model."""
    weights, own = weight_map(folder), _backbone(model)
    saved = {name for name in weights if not is_table(name)}
    if saved != own.keys():
        wrong = min(saved ^ own.keys())
        raise ValueError(f"{folder} is a checkpoint of another model: they differ in {wrong}; copy it again.")
    for name, tensor in own.items():
        _read(folder / weights[name], name, tensor)


def save_optimizer(folder: Path, mixed: MixedOptimizer, model: nn.Module) -> None:
    """Writes the state of every parameter of the model, and the settings of the groups. All ranks must call it."""
    _write(folder / OPTIMIZER, dict(_states(mixed, model)))
    if _is_first():
        groups = [{key: value for key, value in group.items() if key != "params"} for group in mixed.param_groups]
        (folder / GROUPS).write_text(json.dumps(groups) + "\n")


def load_optimizer(folder: Path, mixed: MixedOptimizer, model: nn.Module) -> None:
    """Reads what `save_optimizer` wrote, on any number of ranks; raises a ValueError if that does not fit."""
    path = folder / OPTIMIZER
    if not path.exists():
        raise ValueError(f"{folder} has no {OPTIMIZER}: it was written without fsdp; resume it without, or train anew.")
    groups = json.loads((folder / GROUPS).read_text())
    saved, own = ([group.get("name") for group in some] for some in (groups, mixed.param_groups))
    if saved != own:
        raise ValueError(f"The saved groups are {saved}; this optimizer's are {own}.")
    for group, settings in zip(mixed.param_groups, groups):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
    header, names = read_header(path), {id(param): name for name, param in model.named_parameters()}
    keys: dict[str, list[str]] = {}
    for full in header:
        name, _, key = full.rpartition(".")
        keys.setdefault(name, []).append(key)
    for optimizer in mixed.inner:
        for param in [] if optimizer is mixed.rows else [p for g in optimizer.param_groups for p in g["params"]]:
            name = names[id(param)]
            optimizer.state[param] = {}
            for key in keys.get(name, []):
                whole = tuple(header[f"{name}.{key}"].shape) == tuple(param.shape)
                value = torch.zeros_like(param, requires_grad=False) if whole and param.ndim else torch.zeros(1)
                _read(path, f"{name}.{key}", value)
                optimizer.state[param][key] = value if whole else value[0].clone()


def _states(mixed: MixedOptimizer, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = {id(param): name for name, param in model.named_parameters()}
    for optimizer in mixed.inner:
        for param, state in optimizer.state.items() if optimizer is not mixed.rows else ():
            for key, value in state.items():
                yield f"{names[id(param)]}.{key}", value if value.ndim else value.view(1)  # Adam's count of steps


def _backbone(model: nn.Module) -> dict[str, Tensor]:
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    return {name: tensor for name, tensor in model.state_dict().items() if not is_table(name) and name not in tied}


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _own_part(tensor: Tensor) -> tuple[int, Tensor]:
    """This rank's first row of a DTensor, and its rows; of any other tensor all rows."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    if tuple(tensor.placements) != (Shard(0),):
        raise ValueError(
            f"A weight is placed as {tensor.placements}; allowed: cut along dimension 0 over one group of ranks "
            "(FSDP2 without replicas, tensor or expert parallelism)."
        )
    first, end = own_rows(tensor.shape[0], tensor.device_mesh.get_group())
    local = tensor.to_local()
    assert len(local) == end - first, (local.shape, first, end)
    return first, local


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if _is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        lay_out(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    _barrier()
    for name, tensor in tensors.items():
        first, rows = _own_part(tensor.detach())
        if len(rows) and (isinstance(tensor, DTensor) or _is_first()):
            write_rows(path, name, first, rows)
    _barrier()


@torch.no_grad()
def _read(path: Path, name: str, tensor: Tensor) -> None:
    first, rows = _own_part(tensor)
    if len(rows):
        read_rows(path, name, first, rows)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def check_fsdp(accelerator: Any, args: TrainingArguments, settings: OptimizerSettings) -> None:
    """Raises a ValueError unless accelerate really uses FSDP2: on a CPU it would train DDP without a word."""
    if settings.memory == "dense_adam":
        raise ValueError(
            "optimizer_settings.memory is 'dense_adam', which needs whole tables: choose another with fsdp."
        )
    if args.push_to_hub:
        raise ValueError("push_to_hub is set with fsdp: leave it out, and upload the saved folder.")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_config has version {plugin.fsdp_version}; allowed: 2.")
    if not accelerator.is_fsdp2:
        raise ValueError(
            "fsdp is set, but accelerate shards models on accelerators only and would train this one whole on every "
            "rank: leave fsdp out."
        )


@contextmanager
def preparing_without_rows(accelerator: Any, mixed: Callable[[], MixedOptimizer]) -> Iterator[None]:
    """Hides the rows while accelerate prepares an optimizer, whose parameters it maps to those of the model."""
    prepare = accelerator.prepare

    def prepare_without_rows(*objects: Any, **kwargs: Any) -> Any:
        with mixed().without_rows():
            return prepare(*objects, **kwargs)

    accelerator.prepare = prepare_without_rows  # of this instance, over the class's method
    try:
        yield
    finally:
        del accelerator.prepare
