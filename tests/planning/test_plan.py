"""The planner: what it counts equals what a hand counts, and its rows are the model's."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engrammar.config import DIALECTS, MemoryConfig
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.planning import plan as planning
from engrammar.planning import touches
from engrammar.planning.speeds import Costs, Speeds, measure_speeds
from engrammar.planning.touches import Sample
from engrammar.stores.cache import CachedStore
from engrammar.stores.serving import load_hot_rows
from engrammar.tables.released import import_tables
from engrammar.tables.shards import HOT_ROWS
from engrammar.train.data import train_tokenizer
from engrammar_cli.main import main
from models import VOCABULARY, tiny_model
from released_models import qwen_model, qwen_release

TEXT = "the cat sat on the mat and the dog lay by the door of the house in the rain . "


def sample_of(*lengths, prompt_tokens=100):
    documents = [np.arange(length, dtype=np.int64) for length in lengths]
    return Sample.of_documents(documents, prompt_tokens)


def column(*rows):
    return np.array(rows, dtype=np.int64)[:, None]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], vocab_size=300, path=folder)
    return folder


def test_documents_are_cut_into_prompts():
    sample = sample_of(5, 2, prompt_tokens=2)
    assert sample.ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert sample.prompt_T.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert sample.starts_T.tolist() == [True, False, True, False, True, True, False]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_rows_are_those_that_the_model_reads(dialect):
    model = tiny_model(dialect)
    memory = model.model.memory
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 40)
    sample = Sample.of_documents([ids[:23], ids[23:]], prompt_tokens=17)
    classes_V = None if memory.config.compression == "none" else memory.class_of_id.numpy()
    for index, layer in enumerate(memory.config.layers):
        rows_TH = touches.touched_rows(sample, memory.config, memory.geometry, classes_V, index)
        for prompt in range(sample.prompt_T[-1] + 1):
            here_T = sample.prompt_T == prompt
            rows_BTH = memory.addresses(torch.from_numpy(sample.ids_T[here_T])[None])[layer]
            assert np.array_equal(rows_TH[here_T], rows_BTH[0].numpy())


def test_pinned_rows_hit_as_counted_by_hand():
    known, asked = column(5, 5, 5, 2, 9, 2), column(2, 7, 2, 5)
    assert touches.hot_rows(known).tolist() == [5, 2, 9]
    assert touches.pinned_hits(known, asked).tolist() == [0, 1, 3, 3]
    assert touches.pinned_hits(asked, asked).tolist() == [0, 2, 3, 4]
    assert touches.hot_rows(column(3, 1, 2)).tolist() == [1, 2, 3]  # of equals the smaller first


def test_no_cache_hits_a_row_that_never_came():
    assert touches.seen_share(column(1, 2), column(1, 3, 3, 4)) == 0.5


@given(st.lists(st.integers(0, 60), min_size=4, max_size=300), st.sampled_from([8, 16, 32]))
def test_a_cache_hits_no_more_than_came_before(rows, cache_rows):
    rows_TH = column(*rows)
    known, asked = np.split(rows_TH, [len(rows_TH) // 2])
    assert touches.cached_share(rows_TH, 61, cache_rows) <= touches.seen_share(known, asked)
    curve_S = touches.pinned_hits(known, asked)
    assert (np.diff(curve_S) >= 0).all()
    assert curve_S[-1] / asked.size <= touches.seen_share(known, asked)
    best_S = touches.pinned_hits(asked, asked)
    shared = min(len(curve_S), len(best_S))
    assert (curve_S[:shared] <= best_S[:shared]).all()  # nothing pinned beats hindsight


def test_a_cache_that_holds_all_rows_hits_all():
    assert touches.cached_share(column(*range(5), *range(5)).repeat(2, axis=0), 100, 800) == 1.0


def test_repeats_count_within_a_prompt_only():
    rows_TH = np.array([[1, 2], [1, 3], [1, 2]])
    assert touches.repeated_share(rows_TH, sample_of(3), 10) == pytest.approx(3 / 6)  # 1 twice more, 2 once more
    assert touches.repeated_share(rows_TH, sample_of(2, 1), 10) == pytest.approx(1 / 6)


def test_pages_are_those_that_rows_lie_on():
    rows_TH = np.array([[0, 1], [63, 64]])
    assert touches.pages_per_token(rows_TH, sample_of(2), 64) == (1.5, 1.0)
    assert touches.pages_per_token(rows_TH, sample_of(1, 1), 64) == (1.5, 1.5)
    assert touches.pages_per_token(column(1, 3), sample_of(2), 4000) == (2.0, 2.0)  # 4000-7999 and 12000-15999
    assert touches.pages_per_token(column(1, 3), sample_of(2), 12_288) == (3.0, 3.0)
    assert touches.pages_per_token(column(1), sample_of(1), 8_000) == (3.0, 3.0)  # 8000-15999


def test_the_smallest_cache_is_the_first_that_hits_enough():
    curve_S = np.array([0, 0.25, 0.75, 0.75])
    wanted = {0.0: 0, 0.25: 1, 0.3: 2, 0.75: 2, 0.76: None}
    assert {rate: planning.smallest_cache(curve_S, rate) for rate in wanted} == wanted


def test_tokens_per_second_follow_from_the_machine():
    memory = MemoryConfig(layers=(1, 2), rows_per_head=(100,), max_ngram_size=2, num_heads=5)  # 10 rows a token
    speeds = Speeds(ram_rows_per_s=1000, disk_reads_per_s=100, compute_tokens_per_s=50)
    costs = Costs(memory=memory, speeds=speeds, pages_per_row=1.5)
    assert costs.tokens_per_s("ram", 0.3) == pytest.approx(
        {"rows_alone": 100, "prefetched": 50, "waiting": 1 / (1 / 100 + 1 / 50)}
    )
    # a miss: 1 ms for the row and 15 ms for its pages
    assert costs.tokens_per_s("disk", 0.8)["rows_alone"] == pytest.approx(1 / (10 * (0.8 * 1e-3 + 0.2 * 16e-3)))
    assert costs.tokens_per_s("remote", 0.8) is None
    needed = costs.hit_rate_for("disk", 20)
    assert costs.tokens_per_s("disk", needed)["prefetched"] == pytest.approx(20)
    assert costs.hit_rate_for("disk", 1) == 0
    assert costs.hit_rate_for("disk", 51) > 1  # more than the model alone


def test_a_machine_is_read_or_refused_in_a_sentence(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text('{"disk_reads_per_s": 5e4}')
    assert Speeds.read(path) == Speeds(disk_reads_per_s=5e4)
    for text, wrong in (
        ("{", "not a machine"),
        ('{"speed": 1}', "speed.*ram_rows_per_s"),
        ('{"ram_rows_per_s": 0}', "above 0"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=wrong):
            Speeds.read(path)


@pytest.mark.slow
def test_a_machine_that_nobody_described_is_measured(tmp_path):
    speeds = measure_speeds(64, tmp_path)
    assert speeds.ram_rows_per_s > speeds.disk_reads_per_s > 100
    assert not list(tmp_path.iterdir())


def test_hot_rows_are_saved_in_the_order_to_pin_them(tmp_path):
    hot = {1: np.array([7, 3, 5]), 14: np.array([2])}
    touches.save_hot_rows(hot, tmp_path / HOT_ROWS)
    loaded = load_hot_rows(tmp_path)
    assert {layer: rows.tolist() for layer, rows in loaded.items()} == {1: [7, 3, 5], 14: [2]}
    cache = CachedStore(touches._Counted(10), 16)
    cache.pin(loaded[1])
    cache.fetch(loaded[1]).wait()
    assert (cache.hits, cache.misses) == (3, 0)


def test_a_text_that_repeats_itself_is_planned(tmp_path, tokenizer_folder, capsys):
    corpus, machine, out = tmp_path / "text.jsonl", tmp_path / "machine.json", tmp_path / "out"
    corpus.write_text((json.dumps({"text": TEXT}) + "\n") * 40)
    machine.write_text('{"ram_rows_per_s": 1e6, "disk_reads_per_s": 5e4}')
    arguments = [
        "table",
        "plan",
        "nano",
        str(corpus),
        str(out),
        "--tokenizer",
        str(tokenizer_folder),
        "--machine",
        str(machine),
    ]
    main([*arguments, "--hit-rate", "1", "--tokens-per-s", "30000", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made == json.loads((out / "plan.json").read_text())
    assert {"command", "date", "machine", "sample", "caches", "encodings", "tiers", "wanted"} <= made.keys()
    (touched,) = made["sample"]["rows_touched"]
    assert made["sample"]["prompts"] == 40
    assert made["sample"]["seen_before"] == 1.0
    assert made["caches"][-1]["pinned"] == made["caches"][-1]["dynamic"] == 1.0
    wanted = {entry["wish"]: entry for entry in made["wanted"]}
    assert wanted["hit rate 1"]["cache_rows"] == touched  # every prompt is the same: it takes all of its rows
    assert 0 < wanted["30,000 tokens/s, disk"]["cache_rows"] < touched
    assert wanted["30,000 tokens/s, ram"]["cache_rows"] == 0
    assert len(load_hot_rows(out)[1]) == touched
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_and_its_tables_alone_are_planned_alike(tmp_path, tokenizer_folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model, tables, corpus, machine = (tmp_path / name for name in ("model", "tables", "text.txt", "machine.json"))
    EngrammarForCausalLM.from_preset("micro", tokenizer=tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    main(["table", "pack", str(model), str(tables), "--tables-only"])
    corpus.write_text(TEXT * 5)
    machine.write_text("{}")
    made = []
    for folder, extra in ((model, []), (tables, ["--tokenizer", str(tokenizer_folder)])):
        capsys.readouterr()
        arguments = [str(folder), str(corpus), str(tmp_path / "out"), "--machine", str(machine)]
        main(["table", "plan", *arguments, "--prompt-tokens", "20", "--json", *extra])
        made.append(json.loads(capsys.readouterr().out))
        assert load_hot_rows(folder).keys() == {1}
    assert made[0]["caches"] == made[1]["caches"]
    assert made[0]["tiers"][0]["disk"] is None  # no speed is known


def test_a_released_model_is_planned_by_its_settings_alone_as_by_its_tables(tmp_path, tokenizer_folder, capsys):
    release = qwen_release(qwen_model(torch.bfloat16, vocab_size=300), tmp_path / "release")
    corpus, machine = tmp_path / "text.txt", tmp_path / "machine.json"
    import_tables(release, tmp_path / "tables")
    (tmp_path / "settings").mkdir()
    shutil.copy(release / "config.json", tmp_path / "settings")
    corpus.write_text("the cat sat on the mat ")
    machine.write_text("{}")
    made = []
    for name in ("settings", "tables"):
        arguments = [str(tmp_path / name), str(corpus), str(tmp_path / f"out-{name}")]
        arguments += ["--tokenizer", str(tokenizer_folder), "--machine", str(machine), "--json"]
        capsys.readouterr()
        main(["table", "plan", *arguments])
        made.append(json.loads(capsys.readouterr().out))
    for key in ("sample", "caches", "encodings"):
        assert made[0][key] == made[1][key]
    assert load_hot_rows(tmp_path / "out-settings").keys() == load_hot_rows(tmp_path / "tables").keys() == {0, 2}
    settings = json.loads((release / "config.json").read_text())
    for quantization, encoding in ({"quant_method": "fp8"}, "fp8"), (None, "bf16"):
        (tmp_path / "settings" / "config.json").write_text(json.dumps(settings | {"quantization_config": quantization}))
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        assert planning.Addresses.of_model(str(tmp_path / "settings"), tokenizer).memory.row_encoding == encoding


def test_mistakes_are_one_sentence(tmp_path, tokenizer_folder, capsys):
    corpus = tmp_path / "text.txt"
    corpus.write_text(TEXT)
    for arguments, said in (
        (["nano", str(corpus)], "nano comes without a tokenizer: give one with --tokenizer"),
        (["none", str(corpus), "--tokenizer", str(tokenizer_folder)], "There is no model 'none'"),
        (["moe-27b", str(corpus), "--tokenizer", str(tokenizer_folder)], "moe-27b has no memory"),
        (["nano", str(corpus), "--tokenizer", str(tmp_path)], "holds no tokenizer"),
        (["nano", str(tmp_path / "x"), "--tokenizer", str(tokenizer_folder)], "no text at"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["table", "plan", arguments[0], arguments[1], str(tmp_path / "out"), *arguments[2:]])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
