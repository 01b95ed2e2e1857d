"""`nano` from one start, 200 steps on real text on a CPU, by torchtitan and by our Trainer.

usage: PYTHONPATH=tests .venv-titan/bin/python tests/titan/side_by_side.py [WORK-FOLDER RESULTS.json]
torchtitan on two ranks shows how far rounding alone takes two runs apart. A run that is in the work folder is kept.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import titan_cpu  # a CPU in place of an accelerator
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainingArguments

from engrammar.model.presets import preset
from engrammar.titan import config_registry as configs
from engrammar.titan.names import ours_at
from engrammar.train.data import TokenSet, prepare
from engrammar.train.optimizer import OptimizerSettings
from engrammar.train.recipe import DataRecipe
from engrammar.train.trainer import EngrammarTrainer
from engrammar.vocabulary import compress_vocabulary
from engrammar_lab.machine import describe_run
from processes import environment

STEPS, BATCH, LENGTH, LR = 200, 8, 128, 2e-3
SHAPES = f"nano, {STEPS} steps of {BATCH} x {LENGTH} tokens of pocket:wiki, AdamW without decay, constant lr {LR}, fp32"
COMMAND = "PYTHONPATH=tests .venv-titan/bin/python tests/titan/side_by_side.py"


def nano(tokens: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    return preset("nano", tokenizer=tokenizer, classes_V=compress_vocabulary(tokenizer))


def noted(notes: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def by_torchtitan(work: Path, name: str, eps: float, *arguments: str, ranks: int = 1) -> list[dict[str, float]]:
    """Runs this file as the ranks of torchrun."""
    notes = work / f"{name}.json"
    if (work / name).exists():
        return noted(notes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    command += [str(notes), f"--optimizer.rows_eps={eps}", "--module=engrammar.titan", "--config=nano"]
    command += [f"--dataloader.dataset_path={work / 'tokens'}", f"--hf_assets_path={work / 'tokens' / 'tokenizer'}"]
    command += [f"--dump_folder={work / name}", f"--training.steps={STEPS}", "--lr_scheduler.warmup_steps=0"]
    command += ["--lr_scheduler.min_lr_factor=1", "--training.mixed_precision_param=float32", "--debug.seed=1"]
    command += [f"--training.local_batch_size={BATCH // ranks}"]
    done = subprocess.run([*command, *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return noted(notes)


class InOrder(EngrammarTrainer):
    """Reads the sequences in order; targets are given, as torchtitan gives them."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        logits_BTV = model(input_ids=inputs["input_ids"], retrieved=inputs.get("retrieved")).logits
        return cross_entropy(logits_BTV.flatten(0, 1), inputs["targets"].flatten())


def by_ours(work: Path, eps: float) -> list[dict[str, float]]:
    if (notes := work / f"ours-{eps}.json").exists():
        return noted(notes)
    tokens = TokenSet.open(work / "tokens")
    model = ours_at(next((work / "seed" / "checkpoint").iterdir()), nano(work / "tokens"), str(tokens.tokenizer_path))
    read = (tokens.read("train", LENGTH * index, LENGTH * (index + 1) + 1) for index in range(STEPS * BATCH))
    rows = [torch.from_numpy(row) for row in read]
    settings = TrainingArguments(
        str(work / "ours"), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=LR, weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=eps, max_grad_norm=1.0, lr_scheduler_type="constant",
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, use_cpu=True,
    )  # fmt: skip
    trainer = InOrder(
        model,
        settings,
        optimizer_settings=OptimizerSettings(matrices="adamw"),
        train_dataset=[{"input_ids": row[:-1], "targets": row[1:]} for row in rows],
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    with notes.open("w") as file:
        for entry in logged:
            print(json.dumps({"step": entry["step"], "loss": entry["loss"], "norm": entry["grad_norm"]}), file=file)
    return noted(notes)


def compare(work: Path, eps: float) -> dict[str, Any]:
    seed = next((work / "seed" / "checkpoint").iterdir())
    start = ("--checkpoint.enable", f"--checkpoint.interval={10 * STEPS}", f"--checkpoint.initial_load_path={seed}")
    runs = {
        "torchtitan": by_torchtitan(work, f"titan-{eps}", eps, *start),
        "torchtitan, two ranks": by_torchtitan(work, f"two-ranks-{eps}", eps, *start, ranks=2),
        "trainer": by_ours(work, eps),
    }
    first, *others = ([step["loss"] for step in run] for run in runs.values())
    apart = {}
    for name, losses in zip([*runs][1:], others, strict=True):
        found = [abs(one - two) for one, two in zip(first, losses, strict=True)]
        over = next((step for step, difference in enumerate(found, 1) if difference > 1e-3), None)
        apart[name] = {"first_10_steps": max(found[:10]), "all_steps": max(found), "first_step_over_1e-3": over}
    return {
        "eps": eps,
        "largest_difference_to_torchtitan": apart,
        "mean_of_last_20_steps": {name: sum(step["loss"] for step in run[-20:]) / 20 for name, run in runs.items()},
        "losses": {name: [step["loss"] for step in run] for name, run in runs.items()},
        "norms": {name: [step["norm"] for step in run] for name, run in runs.items()},
    }


def main(work: Path, results: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    prepare(DataRecipe(limit_documents=4000), out=work / "tokens", cache=Path("data/pocket"))
    by_torchtitan(work, "seed", 1e-8, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")
    runs = [compare(work, eps) for eps in (1e-3, 1e-8)]
    results.write_text(json.dumps({**describe_run(COMMAND), "shapes": SHAPES, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 3:  # a rank
        (place,) = [given.partition("=")[2] for given in sys.argv if given.startswith("--dataloader.dataset_path=")]
        (eps,) = [float(given.partition("=")[2]) for given in sys.argv if given.startswith("--optimizer.rows_eps=")]
        configs.default_adamw = lambda lr: titan_cpu.plain_adamw(lr=lr, eps=eps, weight_decay=0.0)
        configs.nano = lambda: configs.trainer_config("nano", nano(Path(place)), lr=LR, sequence=LENGTH, batch=BATCH)
        titan_cpu.main()
    else:
        work, results = sys.argv[1:] or ("runs/side-by-side", "results/bench/titan.json")
        main(Path(work), Path(results))
