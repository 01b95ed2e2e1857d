"""Runs the first Python block of the README in the current folder, where a small tokenizer gets the name that it uses.

Usage: python .ci/first_screen.py README.md
"""

import re
import sys
from pathlib import Path

from engrammar.train.data import train_tokenizer

page = Path(sys.argv[1]).read_text()
block = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
train_tokenizer([page], vocab_size=500, path=Path("gpt2"))
exec(compile(block, "README.md", "exec"))
