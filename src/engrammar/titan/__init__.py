"""Memory in torchtitan's own DeepSeek-V3: `torchrun ... -m torchtitan.train --module engrammar.titan --config NAME`.

torchtitan is the engine (FSDP2, HSDP, experts over ranks, activation checkpointing, checkpoints, logs); this package
adds retrieval, fusion, the exchange of rows and their optimizer (docs/titan.md). The core never imports it.
"""

from importlib import metadata

VERSION = "0.3.0"  # the lowest and the highest: 0.2.2 has neither `protocols.module` nor `models.common`


def require_torchtitan() -> None:
    """Raises an ImportError at another torchtitan than the one that was tested."""
    try:
        found = metadata.version("torchtitan")
    except metadata.PackageNotFoundError:
        return  # its modules say so
    if found != VERSION:
        raise ImportError(
            f"engrammar.titan works with torchtitan {VERSION}, and {found} is installed: "
            "pip install -c constraints-titan.txt -e '.[titan]' in an environment of its own."
        )


require_torchtitan()
