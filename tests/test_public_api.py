"""A public name or signature that is not that of the last release is named in the CHANGELOG's newest part."""

import json
import re

from committed import ROOT
from public_api import FILE, public_api

REMAKE = "name it in the CHANGELOG; at a release, write tests/public_api.json anew with `python tests/public_api.py`"


def unsaid(current: dict[str, str], released: dict[str, str], changelog: str) -> list[str]:
    """Names that were added, removed or changed, and that the newest part of the changelog does not have in code."""
    newest = changelog.split("\n## ")[1]
    said = " ".join(re.findall(r"`([^`]+)`", newest))
    changed = [name for name in current.keys() | released.keys() if current.get(name) != released.get(name)]
    return sorted(name for name in changed if not re.search(rf"\b{name.rpartition('.')[2]}\b", said))


def test_every_change_of_a_public_name_is_in_the_changelog():
    released = json.loads(FILE.read_text())["names"]
    assert not unsaid(public_api(), released, (ROOT / "CHANGELOG.md").read_text()), REMAKE


def test_a_change_that_nobody_names_is_found():
    names = public_api()
    assert len(names) > 60 and names["engrammar.attach"].startswith("(model")
    changelog = "# Changelog\n\n## 0.3.0\n\n- `other` is new.\n\n## 0.2.0\n\n- `attach` is new.\n"
    for changed in (
        names | {"engrammar.attach": "(model)"},
        {k: v for k, v in names.items() if k != "engrammar.attach"},
    ):
        assert unsaid(names, changed, changelog) == ["engrammar.attach"]
        assert not unsaid(names, changed, changelog.replace("`other`", "`attach(model)`"))
    assert not unsaid(names, names, changelog)
