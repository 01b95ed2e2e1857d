"""What machine a figure was measured on."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def describe_run(command: str) -> dict[str, Any]:
    """The head of a result: the command that made it, the day, and the machine."""
    return {"command": command, "date": datetime.now(UTC).date().isoformat(), "machine": describe_machine()}


def describe_machine() -> dict[str, Any]:
    """CPU, cores, and the versions that matter."""
    import numpy
    import torch
    import transformers

    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # of torch: others round sums in another order
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
