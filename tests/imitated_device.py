"""An accelerator for tests: torch takes its tensors for another device's, and the CPU computes what they hold.

As on a real one, an operation refuses tensors of the host beside its own, and nothing reaches NumPy without a copy.
Importing this changes the process: torch then has an accelerator, called "imitated". `tests/device` does so in a
process of its own.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "imitated"


class Module(types.ModuleType):
    """What torch knows of a kind of device: there is one of them."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_rng_state(self, _: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: object) -> None: ...


_setup_privateuseone_for_python_backend(NAME, backend_module=Module(NAME))
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten
# What takes tensors of both: copies, and indices, which may be on the host.
BOTH = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
BOTH |= {aten._index_put_impl_.default}


@dataclass
class Transfers:
    """How often something went to the host: tensors, and single numbers."""

    tensors: int = 0
    numbers: int = 0


transfers = Transfers()


class Imitated(torch.Tensor):
    """A tensor of the device; `held` is its values, a tensor of the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Imitated":
        layout: dict[str, Any] = {"layout": held.layout}
        if held.layout == torch.strided:
            layout |= {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=DEVICE, **layout)
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Imitated({self.held})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = Imitated(self.held.clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = torch.nn.Parameter(made) if isinstance(self, torch.nn.Parameter) else made
        return memo[id(self)].requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, *args, **(kwargs or {}))


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation with a tensor of the device, or that makes one."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    own = [x for x in tensors if isinstance(x, Imitated)]
    there = bool(own)
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device).type == NAME
        kwargs["device"] = "cpu"
    others = [x for x in tensors if not isinstance(x, Imitated) and x.ndim]
    if own and others and func not in BOTH:
        raise RuntimeError(f"{func} was given a tensor of the host beside the device's: {list(others[0].shape)}.")
    transfers.numbers += func is aten._local_scalar_dense.default
    if func is aten.copy_.default:
        there = isinstance(args[0], Imitated)
        held(args[0]).copy_(held(args[1]))
        transfers.tensors += not there
        return args[0]
    transfers.tensors += func is aten._to_copy.default and bool(own) and not there
    made = func(*pytree.tree_map(held, args), **pytree.tree_map(held, kwargs))
    by_held = {id(x.held): x for x in own}  # what was changed in place is returned as it was given

    def given(x: torch.Tensor) -> torch.Tensor:
        same = by_held.get(id(x))
        return Imitated(x) if same is None or same.shape != x.shape else same

    return pytree.tree_map_only(torch.Tensor, given, made) if there else made


def held(x: Any) -> Any:
    return x.held if isinstance(x, Imitated) else x


def empty(size: Any, *_: Any, dtype: Any = None, **__: Any) -> torch.Tensor:
    return Imitated(torch.empty(size, dtype=dtype))


def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return Imitated(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: torch.Tensor, made: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    held(made).copy_(held(source))
    transfers.tensors += not isinstance(made, Imitated)
    return made


def as_list(x: torch.Tensor) -> Any:
    transfers.tensors += isinstance(x, Imitated)
    return _tolist(held(x))


_all, _own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_all.fallback(run, "PrivateUse1")
_own.impl("empty.memory_format", empty, "PrivateUse1")  # these three torch calls from within itself
_own.impl("empty_strided", empty_strided, "PrivateUse1")
_own.impl("_copy_from", copy_from, "PrivateUse1")
torch.__future__.set_swap_module_params_on_conversion(True)
_tolist, torch.Tensor.tolist = torch.Tensor.tolist, as_list  # type: ignore[method-assign]
torch.Tensor.pin_memory = lambda x, *_: x  # type: ignore[method-assign]
torch.Tensor.record_stream = lambda x, _: None  # type: ignore[method-assign]
torch.accelerator.synchronize = lambda *_: None  # type: ignore[assignment]
