"""Addresses: equal to the references to the bit, equal on every path, equal however a sequence is split."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrammar.addressing import (
    derive_geometry,
    hash_ngrams,
    hash_ngrams_numpy,
    look_back,
)
from engrammar.config import DIALECTS, Geometry, MemoryConfig
from engrammar.reference import hash_ngrams_reference
from engrammar.vocabulary import compress_vocabulary

END, DEAD, FILL = 3, 5, 2
NUM_IDS = 23


def small(boundary: str = "row", max_ngram_size: int = 3, num_heads: int = 2, **settings) -> MemoryConfig:
    """Raw ids, so that a class is its id."""
    return MemoryConfig(
        layers=(0, 2),
        rows_per_head=tuple(31 + 7 * order for order in range(max_ngram_size - 1)),
        max_ngram_size=max_ngram_size,
        num_heads=num_heads,
        compression="none",
        boundary=boundary,
        fill_id=FILL,
        dead_ids=(DEAD,) if boundary == "dead" else (),
        end_ids=(END,) if boundary == "end" else (),
        **settings,
    )


def geometry_of(config: MemoryConfig, num_classes: int = NUM_IDS) -> Geometry:
    return derive_geometry(config, num_classes=num_classes, fill_class=FILL)


def seen(ids: list[int], config: MemoryConfig, history=None, starts=None) -> list[list[int]]:
    """What each token sees, token by token: [[itself, one back, two back, ...], ...]."""
    looked_back = look_back(
        torch.tensor([ids]),
        config=config,
        geometry=geometry_of(config),
        history_BS=None if history is None else torch.tensor([history]),
        starts_BT=None if starts is None else torch.tensor([starts]),
    )
    return torch.stack(looked_back, -1)[0].tolist()


def rows_of(ids_BT: torch.Tensor, config: MemoryConfig, geometry: Geometry, **context) -> torch.Tensor:
    """[B, T, layers, H]"""
    looked_back = look_back(ids_BT, config=config, geometry=geometry, **context)
    layers = range(len(config.layers))
    return torch.stack(
        [hash_ngrams(looked_back, config=config, geometry=geometry, layer_index=index) for index in layers], dim=2
    )


def head_local(rows_BTLH: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """As the authors count rows: from each head's own first one."""
    offsets_LH = torch.tensor([geometry.head_offsets(index) for index in range(rows_BTLH.shape[2])])
    return rows_BTLH - offsets_LH


def load(golden, name: str) -> dict:
    return json.loads((golden / f"{name}.json").read_text())


def sha256(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()


def assert_geometry_equals(geometry: Geometry, reference: dict, layers: tuple[int, ...]) -> None:
    assert geometry.multipliers == tuple(tuple(reference["multipliers"][str(layer)]) for layer in layers)
    assert [[list(order) for order in layer] for layer in geometry.table_sizes] == [
        reference["table_sizes"][str(layer)] for layer in layers
    ]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("reference_small", {"layers": (1, 15), "rows_per_head": (1000, 1500), "num_heads": 4, "head_dim": 8}),
        (
            "reference_4gram_single_branch",
            {"layers": (0, 3, 7), "rows_per_head": (300, 400, 500), "num_heads": 2, "seed": 7, "fill_id": 1}
            | {"max_ngram_size": 4, "head_dim": 8},
        ),
    ],
)
def test_the_authors_text_has_the_authors_addresses(name, settings, golden, v3_tokenizer):
    reference = load(golden, name)
    config = replace(DIALECTS["demo"], **settings)
    classes_V = torch.from_numpy(compress_vocabulary(v3_tokenizer))
    fill_class = int(classes_V[config.fill_id])
    assert fill_class == reference["compressed_pad_id"]
    geometry = derive_geometry(config, num_classes=98_627, fill_class=fill_class)
    assert_geometry_equals(geometry, reference, config.layers)
    text_ids = v3_tokenizer(reference["text"], add_special_tokens=False)["input_ids"]
    assert text_ids == reference["text_ids"]
    rows_BTLH = head_local(rows_of(torch.tensor([text_ids]), config, geometry, classes_V=classes_V), geometry)
    for index, layer in enumerate(config.layers):
        assert rows_BTLH[0, :, index].tolist() == reference["text_hashes"][str(layer)]


