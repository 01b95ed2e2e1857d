"""Where the repository that these tests belong to keeps its results and pages."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
