"""Vocabulary compression on the real DeepSeek tokenizers, and on small ones of every kind."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import engrammar.vocabulary as vocabulary
from engrammar.vocabulary import CLASSES_FILE, cached_classes, compress_vocabulary, fingerprint


def sha256(classes_V: np.ndarray) -> str:
    return hashlib.sha256(classes_V.astype("<i8").tobytes()).hexdigest()


def byte_level(texts: list[str | bytes]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens are these texts; bytes stand for what is not whole UTF-8."""
    in_bytes = dict(zip(range(256), byte_alphabet()))
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    vocab = {"".join(in_bytes[byte] for byte in token): index for index, token in enumerate(raw)}
    assert len(vocab) == len(texts)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def unigram(pieces: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece's layout: Unigram, a leading space as U+2581, single bytes as <0x..>."""
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def wordpiece(pieces: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


class WithoutBackend:
    """The same tokenizer seen as a slow one: ids are decoded one by one by transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str):
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def test_deepseek_v3_has_98627_classes(v3_tokenizer):
    classes_V = compress_vocabulary(v3_tokenizer)
    assert classes_V.shape == (128_815,) and classes_V.dtype == np.int64
    assert classes_V.max() + 1 == 98_627
    assert sha256(classes_V) == "0e84461b633329215755b30226757dc28a1c49772f351048fe3b4c2070fb7649"


def test_deepseek_v4_has_99092_classes_and_the_v3_map_as_its_beginning(v3_tokenizer, v4_tokenizer):
    classes_V = compress_vocabulary(v4_tokenizer)
    assert classes_V.shape == (129_280,) and classes_V.max() + 1 == 99_092
    assert sha256(classes_V) == "26b9be2936d236a124ba318a998c417bc7032e3e92a3107fe98deee49f1dc496"
    np.testing.assert_array_equal(classes_V[:128_815], compress_vocabulary(v3_tokenizer))


def test_the_published_compression_is_23_percent(v3_tokenizer):
    classes_V = compress_vocabulary(v3_tokenizer)
    assert 1 - (classes_V.max() + 1) / len(classes_V) == pytest.approx(0.2343, abs=1e-4)  # paper section 2.2


def test_classes_are_numbered_in_order_of_first_appearance_without_gaps(v3_tokenizer):
    classes_V = compress_vocabulary(v3_tokenizer)
    highest_before = np.maximum.accumulate(np.concatenate([[-1], classes_V[:-1]]))
    assert (classes_V <= highest_before + 1).all()
    assert len(np.unique(classes_V)) == classes_V.max() + 1


def test_what_reads_alike_is_one_class():
    texts = [
        "Apple",
        " apple",
        "APPLE",
        "ápple",
        "pear",
        " Pear\t",
        "ﬁn",
        "fin",
        "ｆｉｎ",
        "Straße",
        "strasse",
        "ΣΑΣ",
        "σας",
    ]
    classes_V = compress_vocabulary(byte_level(texts))
    # Rust lowers letter by letter and folds nothing: ß is not ss, and Σ at the end of a word is not ς as in Python.
    assert classes_V.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 5, 6]


def test_white_space_is_one_class_and_never_nothing():
    classes_V = compress_vocabulary(byte_level(["a", " ", "  ", "\n\n", " \t\r\n", "\u00a0", "\u2003", "\u200b"]))
    assert classes_V[1:7].tolist() == [1] * 6
    assert classes_V[7] == 2  # a zero-width space is no white space


def test_a_text_that_normalizes_to_nothing_keeps_its_own_class():
    acute, grave = "\u0301", "\u0300"
    assert compress_vocabulary(byte_level(["e", acute, grave, "e" + acute])).tolist() == [0, 1, 2, 0]


def test_incomplete_utf8_is_told_apart_by_its_bytes():
    texts = [b"\xc3", b"\xe2\x82", b"\xe2", b"\xa9", b"A\xc3", b"a\xc3", "é", "\ufffd"]
    assert compress_vocabulary(byte_level(texts)).tolist() == list(range(8))


def test_added_and_special_tokens_are_classes_like_any_other():
    tokenizer = byte_level(["apple", "<", "s", ">"])
    tokenizer.add_special_tokens({"eos_token": "<s>", "pad_token": "<S>"})
    tokenizer.add_tokens(["Apple", "plum "])
    classes_V = compress_vocabulary(tokenizer)
    assert len(classes_V) == len(tokenizer) == 8
    by_token = {token: classes_V[index] for token, index in tokenizer.get_vocab().items()}
    assert by_token["<s>"] == by_token["<S>"] == 4
    assert by_token["Apple"] == by_token["apple"] == 0
    assert by_token["plum "] == 5


def test_sentencepiece_pieces_read_without_their_space_mark():
    pieces = ["<unk>", "▁the", "the", "▁The", "▁", "<0x41>", "<0xC3>", "<0xA9>", "▁café", "cafe", "a"]
    classes = compress_vocabulary(unigram(pieces)).tolist()
    named = dict(zip(pieces, classes))
    assert named["▁the"] == named["the"] == named["▁The"]
    assert named["▁café"] == named["cafe"]
    assert named["<0x41>"] == named["a"]  # a byte that is a character reads as that character
    assert named["<0xC3>"] != named["<0xA9>"]  # bytes that are none are told apart by name
    assert len(set(classes)) == 7


def test_wordpiece_continuations_are_told_from_words():
    pieces = ["[UNK]", "play", "##play", "Play", "##ing", "##ING", "[unk]"]
    assert compress_vocabulary(wordpiece(pieces)).tolist() == [0, 1, 2, 1, 3, 3, 0]


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(["Apple", " apple", b"\xc3", b"\xa9x", "é", " ", "\n"]),
        unigram(["<unk>", "▁the", "the", "▁The", "▁", "<0x41>", "<0xC3>", "a", "."]),
        wordpiece(["[UNK]", "play", "##play", "Play", "##ing", ".", "n't"]),
    ],
    ids=["byte-level", "unigram", "wordpiece"],
)
def test_decoding_one_by_one_gives_the_same_classes(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<Pad>"})
    np.testing.assert_array_equal(compress_vocabulary(WithoutBackend(tokenizer)), compress_vocabulary(tokenizer))


def test_slow_and_fast_tokenizers_agree(tmp_path: Path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##play", "Play", "##ing", "café", "cafe", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"), do_lower_case=False)
    assert not hasattr(slow, "backend_tokenizer")
    np.testing.assert_array_equal(compress_vocabulary(slow), compress_vocabulary(wordpiece(pieces)))


def test_a_slow_tokenizer_of_plain_bytes_has_its_letters_merged():
    tokenizer = ByT5Tokenizer(extra_ids=3)
    classes_V = compress_vocabulary(tokenizer)
    assert len(classes_V) == len(tokenizer)
    upper, lower = (tokenizer.convert_tokens_to_ids(list(letters)) for letters in ("AZ", "az"))
    assert classes_V[upper].tolist() == classes_V[lower].tolist() and classes_V[upper[0]] != classes_V[upper[1]]


def test_the_cache_is_read_back_and_not_made_again(tmp_path, monkeypatch):
    tokenizer = byte_level(["Apple", "apple", "pear"])
    first = cached_classes(tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CLASSES_FILE]
    monkeypatch.setattr(vocabulary, "compress_vocabulary", lambda _: pytest.fail("made again"))
    again = cached_classes(tokenizer, tmp_path)
    assert again.dtype == np.int64 and again.tolist() == first.tolist() == [0, 0, 1]


def test_the_cache_of_another_tokenizer_is_not_used(tmp_path):
    first, other = byte_level(["Apple", "apple", "pear"]), byte_level(["Apple", "plum", "pear"])
    cached_classes(first, tmp_path)
    assert cached_classes(other, tmp_path).tolist() == [0, 1, 2]
    assert cached_classes(first, tmp_path).tolist() == [0, 0, 1]


@pytest.mark.parametrize("damage", ["empty", "short", "garbage", "no classes"])
def test_a_damaged_cache_is_made_anew(damage, tmp_path):
    tokenizer = byte_level(["Apple", "apple", "pear"])
    cached_classes(tokenizer, tmp_path)
    path = tmp_path / CLASSES_FILE
    whole = path.read_bytes()
    if damage == "no classes":
        header = json.dumps({"__metadata__": {"tokenizer_sha256": fingerprint(tokenizer)}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    else:
        path.write_bytes({"empty": b"", "short": whole[:-1], "garbage": b"\xff" * 64}[damage])
    assert cached_classes(tokenizer, tmp_path).tolist() == [0, 0, 1]
    with safe_open(path, framework="numpy") as file:
        assert file.get_tensor("classes").tolist() == [0, 0, 1]


def test_an_added_token_changes_the_fingerprint():
    tokenizer = byte_level(["Apple", "apple"])
    before = fingerprint(tokenizer)
    assert before == fingerprint(byte_level(["Apple", "apple"]))
    tokenizer.add_tokens(["pear"])
    assert fingerprint(tokenizer) != before