def test_the_demo_has_its_geometry_hashes_and_parameters(golden, v3_tokenizer):
    reference = load(golden, "reference_default_geometry")
    config = DIALECTS["demo"]
    classes_V = torch.from_numpy(compress_vocabulary(v3_tokenizer))
    geometry = derive_geometry(config, num_classes=98_627, fill_class=int(classes_V[config.fill_id]))
    assert_geometry_equals(geometry, reference, config.layers)
    assert sum(geometry.num_rows(index) for index in (0, 1)) * config.head_dim == 1_324_313_984
    ids_BT = torch.from_numpy(np.random.default_rng(42).integers(0, 128_815, size=(4, 512)))
    rows_BTLH = head_local(rows_of(ids_BT, config, geometry, classes_V=classes_V), geometry)
    for index, layer in enumerate(config.layers):
        rows_BTH = rows_BTLH[:, :, index]
        assert rows_BTH[0, :3].tolist() == reference["first_row"][str(layer)]
        assert sha256(rows_BTH) == reference["hash_sha256_int64_le"][str(layer)]


def test_deepseek_v41_has_its_geometry_row_counts_and_hashes(golden, v4_tokenizer):
    reference = load(golden, "deepseek_v41_geometry")
    config = DIALECTS["deepseek_v41"]
    classes_V = torch.from_numpy(compress_vocabulary(v4_tokenizer))
    geometry = derive_geometry(config, num_classes=99_092, fill_class=int(classes_V[config.fill_id]))
    assert_geometry_equals(geometry, reference, config.layers)
    assert [geometry.num_rows(index) for index in (0, 1)] == [384_006_168, 384_016_682]
    ids_BT = torch.from_numpy(np.random.default_rng(41).integers(0, 129_280, size=(1, 64)))
    rows_BTLH = head_local(rows_of(ids_BT, config, geometry, classes_V=classes_V), geometry)
    for index, layer in enumerate(config.layers):
        assert rows_BTLH[0, -1, index].tolist() == reference["last_position"][str(layer)]
        assert sha256(rows_BTLH[:, :, index]) == reference["hash_sha256_int64_le"][str(layer)]


def test_qwen_has_its_row_count_and_padding():
    geometry = derive_geometry(DIALECTS["qwen_next"], num_classes=248_320, fill_class=248_044)
    assert geometry.num_rows(0) == 320_001_446
    assert geometry.num_stored_rows(0) == 320_001_536


@pytest.mark.parametrize(("rows_per_head", "billions"), [(2_262_400, 5.79), (7_239_680, 18.53)])
def test_the_papers_tables_have_the_papers_size(rows_per_head, billions):
    config = replace(DIALECTS["paper"], rows_per_head=(rows_per_head,) * 2)
    geometry = derive_geometry(config, num_classes=98_627, fill_class=2)
    parameters = sum(geometry.num_rows(index) for index in (0, 1)) * config.head_dim
    assert round(parameters / 1e9, 2) == billions


@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=4),
    st.integers(1, 5),
    st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True),
)
@settings(deadline=None, max_examples=60)
def test_table_sizes_are_distinct_primes_of_at_least_the_rows_asked_for(rows_per_head, num_heads, layers):
    config = MemoryConfig(
        layers=tuple(sorted(layers)),
        rows_per_head=tuple(rows_per_head),
        max_ngram_size=len(rows_per_head) + 1,
        num_heads=num_heads,
    )
    geometry = geometry_of(config)
    sizes = [size for layer in geometry.table_sizes for order in layer for size in order]
    assert len(set(sizes)) == len(sizes) == len(layers) * len(rows_per_head) * num_heads
    assert all(size > 1 and all(size % divisor for divisor in range(2, int(size**0.5) + 1)) for size in sizes)
    taken: set[int] = set()  # the definition: from rows_per_head - 1, the next prime not yet used
    for layer in geometry.table_sizes:
        for asked, order in zip(rows_per_head, layer):
            for size in order:
                primes = (n for n in range(asked, size) if all(n % d for d in range(2, int(n**0.5) + 1)))
                assert size >= asked and all(prime in taken for prime in primes)
                taken.add(size)


