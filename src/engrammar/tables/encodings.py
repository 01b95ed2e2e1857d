"""What the bytes of a stored row mean: seven encodings, in which a row's scales follow its values.

| encoding | values of a row, then its scales | largest error of a value |
|---|---|---|
| fp32, bf16 | C floats | none; 2**-8 of the value |
| fp8 | C E4M3; one scale for the whole table, which no row carries | 1/16 of the value, or half a step near zero |
| fp8_row | C E4M3, then one fp32 | the same |
| fp8_scale32 | C E4M3, then one E8M0 (2**(byte-127)) for each 32 values: DeepSeek-V4.1's rows | the same |
| int8 | C int8 from -127 to 127, then one fp32 | half a step; a step is 1/127 of the row's largest |
| int4 | -8 to 7, even columns in a byte's low half, then one bf16 for each 32 | a step, 1/8 of the group's largest |

A value is its number times its scale, rounded once to the dtype asked for. Zeros stay zeros, and a row of zero bytes
is a row of zeros. Scales have so few bits that the products are exact in fp32, so rows that were decoded to fp32 encode
to the same values again.
Letters: U rows, C row width, S bytes of a stored row, G groups of 32 values.
"""

import torch
from torch import Tensor

from engrammar.config import GROUP, Encoding, row_bytes

PLAIN: tuple[Encoding, ...] = ("fp32", "bf16")  # encodings whose rows transformers reads as weights
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 2.0**-126  # the smallest fp32 number with all its bits
LARGEST = 2.0**127  # the largest value with its own scale: rounding the scale up must not leave fp32
# torch's dtype by its name in safetensors.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": FP8, "I32": torch.int32}
DTYPES |= {"U8": torch.uint8, "I64": torch.int64}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
# The dtype of a table's tensor where its rows are plain numbers; rows of the other encodings are bytes, U8.
DTYPE_OF: dict[Encoding, str] = {"fp32": "F32", "bf16": "BF16", "fp8": "F8_E4M3"}
ENCODING_OF = {dtype: encoding for encoding, dtype in DTYPE_OF.items()}
FLOATS = {encoding: DTYPES[DTYPE_OF[encoding]] for encoding in PLAIN}


