"""The device that ENGRAMMAR_DEVICE names. Without it the tests of a module that imports this are left out."""

import os

import pytest
import torch
from torch import Tensor

if "ENGRAMMAR_DEVICE" not in os.environ:
    pytest.skip("`tests/lab/bench` runs these on an imitated device, `make gpu` on a real one", allow_module_level=True)
if os.environ["ENGRAMMAR_DEVICE"] == "imitated":
    import imitated_device
    from engrammar.attach import blocks, fingerprints

    def is_plain(weight: Tensor) -> bool:
        return blocks.is_plain(imitated_device.held(weight.detach()))

    fingerprints.is_plain = is_plain  # a tensor of another class is taken for a quantized one
DEVICE = torch.device(os.environ["ENGRAMMAR_DEVICE"])