@given(st.integers(1, 2**40), st.integers(0, 2**31), st.sampled_from(["numpy", "splitmix64"]))
@settings(deadline=None, max_examples=60)
def test_multipliers_are_odd_and_keep_the_mix_inside_int64(num_classes, seed, source):
    config = small(max_ngram_size=5, seed=seed, multipliers=source)
    geometry = derive_geometry(config, num_classes=num_classes, fill_class=0)
    for multipliers_N in geometry.multipliers:
        assert len(multipliers_N) == 5
        assert all(m % 2 == 1 and 0 < m * (num_classes - 1) < 2**63 for m in multipliers_N if num_classes > 1)


@pytest.mark.parametrize("fill_class", [-1, NUM_IDS])
def test_a_fill_class_outside_the_classes_is_refused(fill_class):
    with pytest.raises(ValueError, match=f"fill_class is {fill_class}; allowed: 0 to num_classes-1 = {NUM_IDS - 1}"):
        derive_geometry(small(), num_classes=NUM_IDS, fill_class=fill_class)


def test_heads_lie_end_to_end():
    config = small(max_ngram_size=4, num_heads=3)
    geometry = geometry_of(config)
    for index in (0, 1):
        sizes = [size for order in geometry.table_sizes[index] for size in order]
        offsets = geometry.head_offsets(index)
        assert offsets[0] == 0 and len(offsets) == config.num_columns
        assert [after - before for before, after in zip(offsets, offsets[1:])] == sizes[:-1]
        assert offsets[-1] + sizes[-1] == geometry.num_rows(index)


@st.composite
def configs(draw) -> MemoryConfig:
    max_ngram_size = draw(st.integers(2, 6))
    boundary = draw(st.sampled_from(["row", "dead", "end"]))
    return small(
        boundary, max_ngram_size, num_heads=draw(st.integers(1, 3)), seed=draw(st.integers(0, 99))
    )  # 1 to 5 orders


@st.composite
def sequences(draw, min_size: int = 1) -> list[int]:
    """Ids with ends and dead ones among them, masked at the left or anywhere."""
    real = st.one_of(st.integers(0, NUM_IDS - 1), st.sampled_from([END, DEAD, -1]))
    return [-1] * draw(st.integers(0, 4)) + draw(st.lists(real, min_size=min_size, max_size=13))


@given(configs(), sequences())
@settings(deadline=None, max_examples=150)
def test_torch_numpy_and_the_definition_give_the_same_rows(config, ids):
    geometry = geometry_of(config)
    looked_back = look_back(torch.tensor([ids]), config=config, geometry=geometry)
    for index in (0, 1):
        chosen = {"config": config, "geometry": geometry, "layer_index": index}
        rows_BTH = hash_ngrams(looked_back, **chosen)
        assert rows_BTH[0].tolist() == hash_ngrams_reference(ids, **chosen)
        rows = hash_ngrams_numpy([classes.numpy() for classes in looked_back], **chosen)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(rows, rows_BTH.numpy())


def test_the_largest_classes_do_not_overflow():
    num_classes = 129_280
    config = small(max_ngram_size=5)
    geometry = geometry_of(config, num_classes)
    ids = [num_classes - 1 - k for k in range(11)]
    looked_back = look_back(torch.tensor([ids]), config=config, geometry=geometry)
    chosen = {"config": config, "geometry": geometry, "layer_index": 1}
    expected = hash_ngrams_reference(ids, **chosen)  # Python integers, which cannot overflow
    assert hash_ngrams(looked_back, **chosen)[0].tolist() == expected
    assert hash_ngrams_numpy([classes.numpy() for classes in looked_back], **chosen)[0].tolist() == expected


