"""`save_pretrained` of a model with an attached memory whose rows are shared out over ranks: one folder, all rows."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from attached_models import attached_model, random_ids
from engrammar import load_attached
from engrammar.attach.attaching import attachment_of
from engrammar.train.placement import place_tables
from processes import succeed_on_ranks


def tables_of(model):
    (attached,) = attachment_of(model).memories().values()
    return {layer: attached.memory.table(layer) for layer in attached.memory.config.layers}


def save(folder) -> None:
    """What each rank does: it places the memory's rows, of which it holds its share, and saves."""
    dist.init_process_group("gloo")
    model = attached_model("llama")
    rows = {layer: len(table.weight) for layer, table in tables_of(model).items()}
    placement = place_tables(model, where="ram")
    assert sum(map(len, placement.tables.values())) < sum(rows.values())
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_write_one_folder_with_all_rows(tmp_path):
    succeed_on_ranks(2, tmp_path, save, tmp_path / "both")
    model, ids = attached_model("llama"), random_ids(2, 13)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both", attn_implementation="eager")
    load_attached(loaded, tmp_path / "both" / "engrammar" / "default")
    for layer, table in tables_of(model).items():
        assert torch.equal(tables_of(loaded)[layer].weight, table.weight)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
