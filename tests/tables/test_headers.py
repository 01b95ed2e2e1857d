"""A safetensors header is believed only where it describes the file exactly; what is written is what is read."""

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engrammar.tables.headers import PAGE, Part, read_header, read_json, write_header

TENSORS = {
    "rows": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "none": torch.empty(0, 4),
    "bytes": torch.arange(11, dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("headers") / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_a_header_of_safetensors_says_where_each_tensor_is(path):
    parts = read_header(path)
    assert parts.keys() == TENSORS.keys()
    content = path.read_bytes()
    for name, tensor in TENSORS.items():
        part = parts[name]
        assert part.shape == tuple(tensor.shape)
        assert content[part.start : part.start + part.num_bytes] == tensor.numpy().tobytes() == part.read().tobytes()


def test_what_write_header_lays_out_is_zeros_that_safetensors_reads(tmp_path):
    path = tmp_path / "y.safetensors"
    write_header(path, {"a": ("F32", (3, 5)), "b": ("U8", (7,))})
    loaded = load_file(path)
    assert torch.equal(loaded["a"], torch.zeros(3, 5)) and torch.equal(loaded["b"], torch.zeros(7, dtype=torch.uint8))
    assert read_header(path)["a"].start % PAGE == 0


def test_blocks_hold_the_rows_asked_for(path, monkeypatch):
    monkeypatch.setattr("engrammar.tables.headers.BLOCK_BYTES", 60)  # two rows of 28 bytes
    part = read_header(path)["rows"]
    blocks = list(part.blocks(1, 3))
    assert [len(block) for block in blocks] == [2, 1]
    assert b"".join(block.tobytes() for block in blocks) == TENSORS["rows"][1:4].numpy().tobytes()
    longer = Part(**{**vars(part), "num_bytes": 56, "start": path.stat().st_size - 28, "shape": (2, 7)})
    with pytest.raises(ValueError, match="is cut off at byte"):
        longer.read()


def test_a_header_that_lies_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"

    def refused(text: str) -> str:
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(8))
        with pytest.raises(ValueError, match="x.safetensors is not right") as error:
            read_header(path)
        return str(error.value)

    def tensor(first: object, last: object, shape: tuple[int, ...] = (1,), dtype: object = "F32") -> str:
        return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [first, last]})

    assert "it is not JSON" in refused("{")
    assert "not an object" in refused("[1]")
    for text in ('{"a": 1}', '{"a": {"dtype": "F32"}}'):
        assert "tensor a in its header does not have dtype, shape and data_offsets" in refused(text)
    assert "the data_offsets of a are" in refused('{"a": ' + tensor(0.0, 8, (2,)) + "}")
    assert "the dtype of a is 'F7'" in refused('{"a": ' + tensor(0, 8, dtype="F7") + "}")
    assert "the shape of a is [-1]" in refused('{"a": ' + tensor(0, 8, (-1,)) + "}")
    assert "a is F32 [1] and has 8 bytes, not 4" in refused('{"a": ' + tensor(0, 8) + "}")
    assert "a key occurs twice" in refused(f'{{"a": {tensor(0, 4)}, "a": {tensor(4, 8)}}}')
    assert "puts b over or apart" in refused(f'{{"a": {tensor(0, 4)}, "b": {tensor(0, 4)}}}')
    assert "puts b over or apart" in refused(f'{{"a": {tensor(0, 4)}, "b": {tensor(8, 12)}}}')
    assert "it has 77 bytes, 73 by its header" in refused(f'{{"a": {tensor(0, 4)}}}')
    assert "its metadata are not texts" in refused(f'{{"__metadata__": {{"a": 1}}, "a": {tensor(0, 8, (2,))}}}')


@given(st.data())
def test_no_changed_byte_leads_to_another_error_or_other_tensors_than_safetensors_finds(path, data):
    content = bytearray(path.read_bytes())
    copy = path.with_name("changed.safetensors")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    copy.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content), 7, 90]))])
    try:
        parts = read_header(copy)
    except ValueError as error:
        assert str(copy) in str(error) and "\n" not in str(error)
        return
    with contextlib.suppress(SafetensorError), safe_open(copy, "pt") as file:  # its reader refuses a few texts more
        assert set(file.keys()) == parts.keys()


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff{}", b'{"a": NaN}', b'{"a": 1, "a": 1}', b"[" * 100_000])
def test_json_that_is_no_plain_object_is_refused_by_its_file(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"x.json is not right \(it is not"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="it is missing"):
        read_json(tmp_path / "y.json")