def test_each_column_is_in_its_heads_part_of_the_table():
    config = small(max_ngram_size=4)
    geometry = geometry_of(config)
    rows_BTLH = rows_of(torch.randint(0, NUM_IDS, (3, 401), generator=torch.manual_seed(0)), config, geometry)
    for index in (0, 1):
        sizes = torch.tensor([size for order in geometry.table_sizes[index] for size in order])
        local_BTH = head_local(rows_BTLH, geometry)[:, :, index]
        assert (local_BTH >= 0).all() and (local_BTH < sizes).all()


def carried_history(past: list[int], starts: list[bool] | None, size: int) -> list[int]:
    """The N-1 raw ids that a caller carries over a split: -1 before the row, and before the last packed document."""
    if starts is not None and any(starts):
        begin = max(t for t, start in enumerate(starts) if start)
        past = [-1] * begin + past[begin:]
    return ([-1] * size + past)[len(past) :]


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_any_split_equals_whole(data):
    config = data.draw(configs())
    geometry = geometry_of(config)
    ids = data.draw(sequences(min_size=2))
    starts = data.draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    cuts = data.draw(st.lists(st.integers(1, len(ids) - 1), max_size=3, unique=True))
    edges = [0, *sorted(cuts), len(ids)]
    packed = None if starts is None else torch.tensor([starts])
    whole = rows_of(torch.tensor([ids]), config, geometry, starts_BT=packed)
    parts = []
    for begin, end in zip(edges, edges[1:]):
        past = None if starts is None else starts[:begin]
        history_BS = torch.tensor([carried_history(ids[:begin], past, config.max_ngram_size - 1)])
        part = None if packed is None else packed[:, begin:end]
        chunk = torch.tensor([ids[begin:end]])
        parts.append(rows_of(chunk, config, geometry, history_BS=history_BS, starts_BT=part))
    assert torch.equal(torch.cat(parts, dim=1), whole)


