"""Where rows are read from: RAM, disk, a cache in front of either, or other machines (`stores.mooncake`).

Public: what `__all__` names, and `serve_tables` and `look_ahead` of `stores.serving`, which give a model a store's
rows.
"""

from engrammar.stores.base import Fetch, RowsMissing, RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.disk import DiskStore
from engrammar.stores.ram import RamStore

__all__ = ["CachedStore", "DiskStore", "Fetch", "RamStore", "RowStore", "RowsMissing"]
