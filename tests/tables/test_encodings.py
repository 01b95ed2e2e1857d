"""Encodings of rows: against plain twins, within their error bounds, and back to the same values."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engrammar.config import row_bytes
from engrammar.tables.encodings import decode, encode

ENCODINGS = ("fp32", "bf16", "fp8", "fp8_row", "fp8_scale32", "int8", "int4")
TABLE_SCALE = 0.0323


def scale_of(encoding):
    return TABLE_SCALE if encoding == "fp8" else None


def e4m3(byte):
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.nan if byte & 127 == 127 else -size if sign else size


def floats(row, start, kind):
    if kind == "bf16":
        return [struct.unpack("<f", b"\0\0" + row[i : i + 2])[0] for i in range(start, len(row), 2)]
    return [value for (value,) in struct.iter_unpack("<f", row[start:])]


def decode_reference(row, width, encoding):
    """One row's values in double precision, a byte at a time."""
    if encoding in ("fp32", "bf16"):
        return floats(row, 0, encoding)
    if encoding == "fp8":
        return [e4m3(byte) * TABLE_SCALE for byte in row]
    if encoding == "fp8_row":
        return [e4m3(byte) * floats(row, width, "fp32")[0] for byte in row[:width]]
    if encoding == "fp8_scale32":
        return [e4m3(row[i]) * 2.0 ** (row[width + i // 32] - 127) for i in range(width)]
    if encoding == "int8":
        return [(byte - 256 * (byte > 127)) * floats(row, width, "fp32")[0] for byte in row[:width]]
    scales, values = floats(row, -(-width // 2), "bf16"), []
    for i in range(width):
        number = row[i // 2] >> 4 if i % 2 else row[i // 2] & 15
        values.append((number - 16 * (number > 7)) * scales[i // 32])
    return values


def error_bound(values_UC, encoding):
    """The largest error [U, C] that the table in rows.py allows; a little more for the roundings of fp32."""
    size = values_UC.abs().double()
    if encoding == "fp32":
        return torch.zeros_like(size)
    if encoding == "bf16":
        return size * 2**-8 + 1e-40
    groups = [size] if encoding in ("fp8_row", "int8") else size.split(32, 1)
    most = torch.cat([group.amax(1, keepdim=True).expand_as(group) for group in groups], 1)
    if encoding == "fp8":
        return (size / 16).clamp_min(TABLE_SCALE * 2**-10) * (1 + 1e-6)
    if encoding in ("fp8_row", "fp8_scale32"):
        step = most / (448 if encoding == "fp8_row" else 224) * 2**-9
        return torch.maximum(size / 16, step / 2) * (1 + 1e-5) + 1e-38
    return (most / 127 / 2 if encoding == "int8" else most / 8) * (1 + 2**-7) + 1e-38


@st.composite
def tables(draw):
    num_rows, width = draw(st.integers(0, 5)), draw(st.integers(1, 97))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(num_rows, width, generator=generator)
    values *= 2.0 ** torch.randint(-draw(st.integers(1, 149)), 2, (num_rows, width), generator=generator)
    return values * (torch.rand(num_rows, width, generator=generator) > draw(st.sampled_from([0.0, 0.3, 0.9])))


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=60, deadline=None)
@given(values_UC=tables())
def test_errors_stay_within_bounds_and_zeros_are_kept(encoding, values_UC):
    rows_US = encode(values_UC, encoding, scale_of(encoding))
    assert rows_US.shape == (len(values_UC), row_bytes(encoding, values_UC.shape[1])) and rows_US.dtype == torch.uint8
    found = decode(rows_US, values_UC.shape[1], encoding, torch.float32, scale_of(encoding))
    assert ((found.double() - values_UC.double()).abs() <= error_bound(values_UC, encoding)).all()
    assert not found[values_UC == 0].any()


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=60, deadline=None)
@given(values_UC=tables())
def test_decoded_rows_encode_to_the_same_values(encoding, values_UC):
    width, scale = values_UC.shape[1], scale_of(encoding)
    once = decode(encode(values_UC, encoding, scale), width, encoding, torch.float32, scale)
    assert torch.equal(decode(encode(once, encoding, scale), width, encoding, torch.float32, scale), once)


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 97), seed=st.integers(0, 2**32))
def test_any_bytes_decode_as_the_plain_twin_says(encoding, width, seed):
    generator = torch.Generator().manual_seed(seed)
    rows_US = torch.randint(0, 256, (3, row_bytes(encoding, width)), dtype=torch.uint8, generator=generator)
    if encoding == "fp8_scale32":
        rows_US[:, width:] %= 200  # 255 is refused, and 2**127 * 448 is no fp32
    found = decode(rows_US, width, encoding, torch.float32, scale_of(encoding))
    expected = [decode_reference(bytes(row.tolist()), width, encoding) for row in rows_US]
    expected = torch.tensor(expected, dtype=torch.float64).float()
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_come_in_the_dtype_asked_for_rounded_once(encoding, dtype):
    values_UC = torch.randn(7, 40) / 3
    rows_US = encode(values_UC, encoding, scale_of(encoding))
    precise = decode(rows_US, 40, encoding, torch.float32, scale_of(encoding))
    found = decode(rows_US, 40, encoding, dtype, scale_of(encoding))
    assert found.dtype == dtype and torch.equal(found, precise.to(dtype))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_of_zero_bytes_are_rows_of_zeros(encoding):
    """What a table file holds where nothing was ever written."""
    size = row_bytes(encoding, 33)
    assert not decode(torch.zeros(2, size, dtype=torch.uint8), 33, encoding, torch.float32, scale_of(encoding)).any()
    assert not encode(torch.zeros(2, 33), encoding, scale_of(encoding)).any()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_too_large_becomes_the_largest(encoding):
    largest = torch.finfo(torch.float32).max
    rows_US = encode(torch.tensor([[largest, -largest, 1.0]]), encoding, scale_of(encoding))
    found = decode(rows_US, 3, encoding, torch.float32, scale_of(encoding))
    assert found.isfinite().all() and found[0, 0] > 0 > found[0, 1]


def test_rows_lie_as_deepseek_publishes_them():
    values_UC = torch.ones(1, 256)
    values_UC[0, 32:64] = 448 * 4
    row = encode(values_UC, "fp8_scale32")[0].tolist()
    assert len(row) == 264 and row[257] == 127 + 2 and row[32] == 0x7E  # 448 is E4M3's largest
    assert decode(encode(values_UC, "fp8_scale32"), 256, "fp8_scale32", torch.bfloat16).equal(values_UC.bfloat16())


@pytest.mark.parametrize("byte", range(256))
def test_every_e4m3_byte_is_torchs(byte):
    bytes_UC = torch.tensor([[byte, 8]], dtype=torch.uint8)
    expected = bytes_UC.view(torch.float8_e4m3fn).float()
    found = decode(bytes_UC, 2, "fp8", torch.float32, 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert math.isnan(e4m3(byte)) or torch.equal(found[0, :1].signbit(), expected[0, :1].signbit())


def test_rows_that_are_part_of_wider_ones_decode_the_same():
    rows_US = encode(torch.randn(5, 7), "int8")
    wider = torch.full((5, 31), 255, dtype=torch.uint8)
    wider[:, 3 : 3 + rows_US.shape[1]] = rows_US
    found = decode(wider[:, 3 : 3 + rows_US.shape[1]], 7, "int8", torch.float32)
    assert torch.equal(found, decode(rows_US, 7, "int8", torch.float32))


def test_what_cannot_be_is_refused():
    rows_US = encode(torch.randn(3, 32), "fp8_scale32")
    rows_US[1, 32] = 255
    with pytest.raises(ValueError, match="Row 1 of those read has an E8M0 scale of 255"):
        decode(rows_US, 32, "fp8_scale32", torch.float32)
    with pytest.raises(ValueError, match="Rows have 33 bytes; 31 values in int8 take 35"):
        decode(rows_US, 31, "int8", torch.float32)
    with pytest.raises(ValueError, match="fp8 rows need their table's scale"):
        encode(torch.randn(3, 32), "fp8")
    with pytest.raises(ValueError, match="int8 rows carry their own scales"):
        decode(rows_US, 29, "int8", torch.float32, 1.0)