@given(configs(), sequences(), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_left_padding_changes_no_row(config, ids, padding):
    geometry = geometry_of(config)
    padded = rows_of(torch.tensor([[-1] * padding + ids]), config, geometry)
    assert torch.equal(padded[:, padding:], rows_of(torch.tensor([ids]), config, geometry))


@given(configs(), sequences(), sequences())
@settings(deadline=None, max_examples=60)
def test_packed_documents_have_the_rows_they_have_alone(config, first, second):
    geometry = geometry_of(config)
    starts = torch.zeros(1, len(first) + len(second), dtype=torch.bool)
    starts[0, 0] = starts[0, len(first)] = True
    packed = rows_of(torch.tensor([first + second]), config, geometry, starts_BT=starts)
    alone = [rows_of(torch.tensor([ids]), config, geometry) for ids in (first, second)]
    assert torch.equal(packed, torch.cat(alone, dim=1))


def test_the_start_of_a_row_looks_back_to_the_fill_class():
    assert seen([7, 8, 9], small()) == [[7, FILL, FILL], [8, 7, FILL], [9, 8, 7]]
    assert seen([7], small(), history=[4, 6]) == [[7, 6, 4]]
    assert seen([7], small(), history=[-1, 6]) == [[7, 6, FILL]]


def test_a_masked_token_is_not_seen_and_not_seen_through():
    assert seen([7, -1, 9, 10], small()) == [[7, FILL, FILL], [FILL] * 3, [9, FILL, FILL], [10, 9, FILL]]


def test_end_and_dead_ids_are_ordinary_where_only_the_row_bounds():
    assert seen([7, END, DEAD, 8], small())[-1] == [8, DEAD, END]


def test_a_dead_id_is_not_seen_and_not_seen_through():
    config = small("dead")
    assert seen([7, DEAD, 9, 10], config) == [[7, FILL, FILL], [FILL] * 3, [9, FILL, FILL], [10, 9, FILL]]
    assert seen([9], config, history=[7, DEAD]) == [[9, FILL, FILL]]


def test_an_end_id_belongs_to_its_own_segment_and_not_to_the_next():
    config = small("end")
    assert seen([7, 8, END, 9, 10], config)[2:] == [[END, 8, 7], [9, FILL, FILL], [10, 9, FILL]]
    assert seen([END, END, 9], config) == [[END, FILL, FILL], [END, FILL, FILL], [9, FILL, FILL]]
    assert seen([9, 10], config, history=[7, END]) == [[9, FILL, FILL], [10, 9, FILL]]


def test_a_packed_document_does_not_see_the_one_before():
    starts = [True, False, True, False]
    assert seen([7, 8, 9, 10], small(), starts=starts)[2:] == [[9, FILL, FILL], [10, 9, FILL]]
    assert seen([7], small(), history=[4, 6], starts=[True]) == [[7, FILL, FILL]]


def test_classes_are_hashed_and_raw_ids_bound():
    """Two ids of one class: only the dead one breaks look-back."""
    config = replace(small("dead"), compression="normalized")
    classes_V = torch.arange(NUM_IDS)
    classes_V[6] = classes_V[DEAD]
    context = {"config": config, "geometry": geometry_of(config), "classes_V": classes_V}
    looked_back = look_back(torch.tensor([[7, 6, 9, DEAD, 9]]), **context)
    assert torch.stack(looked_back, -1)[0].tolist()[2:] == [[9, DEAD, 7], [FILL] * 3, [9, FILL, FILL]]


@pytest.mark.parametrize("classes_V", [None, torch.arange(NUM_IDS)], ids=["raw", "classes"])
def test_an_id_outside_the_vocabulary_is_refused(classes_V):
    context = {"config": small(), "geometry": geometry_of(small()), "classes_V": classes_V}
    message = f"Token id {NUM_IDS} is outside the vocabulary of {NUM_IDS} ids"
    with pytest.raises(ValueError, match=message):
        look_back(torch.tensor([[1, NUM_IDS, 2]]), **context)
    with pytest.raises(ValueError, match=message):
        look_back(torch.tensor([[1]]), history_BS=torch.tensor([[NUM_IDS, 2]]), **context)


@pytest.mark.parametrize("boundary", ["row", "dead", "end"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiling_breaks_no_graph_and_changes_no_row(boundary, backend):
    config = small(boundary, max_ngram_size=4)
    geometry = geometry_of(config)
    classes_V = torch.arange(NUM_IDS)

    def fetch(ids_BT, history_BS, starts_BT):
        context = {"classes_V": classes_V, "history_BS": history_BS, "starts_BT": starts_BT}
        return rows_of(ids_BT, config, geometry, **context)

    torch._dynamo.reset()
    compiled = torch.compile(fetch, fullgraph=True, backend=backend)
    generator = torch.manual_seed(0)
    for num_tokens in (17, 5, 1):
        ids_BT = torch.randint(-1, NUM_IDS, (3, num_tokens), generator=generator)
        history_BS = torch.randint(-1, NUM_IDS, (3, 3), generator=generator)
        starts_BT = torch.rand(3, num_tokens, generator=generator) < 0.2
        assert torch.equal(compiled(ids_BT, history_BS, starts_BT), fetch(ids_BT, history_BS, starts_BT))


def test_meta_tensors_give_shapes_without_reading_values():
    config = small("end", max_ngram_size=4, num_heads=3)
    ids_BT = torch.zeros(2, 7, dtype=torch.int64, device="meta")
    classes_V = torch.zeros(NUM_IDS, dtype=torch.int64, device="meta")
    rows_BTLH = rows_of(ids_BT, config, geometry_of(config), classes_V=classes_V)
    assert rows_BTLH.shape == (2, 7, 2, 9) and rows_BTLH.device.type == "meta"


def test_a_history_of_the_wrong_length_is_refused():
    for history in ([9, 4, 6], [6]):
        with pytest.raises(ValueError, match=f"The history holds {len(history)} ids; give the 2 before"):
            seen([7, 8], small(), history=history)


def test_narrow_integers_give_the_rows_of_wide_ones():
    context = {"config": small(), "geometry": geometry_of(small())}
    ids_BT = torch.tensor([[NUM_IDS - 1, 5, 8, NUM_IDS - 2]])
    wide, narrow = (look_back(ids.clone(), **context) for ids in (ids_BT, ids_BT.int()))
    rows = [hash_ngrams(looked_back, layer_index=0, **context) for looked_back in (wide, narrow)]
    assert torch.equal(*rows)
