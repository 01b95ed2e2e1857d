"""The machine that a figure was measured on."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers


def describe_run(command: str) -> dict[str, Any]:
    """The head of a result: the command that made it, the day, and the machine."""
    return {"command": command, "date": datetime.now(UTC).date().isoformat(), "machine": describe_machine()}


def describe_machine() -> dict[str, Any]:
    """CPU, cores, and the versions that matter."""
    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # others round sums in another order
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": None if (device := accelerator()).type == "cpu" else _name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def accelerator() -> torch.device:
    """The accelerator that torch can use here, or else the CPU."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if device is None else device


def _name(device: torch.device) -> str:
    """The maker's name of the device if torch knows it, else the kind of device."""
    module = torch.get_device_module(device)
    return module.get_device_name() if hasattr(module, "get_device_name") else device.type


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
