"""Tables of models that others released: imports them from their checkpoints, and exports them back.

Public: `import_tables` and `export_tables` (docs/released-tables.md). `qwen` and `deepseek` are for one model family
each.
"""

from engrammar.tables.released.convert import export_tables, import_tables

__all__ = ["export_tables", "import_tables"]
