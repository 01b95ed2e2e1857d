"""What the settings of the methods may be."""

import math
from collections.abc import Callable, Mapping

from engrammar.config import check_setting

RANGES: Mapping[str, Callable[[float], bool]] = {
    "a number": math.isfinite,
    "over 0": lambda value: 0 < value < math.inf,
    "over 0, up to 1": lambda value: 0 < value <= 1,
    "0 or more": lambda value: 0 <= value < math.inf,
    "0 to 1": lambda value: 0 <= value <= 1,
    "1 or more": lambda value: 1 <= value < math.inf,
}


def require_range(settings: object, allowed: str, *names: str) -> None:
    """Checks settings against one of `RANGES`; raises a ValueError that names the first one outside it."""
    for name in names:
        check_setting(name, value := getattr(settings, name), RANGES[allowed](value), allowed)


def require_most(settings: object, most: int, *names: str, least: int = 0) -> None:
    """Checks that settings are from `least` to `most`."""
    for name in names:
        check_setting(name, value := getattr(settings, name), least <= value <= most, f"{least} to {most}")
