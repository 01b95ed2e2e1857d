"""What is on a disk: table files and their checks, row encodings, checkpoints that are whole or absent.

Public: what `__all__` names, to open, write, check and convert table folders. `tables.released` reads the tables of
other projects.
"""

from engrammar.tables.convert import pack, quantize
from engrammar.tables.folder import TableFile, TableFolder, TableWriter, open_tables
from engrammar.tables.verify import verify_tables

__all__ = ["TableFile", "TableFolder", "TableWriter", "open_tables", "pack", "quantize", "verify_tables"]
