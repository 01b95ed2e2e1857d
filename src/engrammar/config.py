"""What a memory is, as plain data: the choices (`MemoryConfig`), the integers they lead to (`Geometry`), the dialects.

Imports no tensor library. Letters: N highest n-gram order, K heads per order, R rows, C row width,
E = (N-1)*K*C the width of all rows of one token side by side (paper section 2.2).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

Encoding = Literal["fp32", "bf16", "fp8", "fp8_row", "fp8_scale32", "int8", "int4"]
GROUP = 32  # values that share a scale, in `fp8_scale32` and `int4`


def check_setting(setting: str, value: object, holds: bool, allowed: str) -> None:
    """Raises a ValueError that says what was given and what is allowed, unless it `holds`."""
    if not holds:
        raise ValueError(f"{setting} is {value!r}; allowed: {allowed}.")


def check_choice(setting: str, value: object, kind: Any) -> None:
    """Raises a ValueError if `value` is not one of the Literal `kind`."""
    check_setting(setting, value, value in get_args(kind), ", ".join(get_args(kind)))


def row_bytes(encoding: Encoding, width: int) -> int:
    """Bytes of a stored row of `width` values and the scales that follow them in the row (`tables/encodings.py`)."""
    groups = -(-width // GROUP)
    return {
        "fp32": 4 * width,
        "bf16": 2 * width,
        "fp8": width,  # one scale for the whole table, which no row carries
        "fp8_row": width + 4,
        "fp8_scale32": width + groups,
        "int8": width + 4,
        "int4": -(-width // 2) + 2 * groups,
    }[encoding]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The choices that define a conditional memory (paper sections 2.2 and 2.3). `DIALECTS` holds the four in use.

    Attributes:
        layers: 0-based indices of the blocks that read the memory, ascending.
        max_ngram_size: highest n-gram order N; orders 2..N are looked up.
        num_heads: heads K per order, each with a table of its own prime size.
        head_dim: row width C.
        rows_per_head: requested rows per head, one number per order; the sizes are the next unused primes.
        seed: seed of the hash multipliers.
        multipliers: the generator of the hash multipliers. `numpy`: NumPy's default one, seeded per layer (the paper's
            demo); `splitmix64`: seeded by the layer's position in `layers` (Qwen).
        compression: `normalized` maps ids that read alike to one class; `none` hashes raw ids.
        boundary: what a look-back never crosses. `row`: the start of a row only; `dead`: any of `dead_ids` too;
            `end`: any of `end_ids`, so that a look-back never leaves its segment.
        fill_id: the raw id whose class is hashed for missing history.
        dead_ids: ids that break look-back and are never looked back to (`boundary="dead"`), such as a model's image id.
        dead_positions: what the memory adds at a dead id. `silent`: nothing, since the gate is closed there, as serving
            engines do; `fused`: the rows of missing history, as anywhere else.
        end_ids: ids that end a segment (`boundary="end"`).
        branch_keys: `each`: every residual branch has its own key projection; `shared`: all branches have one (the
            paper's ablation).
        gate: `signed_root`: sigmoid(sign(s) sqrt|s|), as in the released code; `sigmoid`: equation 4 as printed;
            `none`: the value is added as it is, without keys (the paper's ablation).
        conv_kernel: taps of the causal depthwise convolution, which is dilated by N; 0 leaves it out.
        conv_init: `zero` makes the convolution silent at the start; `default` is the initialization of nn.Conv1d.
        bias: whether the key and value projections have a learned bias.
        key_norm_eps: epsilon of the RMSNorm of keys and queries; None is the machine epsilon of the dtype.
        conv_norm_eps: epsilon of the RMSNorm before the convolution.
        rows_multiple: the rows of a layer are padded to a multiple of this.
        row_encoding: how a row is stored for serving; training and its checkpoints keep the model's dtype.
    """

    layers: tuple[int, ...]
    rows_per_head: tuple[int, ...]
    max_ngram_size: int = 3
    num_heads: int = 8
    head_dim: int = 80
    seed: int = 0
    multipliers: Literal["numpy", "splitmix64"] = "numpy"
    compression: Literal["normalized", "none"] = "normalized"
    boundary: Literal["row", "dead", "end"] = "row"
    fill_id: int = 0
    dead_ids: tuple[int, ...] = ()
    dead_positions: Literal["silent", "fused"] = "silent"
    end_ids: tuple[int, ...] = ()
    branch_keys: Literal["each", "shared"] = "each"
    gate: Literal["signed_root", "sigmoid", "none"] = "signed_root"
    conv_kernel: int = 4
    conv_init: Literal["zero", "default"] = "zero"
    bias: Literal["none", "learned"] = "none"
    key_norm_eps: float | None = 1e-6
    conv_norm_eps: float = 1e-6
    rows_multiple: int = 1
    row_encoding: Encoding = "bf16"

    def __post_init__(self) -> None:
        def require(holds: bool, setting: str, allowed: str) -> None:
            check_setting(f"memory.{setting}", getattr(self, setting), holds, allowed)

        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                require(value in get_args(kind), name, "one of " + ", ".join(get_args(kind)))
            elif kind is int:
                require(type(value) is int and value >= 0, name, "an integer of 0 or more")
            elif float in (kind, *get_args(kind)):
                optional = value is None and type(None) in get_args(kind)
                require(optional or (type(value) in (int, float) and value >= 0), name, "a number of 0 or more")
            else:
                whole = isinstance(value, list | tuple) and all(type(v) is int and v >= 0 for v in value)
                require(whole, name, "a list of integers of 0 or more")
                object.__setattr__(self, name, tuple(value))
        ascending = list(self.layers) == sorted(set(self.layers))
        require(bool(self.layers) and ascending, "layers", "at least one, ascending, none twice, counted from 0")
        require(self.max_ngram_size >= 2, "max_ngram_size", "2 or more")
        require(self.num_heads >= 1, "num_heads", "1 or more")
        require(self.head_dim >= 1, "head_dim", "1 or more")
        orders = self.max_ngram_size - 1
        require(
            len(self.rows_per_head) == orders and min(self.rows_per_head) >= 2,
            "rows_per_head",
            f"{orders} numbers of 2 or more, one for each order from 2 to max_ngram_size={self.max_ngram_size}",
        )
        require(self.conv_kernel == 0 or self.conv_kernel >= 2, "conv_kernel", "0 (no convolution) or 2 and more")
        require(self.rows_multiple >= 1, "rows_multiple", "1 or more")
        require((self.boundary == "dead") == bool(self.dead_ids), "dead_ids", "some with boundary='dead', else none")
        require((self.boundary == "end") == bool(self.end_ids), "end_ids", "some with boundary='end', else none")

    def check_model(self, num_layers: int, num_ids: int) -> None:
        """Raises a ValueError if a model with so many blocks, and a tokenizer of so many ids, cannot have it."""
        if max(self.layers) >= num_layers:
            raise ValueError(f"memory.layers is {list(self.layers)}, but the model has blocks 0 to {num_layers - 1}.")
        for name, ids in (("fill_id", (self.fill_id,)), ("dead_ids", self.dead_ids), ("end_ids", self.end_ids)):
            allowed = f"ids of the tokenizer, 0 to {num_ids - 1}"
            check_setting(f"memory.{name}", list(ids), max(ids, default=0) < num_ids, allowed)

    @property
    def orders(self) -> range:
        """The n-gram orders looked up: 2..N."""
        return range(2, self.max_ngram_size + 1)

    @property
    def num_columns(self) -> int:
        """Rows that one token touches in one layer: (N-1)*K."""
        return len(self.orders) * self.num_heads

    @property
    def memory_dim(self) -> int:
        """E, the width of one token's rows side by side."""
        return self.num_columns * self.head_dim

    @property
    def conv_window(self) -> int:
        """Positions of gated values that the convolution looks back to: (kernel-1)*N, or 0 without one."""
        return max(self.conv_kernel - 1, 0) * self.max_ngram_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of rows that one token reads over all layers, as stored in `row_encoding`."""
        return len(self.layers) * self.num_columns * row_bytes(self.row_encoding, self.head_dim)

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Builds from `to_json`'s dict; `{"dialect": NAME, ...}` starts from a dialect and replaces what is given.

        Raises:
            ValueError: the dialect or a setting is unknown, a value is not allowed, or a setting without a default is
                missing and no dialect gives it.
        """
        data = dict(data)
        dialect = data.pop("dialect", None)
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"memory has unknown settings {', '.join(unknown)}; known are {known}.")
        if dialect is None:
            lacking = [name for name in ("layers", "rows_per_head") if name not in data]
            if lacking:
                raise ValueError(
                    f"memory lacks {' and '.join(lacking)}: give them, or a memory.dialect to start from "
                    f"({', '.join(DIALECTS)})."
                )
            return cls(**data)
        check_setting("memory.dialect", dialect, dialect in DIALECTS, ", ".join(DIALECTS))
        return replace(DIALECTS[dialect], **data)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The integers that fix every address. They are derived once (`addressing.derive_geometry`) and then saved.

    Attributes:
        num_classes: the number of classes that ids fall into (the vocabulary size without compression).
        fill_class: the class that is hashed for missing history.
        multipliers: for each memory layer, N odd integers, one per look-back position.
        table_sizes: for each memory layer and order, K primes.
        rows_multiple: the rows of a layer are padded to a multiple of this.
    """

    num_classes: int
    fill_class: int
    multipliers: tuple[tuple[int, ...], ...]
    table_sizes: tuple[tuple[tuple[int, ...], ...], ...]
    rows_multiple: int = 1

    def check(self, memory: MemoryConfig) -> None:
        """Checks that this geometry fits `memory`.

        Raises:
            ValueError: the number of layers, orders or heads is another one, or a head has too few rows.
        """

        def require(holds: bool, wrong: str) -> None:
            if not holds:
                raise ValueError(wrong)

        per_layer = [len(multipliers) for multipliers in self.multipliers]
        require(per_layer == [memory.max_ngram_size] * len(memory.layers), "multipliers are not N for each layer")
        odd = all(multiplier % 2 for layer in self.multipliers for multiplier in layer)
        require(odd, "a multiplier is even")
        require(len(self.table_sizes) == len(memory.layers), "table_sizes are not one list for each layer")
        for orders in self.table_sizes:
            require(len(orders) == len(memory.rows_per_head), "table_sizes are not one list for each order")
            for sizes_K, rows in zip(orders, memory.rows_per_head):
                require(len(sizes_K) == memory.num_heads, "table_sizes are not one for each head")
                require(min(sizes_K) >= rows, f"a head has fewer than rows_per_head={rows} rows")
        require(self.rows_multiple == memory.rows_multiple, "its rows_multiple is not that of memory")
        require(0 <= self.fill_class < self.num_classes, "fill_class is not below num_classes")

    def head_sizes(self, index: int) -> tuple[int, ...]:
        """Table sizes of the index-th memory layer's heads, ordered by order, then head."""
        return tuple(size for sizes_K in self.table_sizes[index] for size in sizes_K)

    def head_offsets(self, index: int) -> tuple[int, ...]:
        """The first row of each head in the one table of the index-th memory layer, where heads follow each other."""
        return (0, *accumulate(self.head_sizes(index)[:-1]))

    def num_rows(self, index: int) -> int:
        """Rows that the index-th memory layer uses, without padding."""
        return sum(self.head_sizes(index))

    def num_stored_rows(self, index: int) -> int:
        """Rows of the index-th memory layer, padding included."""
        return -(-self.num_rows(index) // self.rows_multiple) * self.rows_multiple

    def to_json(self) -> dict[str, Any]:
        lists = {
            "multipliers": [list(layer) for layer in self.multipliers],
            "table_sizes": [[list(order) for order in layer] for layer in self.table_sizes],
        }
        return asdict(self) | lists

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            num_classes=int(data["num_classes"]),
            fill_class=int(data["fill_class"]),
            multipliers=tuple(tuple(int(m) for m in layer) for layer in data["multipliers"]),
            table_sizes=tuple(
                tuple(tuple(int(size) for size in order) for order in layer) for layer in data["table_sizes"]
            ),
            rows_multiple=int(data.get("rows_multiple", 1)),
        )


DIALECTS: dict[str, MemoryConfig] = {
    "paper": MemoryConfig(layers=(1, 14), rows_per_head=(2_262_400,) * 2, fill_id=2),
    "demo": MemoryConfig(
        layers=(1, 15),
        rows_per_head=(646_400,) * 2,
        head_dim=64,
        fill_id=2,
        conv_init="default",
        bias="learned",
        key_norm_eps=None,
        conv_norm_eps=1e-5,
        row_encoding="fp32",
    ),
    "deepseek_v41": MemoryConfig(
        layers=(1, 14),
        max_ngram_size=4,
        rows_per_head=(16_000_000,) * 3,
        head_dim=256,
        boundary="dead",
        fill_id=2,  # the pad id; inside a text it is hashed like any token
        dead_ids=(129_264,),  # the image id
        conv_kernel=0,
        row_encoding="fp8_scale32",
    ),
    "qwen_next": MemoryConfig(
        layers=(1,),
        rows_per_head=(20_000_000,) * 2,
        head_dim=160,
        seed=1234,
        multipliers="splitmix64",
        compression="none",
        boundary="end",
        fill_id=248_044,
        end_ids=(248_044,),
        rows_multiple=128,
        row_encoding="fp8",
    ),
}
