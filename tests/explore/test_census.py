"""A census knows what a corpus says, counted in plain code, and who shares a row."""

from collections import Counter

import pytest
import torch

from attached_models import attached_model, tokenizer
from edited_models import OURS, WITH_MEMORY, model_of_kind
from engrammar_explore.census import BATCH_TOKENS, Census, CensusSettings, build_census
from engrammar_explore.looking import look
from engrammar_explore.watching import places_of

ROWS, TOKENS = 60, 40


@pytest.fixture(scope="module", params=[OURS, WITH_MEMORY])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("census")
    memory = places_of(model_of_kind(request.param))[0].memory
    draw = torch.Generator().manual_seed(3)
    texts = [
        " ".join(f"w{one}" for one in torch.randint(0, 12, (TOKENS,), generator=draw).tolist()) for _ in range(ROWS)
    ]
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text)
    about = build_census(memory, tokenizer(), str(folder), folder / "c.safetensors")
    return memory, texts, about, Census(folder / "c.safetensors", memory, tokenizer())


def plain_counts(memory, texts, order: int) -> Counter:
    found = Counter()
    for text in texts:
        classes = memory.class_of_id[torch.tensor(tokenizer()(text).input_ids)].tolist()
        found.update(tuple(classes[at : at + order]) for at in range(len(classes) - order + 1))
    return found


def test_counts_equal_those_of_plain_code(made):
    memory, texts, about, census = made
    assert about["tokens"] == ROWS * TOKENS and about["forgotten"] == {"2": 0, "3": 0}
    for order in memory.config.orders:
        counts = plain_counts(memory, texts, order)
        assert all(census.count(ngram) == count for ngram, count in counts.items())
        absent = next(ngram for ngram in ((a, *[3] * (order - 1)) for a in range(30)) if ngram not in counts)
        assert census.count(absent) == 0


def test_who_shares_a_row_equals_a_search_through_all_ngrams(made):
    memory, texts, _, census = made
    layer = memory.config.layers[-1]
    for column in (0, memory.config.num_columns - 1):
        counts = plain_counts(memory, texts, memory.config.orders[column // memory.config.num_heads])
        row_of = dict(zip(counts, rows_read(memory, layer, column, list(counts))))
        for ngram in list(counts)[:3]:
            others = {one for one in counts if row_of[one] == row_of[ngram] and one != ngram}
            found = census.sharing(layer, column, ngram, most=1000)
            assert found["num"] == len(others)
            wanted = Counter((census.name_of(one), counts[one]) for one in others)
            for kind in ("often", "near"):
                assert Counter((one["text"], one["count"]) for one in found[kind]) == wanted
            told = [one["count"] for one in found["often"]]
            assert told == sorted(told, reverse=True)


def rows_read(memory, layer: int, column: int, ngrams: list[tuple[int, ...]]) -> list[int]:
    """The row of each n-gram by the memory's own addresses."""
    id_of = {int(one): token for token, one in enumerate(memory.class_of_id)}
    ids = torch.tensor([[id_of[one] for one in ngram] for ngram in ngrams])
    return memory.addresses(ids)[layer][:, -1, column].tolist()


def test_a_look_tells_who_shares(made):
    memory, texts, _, census = made
    ngram = tuple(memory.class_of_id[torch.tensor(tokenizer()("w3 w4").input_ids)].tolist())
    model = next(one for kind in (OURS, WITH_MEMORY) if fits(one := model_of_kind(kind), memory))
    told = look(model, tokenizer(), "w3 w4", census=census)["details"][1]["memories"][0]["orders"][0]
    assert told["count"] == plain_counts(memory, texts, 2)[ngram]
    assert told["rows"][0]["shared"] == census.sharing(memory.config.layers[0], 0, ngram)


def fits(model, memory) -> bool:
    return places_of(model)[0].memory.geometry == memory.geometry


def test_memory_is_bounded_and_what_is_forgotten_is_said(made, tmp_path):
    memory, texts, _, _ = made
    (tmp_path / "a.txt").write_text("\n".join(texts))
    settings = CensusSettings(most_ngrams=20)
    about = build_census(memory, tokenizer(), str(tmp_path / "a.txt"), tmp_path / "c", settings)
    census = Census(tmp_path / "c", memory, tokenizer())
    for order in memory.config.orders:
        assert about["forgotten"][str(order)] > 0
        counts = plain_counts(memory, ["\n".join(texts)], order)
        assert sum(census.count(ngram) > 0 for ngram in counts) == 20
        assert all(census.count(ngram) <= count for ngram, count in counts.items())
    few = build_census(memory, tokenizer(), str(tmp_path / "a.txt"), tmp_path / "d", CensusSettings(most_tokens=100))
    assert few["tokens"] == 100 < BATCH_TOKENS


def test_a_census_of_another_memory_or_no_census_is_refused(made, tmp_path):
    memory, _, _, census = made
    other = places_of(attached_model("llama", memory={"rows_per_head": (131, 137)}))[0].memory
    with pytest.raises(ValueError, match="census of another memory"):
        Census(census.path, other, tokenizer())
    (tmp_path / "no").write_bytes(b"nothing")
    for path in (tmp_path / "no", tmp_path / "absent"):
        with pytest.raises(ValueError, match="is no census"):
            Census(path, memory, tokenizer())
