"""The device that ENGRAMMAR_DEVICE names; without it nothing here is collected (`tests/lab/bench` runs it imitated)."""

import os

from torch import Tensor

NAME = os.environ.get("ENGRAMMAR_DEVICE")
collect_ignore_glob = [] if NAME else ["test_*.py"]
if NAME == "imitated":
    import imitated_device
    from engrammar.attach import blocks, fingerprints

    def is_plain(weight: Tensor) -> bool:
        return blocks.is_plain(imitated_device.held(weight.detach()))

    fingerprints.is_plain = is_plain  # a tensor of another class is taken for a quantized one
