"""All of a model's retrieval in one place: token ids -> rows of every memory layer, before the first block runs.

Knows nothing of hidden states; fusion knows nothing of ids. What passes between them is `Retrieved`.
Letters: B batch, T tokens, S = N-1 positions of history, V ids, E width of a token's rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from engrammar.addressing import hash_ngrams, look_back
from engrammar.config import Geometry, MemoryConfig
from engrammar.table import Embedded, MemoryTable, Rows


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What retrieval hands to fusion.

    Attributes:
        waits: per memory layer index in the model, a function that waits for its rows.
        dead_BT: True where a position is masked (padding) and its memory must stay silent; None where none is.
        starts_BT: True where a packed document begins; None where rows are not packed.
    """

    waits: Mapping[int, Callable[[], Embedded]]
    dead_BT: Tensor | None
    starts_BT: Tensor | None

    def wait(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Of a layer, once its rows are there: embedding_BTE, and dead_BT with the positions that lack a row.

        None for a layer without memory.
        """
        if layer not in self.waits:
            return None, None
        embedding_BTE, missing_BT = self.waits[layer]()
        if missing_BT is None or self.dead_BT is None:
            return embedding_BTE, self.dead_BT if missing_BT is None else missing_BT
        return embedding_BTE, self.dead_BT | missing_BT


class Memory(nn.Module):
    """The tables of all memory layers, and the class map that addresses them.

    `class_of_id` is saved with the model, so a checkpoint addresses its rows without its tokenizer. It holds -1 until
    `set_classes` or loading fills it; with `compression="none"` there is none.
    """

    class_of_id: Tensor | None

    def __init__(
        self, config: MemoryConfig, geometry: Geometry, *, num_ids: int, vocab_size: int, rows: Rows = "own"
    ) -> None:
        super().__init__()
        self.config = config
        self.geometry = geometry
        self.num_ids = num_ids
        self.tables = nn.ModuleDict(
            {str(layer): MemoryTable(config, geometry, index, rows) for index, layer in enumerate(config.layers)}
        )
        compressed = config.compression == "normalized"
        self.register_buffer("class_of_id", torch.full((vocab_size,), -1) if compressed else None)

    def table(self, layer: int) -> MemoryTable:
        """The table of a layer of the model."""
        table = self.tables[str(layer)]
        assert isinstance(table, MemoryTable)
        return table

    @torch.no_grad()
    def set_classes(self, classes_V: Tensor) -> None:
        """Fills the class map (`vocabulary.compress_vocabulary`), checking that it belongs to this geometry.

        Ids that the tokenizer lacks but the vocabulary is padded with take the class of missing history.
        """
        if self.class_of_id is None:
            raise ValueError("memory.compression is 'none': this model has no class map to set.")
        num_classes, fill_id, fill_class = int(classes_V.max()) + 1, self.config.fill_id, self.geometry.fill_class
        whole = classes_V.shape == (self.num_ids,) and not classes_V.is_floating_point() and int(classes_V.min()) >= 0
        if not whole or num_classes != self.geometry.num_classes or int(classes_V[fill_id]) != fill_class:
            raise ValueError(
                f"The class map has {classes_V.shape[0]} ids in {num_classes} classes, but this model was built for "
                f"{self.num_ids} ids in {self.geometry.num_classes} classes: use the tokenizer "
                "it was built with."
            )
        self.class_of_id.fill_(fill_class)[: self.num_ids] = classes_V

    def addresses(
        self, ids_BT: Tensor, history_BS: Tensor | None = None, starts_BT: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Head-local row numbers of every memory layer: {layer: rows_BTH}. See `addressing.look_back`."""
        looked_back = look_back(
            ids_BT,
            config=self.config,
            geometry=self.geometry,
            history_BS=history_BS,
            classes_V=self.class_of_id,
            starts_BT=starts_BT,
        )
        return {
            layer: hash_ngrams(looked_back, config=self.config, geometry=self.geometry, layer_index=index)
            for index, layer in enumerate(self.config.layers)
        }

    def fetch(
        self,
        ids_BT: Tensor,
        *,
        history_BS: Tensor | None = None,
        mask_BT: Tensor | None = None,
        starts_BT: Tensor | None = None,
    ) -> Retrieved:
        """Reads the rows of every memory layer for these tokens.

        Args:
            ids_BT: raw token ids; already -1 where masked.
            history_BS: the N-1 ids before them, -1 where there are none; None at the start of a row.
            mask_BT: True at real tokens; None when all are.
            starts_BT: True where a packed document begins.
        """
        return Retrieved(
            waits=self._read(self.addresses(ids_BT, history_BS, starts_BT)),
            dead_BT=None if mask_BT is None else ~mask_BT,
            starts_BT=starts_BT,
        )

    def _read(self, rows: Mapping[int, Tensor]) -> dict[int, Callable[[], Embedded]]:
        """Starts every table's reads; a source outside the model gets them all at once."""
        tables = {layer: self.table(layer) for layer in rows}
        source = next(iter(tables.values())).source
        if source is None:
            return {layer: partial(Embedded, tables[layer](rows_BTH)) for layer, rows_BTH in rows.items()}
        stored = {tables[layer].name: tables[layer].stored_rows(rows_BTH) for layer, rows_BTH in rows.items()}
        waits = source.read(stored)
        return {layer: waits[table.name] for layer, table in tables.items()}
