"""Run in a process of its own: a table of 0.9 GB is drawn, trained, saved and loaded, under a limit if given.

usage: memory_worker.py WHERE FOLDER REPORT [CGROUP]
"""

import json
import os
import sys
from pathlib import Path

where, folder, report = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
for group in sys.argv[4:]:  # before torch is imported: all of the process's memory counts
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))

import torch  # noqa: E402

from engrammar.model.modeling import EngrammarForCausalLM  # noqa: E402
from engrammar.train.optimizer import OptimizerSettings, build_optimizer  # noqa: E402
from engrammar.train.placement import place_tables  # noqa: E402
from models import VOCABULARY, tiny_config  # noqa: E402

HEAD_ROWS = 870_000  # of each of four heads, 256 bytes a row


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = tiny_config("paper")
    memory = {**config.memory, "layers": [1], "head_dim": 64, "rows_per_head": [HEAD_ROWS, HEAD_ROWS]}
    model = EngrammarForCausalLM(tiny_config("paper", memory=memory), tables="external").train()
    model.model.memory.set_classes(torch.arange(VOCABULARY) % 41)
    placement = place_tables(model, where=where, folder=folder)
    (table,) = placement.tables.values()
    optimizer = build_optimizer(
        model, OptimizerSettings(max_grad_norm=1.0), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    losses = []
    for seed in range(5):
        ids = torch.randint(3, 53, (8, 64), generator=torch.Generator().manual_seed(seed))
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    some = torch.arange(0, len(table), 9973)
    trained = table.detach()[some].clone()
    saved = folder / "saved"
    model.save_pretrained(saved)
    placement.save_state(saved, optimizer.rows)
    placement.load(saved)
    placement.load_state(saved, optimizer.rows)
    assert torch.equal(table.detach()[some], trained)
    ids = torch.randint(3, 53, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses.append(model(ids, labels=ids).loss.item())
    report.write_text(
        json.dumps(
            {
                "losses": losses,
                "sum_of_some_rows": trained.double().sum().item(),
                "table_bytes": table.nbytes,
                # Not ru_maxrss, which starts at the peak of the process that started this one.
                "peak_bytes": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
