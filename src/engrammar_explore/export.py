"""One HTML file with everything in it: style, script and what was seen. It opens without a server."""

import base64
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from engrammar.tables.sealed import write_text

SCRIPTS = ("draw.js", "edit.js", "page.js")


def page_of(whole: dict[str, Any]) -> str:
    """The page of `Session.whole`, as one HTML file.

    Its content security policy allows this very style and this very script, and nothing from anywhere.
    """
    folder = files("engrammar_explore").joinpath("page")
    style = folder.joinpath("page.css").read_text("utf-8")
    script = "\n".join(folder.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    assert "</style" not in style and "</script" not in script
    data = json.dumps(whole, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    data = data.replace("\u2029", "\\u2029")
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    page = folder.joinpath("page.html").read_text("utf-8")
    page = re.sub(r"[ \t]*<(link|script) [^\n]*\n", "", page)
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n</head>'
    tail = f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body>'
    return page.replace("</head>", head).replace("</body>", tail)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def export_page(whole: dict[str, Any], path: Path) -> None:
    """Writes `page_of`, whole or not at all."""
    write_text(path, page_of(whole))
