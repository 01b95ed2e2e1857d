"""Tables of models that others released: taken out of their checkpoints, and put back.

Public: `import_tables` and `export_tables` (docs/released-tables.md); `qwen` and `deepseek` know one model family each.
"""

from engrammar.tables.released.convert import export_tables, import_tables

__all__ = ["export_tables", "import_tables"]
