"""Memory in torchtitan's own DeepSeek-V3: `torchrun ... -m torchtitan.train --module engrammar.titan --config NAME`.

torchtitan is the engine (FSDP2, HSDP, experts over ranks, activation checkpointing, checkpoints, logs); this package
adds retrieval, fusion, the exchange of rows and their optimizer (docs/titan.md). The core never imports it.
"""
