"""Rows are filled from the base itself as a plain loop over n-grams would fill them, and bring what follows."""

from collections import defaultdict

import pytest
import torch

from attached_models import END, PAD, attached_model, base_model, memory_config, random_ids, tokenizer
from engrammar.addressing import look_back
from engrammar.attach import attach, detach, disabled, fill_rows, load_attached, save_attached
from engrammar.attach.attaching import attachment_of
from engrammar.attach.blocks import find_decoder

BOUNDED = {"boundary": "end", "end_ids": (END,)}


class Text:
    """Three items of 12 tokens: one with an end of text, one that repeats itself, one with padding."""

    def __init__(self) -> None:
        self.ids = random_ids(3, 12)
        self.ids[0, 5], self.ids[1, 6:], self.ids[2, :4] = END, self.ids[1, :6], PAD

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(12, dtype=torch.long)
        mask[: 4 * (index == 2)] = 0
        return {"input_ids": self.ids[index], "attention_mask": mask}


@torch.no_grad()
def states(model, layer: int, item) -> torch.Tensor:
    """What a block reads of one item, [T, D], the mean over branches."""
    decoder, found = find_decoder(model), []
    hook = decoder.blocks[layer].register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs[decoder.argument]), with_kwargs=True
    )
    model(**{name: value[None] for name, value in item.items()}, use_cache=False)
    hook.remove()
    return found[0][0].view(12, -1, decoder.hidden_size).mean(1)


@torch.no_grad()
def plain_rows(model, items, layer: int, how: str, strength: float):
    """One n-gram after another: (row -> its value), and the number of rows that several n-grams read."""
    attached = attachment_of(model)["default"]
    memory, fusion, config = attached.memory, attached.fusions[str(layer)], attached.config
    reads, ngrams, targets = defaultdict(list), defaultdict(set), []
    for item in (items[i] for i in range(len(items))):
        real, ids = item["attention_mask"].bool(), item["input_ids"]
        masked = ids.masked_fill(~real, -1)[None]
        classes = look_back(masked, config=config, geometry=memory.geometry, classes_V=memory.class_of_id)
        rows = memory.addresses(ids[None], item["attention_mask"][None])[layer][0]
        with disabled(model):
            after = states(model, layer, item) if how == "hidden" else model.get_input_embeddings().weight[ids]
        for t in range(1, len(ids) - 1):
            if real[t - 1] and real[t] and real[t + 1]:
                for column, row in enumerate(rows[t].tolist()):
                    order = config.orders[column // config.num_heads]
                    reads[row].append((len(targets), column))
                    ngrams[row].add(tuple(int(one[0, t]) for one in classes[:order]))
                targets.append(after[t + 1])
    mean = torch.stack(targets).mean(0)
    size = torch.stack([(y - mean).square().mean() for y in targets]).mean().sqrt()
    weight = fusion.projection.weight[: fusion.hidden_size]
    gate = 1.0 if config.gate == "none" else 0.5
    solved = []
    for y in targets:
        wanted = strength * (y - mean) / size / gate
        solved.append(torch.linalg.lstsq(weight, wanted[:, None], rcond=1e-2, driver="gelsd").solution[:, 0])
    width = config.head_dim
    filled = {
        row: torch.stack([solved[i][c * width : (c + 1) * width] for i, c in own]).mean(0) for row, own in reads.items()
    }
    return filled, sum(len(own) > 1 for own in ngrams.values())


@pytest.mark.parametrize("how", ["embeddings", "hidden"])
@pytest.mark.parametrize(
    ("family", "head_dim", "rows"), [("llama", 6, (97, 101)), ("llama", 12, (7, 11)), ("deepseek_v4", 12, (97, 101))]
)
def test_rows_are_those_of_a_loop_over_ngrams(family, head_dim, rows, how):
    """Fewer numbers a token than the hidden width, and more; with many collisions and with few."""
    model, items = base_model(family), Text()
    attach(model, memory_config(head_dim=head_dim, rows_per_head=rows, **BOUNDED), tokenizer())
    memory = attachment_of(model)["default"].memory
    done = fill_rows(model, items, how, strength=0.7)
    for layer in (1, 2):
        expected, num_shared = plain_rows(model, items, layer, how, 0.7)
        assert (done[layer].num_rows, done[layer].num_shared) == (len(expected), num_shared)
        table = memory.table(layer).weight.detach()
        for row, values in enumerate(table):
            wanted = expected.get(row, torch.zeros(head_dim))
            torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-4)
        assert done[layer].num_positions == 10 + 10 + 6
        assert (done[layer].unreached > 0.01) == (head_dim == 6) and (num_shared > 20) == (rows == (7, 11))


@torch.no_grad()
def test_without_collisions_and_with_rows_wide_enough_the_value_is_what_was_asked():
    model = base_model("llama")
    attach(model, memory_config(layers=(2,), head_dim=12, rows_per_head=(9973, 9967), gate="none"), tokenizer())
    ids = torch.randperm(55, generator=torch.Generator().manual_seed(0))[None] + 3
    ids = ids[ids % 2 == 0][None]  # no token twice, nor two that read alike
    done = fill_rows(model, [{"input_ids": ids[0]}], strength=0.5)[2]
    assert done.num_shared == 0 and done.unreached < 1e-4
    attached = attachment_of(model)["default"]
    value = attached.fusions["2"].projection(attached.memory.retrieve(ids).wait(2)[0])[0, 1:-1]
    following = model.get_input_embeddings().weight[ids[0, 2:]]
    wanted = following - following.mean(0)
    torch.testing.assert_close(value, 0.5 * wanted / wanted.square().mean().sqrt(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_text_becomes_likelier_and_another_text_does_not(tmp_path):
    """Embeddings of a base whose head is its embeddings: they say what follows."""
    model, ids, other = base_model("llama", tie_word_embeddings=True), random_ids(4, 17), random_ids(4, 17, seed=5)
    model.get_output_embeddings().weight.mul_(10)
    attach(model, memory_config(rows_per_head=(997, 991), head_dim=12), tokenizer())

    def loss(ids):
        return float(model(ids, labels=ids).loss)

    before = loss(ids), loss(other)
    fill_rows(model, [{"input_ids": row} for row in ids], strength=1.0)
    assert before[0] - loss(ids) > 1 + max(0, before[1] - loss(other))
    save_attached(model, tmp_path / "adapter")
    served = load_attached(detach(model), tmp_path / "adapter", memory="ram")
    with pytest.raises(ValueError, match="served or placed elsewhere"):
        fill_rows(served, Text())


def test_what_cannot_be_filled_is_refused():
    model = attached_model("llama")
    with pytest.raises(ValueError, match="how is 'outputs'; allowed: embeddings, hidden"):
        fill_rows(model, Text(), "outputs")
    with pytest.raises(ValueError, match="No n-gram of the text is followed"):
        fill_rows(model, [{"input_ids": torch.tensor([3, 4])}])
    with pytest.raises(ValueError, match="All targets are equal"):
        fill_rows(model, [{"input_ids": torch.full((5,), 4)}])
    attach(model, memory_config(), tokenizer(), name="law")
    with pytest.raises(ValueError, match="has the memories default, law: name one of them"):
        fill_rows(model, Text())
    assert set(fill_rows(model, Text(), name="law")) == {1, 2}
    assert not attachment_of(model)["law"].memory.table(1).weight.eq(0).all()