def encode(values_UC: Tensor, encoding: Encoding, scale: float | None = None) -> Tensor:
    """Encodes rows as bytes, rounded to nearest. Values too large for the encoding become its largest value.

    Args:
        values_UC: finite values. Most encodings have no NaN or infinity: check first, as `convert` does.
        scale: the table's scale, only for fp8; its largest absolute value / 448 uses the whole range.

    Returns:
        rows_US, uint8.

    Raises:
        ValueError: fp8 without a scale, or another encoding with one.
    """
    _check_scale(encoding, scale)
    values_UC = values_UC.float().contiguous()
    num_rows, width = values_UC.shape
    if not num_rows:
        return torch.empty(0, row_bytes(encoding, width), dtype=torch.uint8)
    if encoding in FLOATS:
        most = torch.finfo(FLOATS[encoding]).max
        return values_UC.clamp(-most, most).to(FLOATS[encoding]).view(torch.uint8)
    if scale is not None:
        return _to_fp8(values_UC / scale)
    values_UC = values_UC.clamp(-LARGEST, LARGEST)
    if encoding == "fp8_row":
        scale_U1 = _row_scale(values_UC, FP8_MAX, num_bits=20)
        return torch.cat([_to_fp8(_divide(values_UC, scale_U1)), scale_U1.view(torch.uint8)], 1)
    if encoding == "int8":
        scale_U1 = _row_scale(values_UC, 127.0, num_bits=17)
        numbers_UC = _divide(values_UC, scale_U1).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([numbers_UC.view(torch.uint8), scale_U1.view(torch.uint8)], 1)
    padded = torch.nn.functional.pad(values_UC, (0, -width % GROUP))
    values_UGC = padded.view(num_rows, padded.shape[1] // GROUP, GROUP)
    if encoding == "fp8_scale32":
        exponent_UG = _exponents(values_UGC)
        inverse_UG = ((127 - exponent_UG) << 23).view(torch.float32)  # 2**-exponent
        numbers_UC = _to_fp8((values_UGC * inverse_UG[..., None]).view_as(padded)[:, :width])
        # A group of zeros gets the scale 0x00, so that rows of zeros are zero bytes.
        byte_UG = torch.where(values_UGC.any(-1), exponent_UG + 127, 0).to(torch.uint8)
        return torch.cat([numbers_UC, byte_UG], 1)
    scale_UG = _signed_scales(values_UGC)
    numbers_UGC = _divide(values_UGC, scale_UG.float()[..., None]).round().clamp(-8, 7)
    numbers_UC = numbers_UGC.to(torch.int8).view_as(padded)[:, : width + width % 2]
    byte_UC = (numbers_UC[:, 0::2] & 15) | (numbers_UC[:, 1::2] << 4)
    return torch.cat([byte_UC.view(torch.uint8), scale_UG.view(torch.uint8)], 1)


def decode(rows_US: Tensor, width: int, encoding: Encoding, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """The values [U, C] of stored rows [U, S] (uint8), on their device, in `dtype`.

    Raises:
        ValueError: the rows have another length, the scale is missing or not needed, or an E8M0 scale is not a number.
    """
    _check_scale(encoding, scale)
    if rows_US.shape[-1] != row_bytes(encoding, width):
        raise ValueError(
            f"Rows have {rows_US.shape[-1]} bytes; {width} values in {encoding} take {row_bytes(encoding, width)}."
        )
    if encoding in FLOATS:
        return rows_US.contiguous().view(FLOATS[encoding]).to(dtype)
    if scale is not None:
        return from_fp8(rows_US).mul_(scale).to(dtype)
    if encoding == "fp8_row":
        return from_fp8(rows_US[:, :width]).mul_(_behind(rows_US, width, torch.float32)).to(dtype)
    if encoding == "int8":
        numbers_UC = rows_US[:, :width].view(torch.int8).float()
        return numbers_UC.mul_(_behind(rows_US, width, torch.float32)).to(dtype)
    if encoding == "fp8_scale32":
        return _times(from_fp8(rows_US[:, :width]), from_e8m0(rows_US[:, width:])).to(dtype)
    half = -(-width // 2)
    byte_UC = rows_US[:, :half].view(torch.int8)
    numbers_UC2 = torch.stack([byte_UC << 4, byte_UC], -1) >> 4  # int8's shift right keeps the sign
    numbers_UC = numbers_UC2.view(len(rows_US), 2 * half)[:, :width].float()
    return _times(numbers_UC, _behind(rows_US, half, torch.bfloat16).float()).to(dtype)


def _check_scale(encoding: Encoding, scale: float | None) -> None:
    if (encoding == "fp8") == (scale is None):
        wrong = "fp8 rows need their table's scale" if scale is None else f"{encoding} rows carry their own scales"
        raise ValueError(f"scale is {scale}: {wrong}.")


def _divide(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale. A scale of zero belongs to zeros, which stay zeros."""
    return values / torch.where(scale == 0, 1.0, scale)


def _row_scale(values_UC: Tensor, most: float, num_bits: int) -> Tensor:
    """One fp32 scale per row [U, 1] that brings its largest value to `most`, rounded up to `num_bits` bits.

    The product of `most` and the scale is then exact, and leads back to the same scale.
    """
    dropped = 24 - num_bits
    bits_U1 = (values_UC.abs().amax(1, keepdim=True) / most).view(torch.int32)
    rounded_U1 = ((bits_U1 + (1 << dropped) - 1) >> dropped << dropped).view(torch.float32)
    return torch.where(values_UC.any(1, keepdim=True), rounded_U1.clamp_min(SMALLEST_SCALE), 0.0)


def _exponents(values_UGC: Tensor) -> Tensor:
    """The smallest powers of two [U, G] that bring each group within 448 = 1.75 * 2**8."""
    mantissa_UG, exponent_UG = torch.frexp(values_UGC.abs().amax(-1))  # the mantissa is at least 0.5
    return (exponent_UG - 9 + (mantissa_UG > 0.875)).clamp(-127, 127)


def _signed_scales(values_UGC: Tensor) -> Tensor:
    """bf16 scales [U, G] that bring the value furthest from zero to -8, so that all 16 numbers of int4 are used.

    bf16 is better than fp16: errors are the same to the fourth digit, since numbers are rounded against the rounded
    scale, and bf16 has fp32's range, while fp16 loses groups below 1e-7 and above 5e5.
    """
    furthest_UG = values_UGC.gather(-1, values_UGC.abs().argmax(-1, keepdim=True))[..., 0]
    scale_UG = furthest_UG / -8
    small_UG = scale_UG.sign() * SMALLEST_SCALE  # 0, not -0, for a group of zeros, so that its bytes are zeros
    return torch.where(scale_UG.abs() < SMALLEST_SCALE, small_UG, scale_UG).to(torch.bfloat16)


def _to_fp8(values_UC: Tensor) -> Tensor:
    return values_UC.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)


def from_fp8(byte_UC: Tensor) -> Tensor:
    """Converts E4M3 to fp32: sign, exponent and mantissa are moved to their places in fp16, which is 2**8 too small.

    This is twice as fast as torch's conversion, which is used only if a byte is not a number.
    """
    if byte_UC.numel() and int((byte_UC & 0x7F).max()) == 0x7F:
        return byte_UC.contiguous().view(FP8).float()
    bits_UC = byte_UC.view(torch.int8).to(torch.int16)
    bits_UC <<= 7
    bits_UC &= ~0x4000  # the sign's second copy
    return bits_UC.view(torch.float16).float().mul_(256.0)


def from_e8m0(byte_UG: Tensor) -> Tensor:
    """Converts E8M0 to fp32: 2**(byte-127)."""
    if byte_UG.numel() and int(byte_UG.max()) == 255:
        row = int((byte_UG == 255).nonzero()[0, 0])
        raise ValueError(f"Row {row} of those read has an E8M0 scale of 255, which is not a number: it is damaged.")
    bits_UG = byte_UG.to(torch.int32) << 23
    return torch.where(byte_UG == 0, 0x00400000, bits_UG).view(torch.float32)


def _behind(rows_US: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """The scales that follow the values of each row."""
    return rows_US[:, start:].clone(memory_format=torch.contiguous_format).view(dtype)


def _times(numbers_UC: Tensor, scale_UG: Tensor) -> Tensor:
    """Multiplies each group of 32 columns by its scale, in place if all groups are whole."""
    num_rows, width = numbers_UC.shape
    if width % GROUP == 0:
        return numbers_UC.view(num_rows, width // GROUP, GROUP).mul_(scale_UG[..., None]).view(num_rows, width)
    return numbers_UC.mul_(scale_UG.repeat_interleave(GROUP, 1)[:, :width])
