"""transformers' Trainer with one optimizer for matrices, rows and the rest, expert balancing and sealed checkpoints."""

import inspect
import logging
import math
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from engrammar.attach.attaching import attachment_of
from engrammar.memory import memory_of
from engrammar.model.saving import WithoutTables
from engrammar.table import MemoryTable
from engrammar.tables.checksums import MANIFEST, add_to_manifest, file_stamps
from engrammar.tables.memory_json import finish_checkpoint
from engrammar.tables.sealed import PARTIAL, clear_partials, last_good, rotate, seal, verify, writing
from engrammar.tables.shards import load_backbone, remove_checkpoint
from engrammar.train import sharded
from engrammar.train.balancing import LoadBalancing
from engrammar.train.optimizer import DEFAULTS, MixedOptimizer, OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables, placement_of
from engrammar.train.scoring import LookingAhead, sum_cross_entropy
from engrammar.train.trained import check_resumable, load_trained, save_trained
from engrammar.versions import check_can_train

logger = logging.getLogger(__name__)


class EngrammarTrainer(Trainer):
    """Trains any model with (or without) memory tables.

    It overrides private methods of transformers' Trainer where there is no public way; tested with 5.23.0.
    Checkpoints are whole or absent (`engrammar.tables.sealed`); with memories attached they hold what is trained. They
    are flushed to the disk while training goes on, so `checkpoint-N` may appear after the `on_save` callbacks.

    Args:
        optimizer_settings: which optimizer trains what. Adam's own numbers and clipping are those of `args`.
        balance_rate: the step of loss-free balancing; 0 turns it off.
        bytes_per_eval_token: UTF-8 bytes per token of the evaluation text; evaluation then reports bits per byte.
        placement: keyword arguments of `place_tables`, for the time of training. Tables are sharded if there are
            several ranks. In one process, tables on the device or in RAM are the model's parameters again afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        optimizer_settings: OptimizerSettings = DEFAULTS,
        balance_rate: float = 1e-3,
        bytes_per_eval_token: float | None = None,
        placement: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_can_train()
        if args.fp16:
            raise ValueError("fp16 scales gradients where rows are not reached: use bf16=True.")
        if {"group", "reduce"} & set(placement or {}):
            raise ValueError(
                "placement has group or reduce: leave them out, since this Trainer averages over all ranks."
            )
        if optimizer_settings.max_grad_norm is not None:
            raise ValueError(
                f"optimizer_settings.max_grad_norm is {optimizer_settings.max_grad_norm}; allowed: None, since this "
                "Trainer clips to the max_grad_norm of its TrainingArguments."
            )
        super().__init__(model=model, args=args, **kwargs)
        if args.fsdp:
            sharded.check_fsdp(self.accelerator, args, optimizer_settings)
        self.optimizer_settings = optimizer_settings
        self.bytes_per_eval_token = bytes_per_eval_token
        self.counts_bytes = False  # whether `bytes_per_eval_token` is that of the set being evaluated
        self.scored = torch.zeros(2, dtype=torch.float64)  # nats and tokens of this evaluation so far
        self.placement_settings = {"where": "device", **(placement or {})}
        self.placement = placement_of(model)
        self.next_batches: Any = None  # read one step early, where stale reads are allowed
        self.partial: Path | None = None  # the folder that transformers writes to while it saves
        self.sealing: Future[None] | None = None  # the save that a thread is flushing to the disk
        if balance_rate:
            self.add_callback(LoadBalancing(model, balance_rate))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.model if model is None else model,
                self.optimizer_settings,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
            self.mixed_optimizer.exclude_rows = self.placement is not None
        return self.optimizer

    def _prepare_for_training(self, *args: Any) -> Any:
        """As in transformers, but FSDP2 sees no rows: accelerate maps the optimizer's parameters to the model's."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args)
        with sharded.preparing_without_rows(self.accelerator, lambda: self.mixed_optimizer):
            return super()._prepare_for_training(*args)

    def _shard_to_evaluate(self) -> None:
        """Shards a model that was not trained here: FSDP2 takes a model with its optimizer only."""
        optimizer = self.create_optimizer()
        with self.mixed_optimizer.without_rows():
            self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.model_wrapped = self.model

    def place(self, checkpoint: Path | None = None) -> None:
        """Takes the tables out of the model, and reads their rows from `checkpoint` if one is given."""
        model = self.accelerator.unwrap_model(self.model)
        tables = [module for module in model.modules() if isinstance(module, MemoryTable)]
        if self.placement is not None and checkpoint is not None:
            self.placement.load(checkpoint)
        elif self.placement is None and tables and self.optimizer_settings.memory != "dense_adam":
            self.placement = place_tables(model, **self.placement_settings, checkpoint=checkpoint)

    @property
    def mixed_optimizer(self) -> MixedOptimizer:
        mixed = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        assert isinstance(mixed, MixedOptimizer)
        return mixed

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clips dense gradients and the touched rows of all ranks together; returns their norm before."""
        return self.mixed_optimizer.clip_grad_norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> float:
        return float(self.mixed_optimizer.clip_grad_norm(math.inf) if grad_norm is None else grad_norm)

    def get_batch_samples(self, *args: Any) -> Any:
        """A step's batches, each with `retrieved`. Their rows are being read when this returns, each row once."""
        if self.placement is None or not self.placement.reads_together:
            return super().get_batch_samples(*args)
        samples = self.next_batches or self._retrieve(super().get_batch_samples(*args))
        if self.placement.stale:
            following = self._retrieve(super().get_batch_samples(*args))
            self.next_batches = following if following[0] else None  # an epoch's last step has none after it
        return samples

    def _retrieve(self, samples: Any) -> Any:
        """Adds `retrieved` to the batches that `get_batch_samples` returned (with their number of tokens)."""
        batches, *others = samples
        model = self.accelerator.unwrap_model(self.model)
        memory = memory_of(model)
        if memory is None or not batches or "retrieved" not in inspect.signature(model.forward).parameters:
            return samples
        known = ("input_ids", "attention_mask", "position_ids")
        inputs = [{key: batch[key].to(self.args.device) for key in known if key in batch} for batch in batches]
        reads = memory.retrieve_step(inputs)
        return [{**batch, "retrieved": retrieved} for batch, retrieved in zip(batches, reads)], *others

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains the model.

        Args:
            resume_from_checkpoint: True resumes from the last good checkpoint of the output folder, a path from that
                checkpoint.

        Raises:
            ValueError: the checkpoint is damaged, or there is none.
            OSError: a checkpoint could not be written; the one before it is whole.
        """
        out = Path(self.args.output_dir)
        if self.args.should_save:
            clear_partials(out)
        if resume_from_checkpoint is True:
            good = last_good(out)
            if good is None:
                raise ValueError(f"{out} holds no checkpoint to resume from: train without resume_from_checkpoint.")
            resume_from_checkpoint = str(good)
        if resume_from_checkpoint:
            self._check_checkpoint(Path(resume_from_checkpoint))
        self.place(Path(resume_from_checkpoint) if resume_from_checkpoint else None)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.next_batches = None
            self._finish_sealing()
            if self.placement is not None and self.placement.release():
                self.placement = None

    def _check_checkpoint(self, folder: Path) -> None:
        if (folder / MANIFEST).exists():
            verify(folder, only=None if self.args.should_save else ())  # one process reads it all
            check_resumable(folder)
        else:
            logger.warning("%s has no %s, so damage would not be noticed: resuming from it as it is.", folder, MANIFEST)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.partial is None else str(self.partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Lets transformers write into a partial folder, which a thread then seals under its final name."""
        self._finish_sealing()
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        final = run_dir / f"checkpoint-{step}"
        self.partial = run_dir / f"{PARTIAL}{final.name}"
        partial = self.partial / final.name
        try:
            with writing(final.name, run_dir, scratch=self.partial):
                super()._save_checkpoint(model, trial)
                best = run_dir / f"checkpoint-{self.state.best_global_step}"
                if best == final or best.exists():  # transformers looked for it in the partial folder
                    self.state.best_model_checkpoint = str(best)
                    if self.args.should_save:
                        self.state.save_to_json(str(partial / "trainer_state.json"))
        finally:
            self.partial = None
        self.accelerator.wait_for_everyone()  # every rank has written its part
        if self.args.should_save:
            protect = {final, Path(self.state.best_model_checkpoint or final)}
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seal")
            self.sealing = thread.submit(self._seal, partial, final, protect)
            thread.shutdown(wait=False)
        if self.args.push_to_hub:
            self._finish_sealing()
            super()._push_from_checkpoint(str(final))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; every rank also writes its rows of placed tables, and in a checkpoint their state."""
        folder = Path(output_dir or self.args.output_dir)
        before = file_stamps(folder)
        if self._is_attached:
            self._save_attached(folder)
        elif self.is_fsdp_enabled:
            self._save_sharded(folder)
        else:
            super().save_model(output_dir, _internal_call)
        if self.placement is not None and (self.partial is not None or not self._is_attached):
            self.accelerator.wait_for_everyone()
            self.placement.save(folder)
            if self.args.should_save and not self._is_attached:
                finish_checkpoint(folder)
            in_checkpoint = self.partial is not None and not self.args.save_only_model
            if in_checkpoint and self.mixed_optimizer.rows is not None:
                self.placement.save_state(folder, self.mixed_optimizer.rows)
        if self.partial is None and self.args.should_save:  # the tokenizer and other files saved beside the model
            add_to_manifest(folder, since=before)

    @property
    def _is_attached(self) -> bool:
        return attachment_of(self.accelerator.unwrap_model(self.model)) is not None

    def _save_attached(self, folder: Path) -> None:
        """Writes what is trained into a checkpoint; anywhere else what `save_pretrained` writes, with all ranks."""
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save:
            super().save_model(str(folder)) if self.partial is None else save_trained(folder, model)
        elif self.partial is None:
            model.save_pretrained(folder, is_main_process=False)

    def _save_sharded(self, folder: Path) -> None:
        """What transformers' `save_model` writes, each rank its rows."""
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            remove_checkpoint(folder)
            for part in (self.model.config, self.model.generation_config, self.processing_class):
                if part is not None:
                    part.save_pretrained(str(folder))
            torch.save(self.args, folder / "training_args.bin")
        sharded.save_model(folder, self.model)
        if self.placement is None and self.args.should_save:
            finish_checkpoint(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded.save_optimizer(Path(output_dir), self.mixed_optimizer, self.model)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is None and self.placement is not None:
            state_dict = WithoutTables(self.model.state_dict())  # `save_model` adds them
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_attached:
            load_trained(Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model))
        elif self.is_fsdp_enabled:
            sharded.load_model(Path(resume_from_checkpoint), self.model if model is None else model)
        elif self.placement is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_backbone(Path(resume_from_checkpoint), self.model if model is None else model)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self.placement is None and not self.is_fsdp_enabled and not self._is_attached:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)
        if self.placement is not None:
            self.placement.load(Path(best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled and checkpoint is not None:
            sharded.load_optimizer(Path(checkpoint), self.mixed_optimizer, self.model)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        elif checkpoint is not None and (Path(checkpoint) / sharded.OPTIMIZER).exists():
            raise ValueError(f"{checkpoint} was written with fsdp: resume it with fsdp, on any number of ranks.")
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.placement is not None and self.mixed_optimizer.rows is not None:
            self.placement.load_state(Path(checkpoint), self.mixed_optimizer.rows)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: `_save_checkpoint` uploads once the folder has its final name."""

    def _seal(self, partial: Path, final: Path, protect: Collection[Path]) -> None:
        with writing(final.name, final.parent, scratch=partial.parent):
            seal(partial, final)
            partial.parent.rmdir()
        rotate(final.parent, self.args.save_total_limit, protect)

    def _finish_sealing(self) -> None:
        """Waits until the last save is on the disk, and raises its error if it failed."""
        sealing, self.sealing = self.sealing, None
        if sealing is not None:
            sealing.result()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_sealing()
        self.accelerator.wait_for_everyone()  # the best model may be the one just sealed, and every rank loads it
        return super()._finalize_training(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in transformers: uses `compute_metrics`, and evaluates a dict of several sets one by one.

        The loss is the mean cross entropy over all scored tokens, in nats, not a mean over batches. For the trainer's
        own set (if it is one set, not a dict) bits per byte are computed from it.
        """
        own = eval_dataset is None or eval_dataset is self.eval_dataset
        self.counts_bytes = own and not isinstance(self.eval_dataset, dict)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in transformers, for `evaluate` and `predict`; the loss is that of `evaluate`."""
        model = self.accelerator.unwrap_model(self.model)
        tables = [module for module in model.modules() if isinstance(module, MemoryTable)]
        if any(table.weight is None and table.source is None for table in tables):
            self.place()
        if self.is_fsdp_enabled and not self.accelerator._models:
            self._shard_to_evaluate()
        self.scored = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        started = time.perf_counter()
        loader: Any = dataloader
        if prediction_loss_only and self.accelerator.num_processes == 1:
            # With several processes accelerate must see the last batch in its turn: it drops repeated rows there.
            loader = LookingAhead(model, dataloader)
        output = super().evaluation_loop(loader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        nats, tokens = self.scored.tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = nats / tokens
            output.metrics[f"{metric_key_prefix}_tokens_per_second"] = tokens / (time.perf_counter() - started)
        if tokens and self.counts_bytes and self.bytes_per_eval_token is not None and description == "Evaluation":
            bits = nats / tokens / math.log(2) / self.bytes_per_eval_token
            output.metrics[f"{metric_key_prefix}_bits_per_byte"] = bits
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As in transformers; shifts the labels itself, and adds to the sums of `evaluation_loop`."""
        labels = inputs.get("labels")
        if labels is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # Without labels the model computes no loss; it would be a mean, from which the sum cannot be recovered.
        unlabeled = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        _, outputs, _ = super().prediction_step(model, unlabeled, False, ignore_keys)
        labels = self._prepare_input(labels)
        sums_B2 = sum_cross_entropy(outputs[0] if isinstance(outputs, tuple) else outputs, labels)
        if self.accelerator.num_processes > 1:  # without the rows that pad the last batch
            sums_B2 = self.accelerator.gather_for_metrics(sums_B2)
        self.scored += sums_B2.sum(0)
        loss = (sums_B2[:, 0].sum() / sums_B2[:, 1].sum()).float()
        return loss, *((None, None) if prediction_loss_only else (outputs, labels))
