"""Rows on other machines, in a pool of Mooncake (`pip install 'engrammar[remote]'`, docs/tiers.md).

Public: what `__all__` names, and `upload.upload`, which sends a table to a pool. A connection to a pool runs in its own
process.
"""

from engrammar.stores.mooncake.pool import PoolServer
from engrammar.stores.mooncake.store import RemoteStore

__all__ = ["PoolServer", "RemoteStore"]
