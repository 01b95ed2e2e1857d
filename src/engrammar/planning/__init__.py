"""Where to serve a table: how a text touches its rows, how fast each tier is, and the plan that follows.

Public: what `__all__` names (docs/planning-tables.md).
"""

from engrammar.planning.plan import Addresses, Study, make_plan, study
from engrammar.planning.report import write_plan
from engrammar.planning.speeds import Speeds, measure_speeds
from engrammar.planning.touches import Sample, read_sample

__all__ = [
    "Addresses",
    "Sample",
    "Speeds",
    "Study",
    "make_plan",
    "measure_speeds",
    "read_sample",
    "study",
    "write_plan",
]
