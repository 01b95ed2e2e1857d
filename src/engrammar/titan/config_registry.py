"""What `--config` can name: `debug`, `m100` (100m), `engrammar_27b` and `engrammar_40b`."""

from typing import Any

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig

from engrammar.model.configuration import EngrammarConfig
from engrammar.model.presets import preset
from engrammar.titan.metrics import MemoryMetrics
from engrammar.titan.model import titan_config
from engrammar.titan.optimizers import with_rows
from engrammar.titan.training import MemoryTrainer, NoTokenizer, PreparedTokens, spec

NUM_IDS = 512  # of `debug`


def trainer_config(name: str, config: EngrammarConfig, *, lr: float, sequence: int, batch: int) -> MemoryTrainer.Config:
    """Settings to train a model of ours on a folder that `engrammar data` wrote (`--dataloader.dataset_path`)."""
    return MemoryTrainer.Config(
        loss=CrossEntropyLoss.Config(global_vocab_size=config.vocab_size),
        model_spec=spec(name, titan_config(config)),
        tokenizer=NoTokenizer.Config(vocab_size=config.vocab_size),
        dataloader=PreparedTokens.Config(),
        metrics=MemoryMetrics.Config(log_freq=1),
        optimizer=with_rows(default_adamw(lr=lr), rows_lr=5 * lr),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(local_batch_size=batch, seq_len=sequence, steps=20, disable_cuda_graphs=True),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(enable=False, interval=10, last_save_model_only=False),
    )


def debug_model(**settings: Any) -> EngrammarConfig:
    """`micro` with a vocabulary of 512 ids that are not compressed."""
    memory = {"dialect": "paper", "compression": "none", "layers": [1, 2], "num_heads": 2, "head_dim": 16,
              "rows_per_head": [1000, 1000], "fill_id": 0}  # fmt: skip
    sizes = {"vocab_size": NUM_IDS, "num_classes": NUM_IDS, "fill_class": 0}
    return preset("micro", **{"memory": memory, **sizes, **settings})


def debug() -> MemoryTrainer.Config:
    return trainer_config("debug", debug_model(), lr=3e-3, sequence=64, batch=8)


def m100() -> MemoryTrainer.Config:
    return trainer_config("100m", preset("100m"), lr=2e-3, sequence=2048, batch=8)


def engrammar_27b() -> MemoryTrainer.Config:
    return trainer_config("27b", preset("engram-27b"), lr=4e-4, sequence=4096, batch=4)


def engrammar_40b() -> MemoryTrainer.Config:
    return trainer_config("40b", preset("engram-40b"), lr=4e-4, sequence=4096, batch=4)
