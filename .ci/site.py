"""A hook of the documentation site: pages link to files of the repository, which the site takes along.

A link that leaves docs/ for results/ is to a picture or a report: the file becomes one of the site's. A link to another
file of the repository becomes the file's name as code.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")
SHOWN = {".png", ".svg", ".html", ".pdf", ".gif"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the files outside docs/ that pages show."""
    for page in list(files.documentation_pages()):
        for path in {path for _, _, path, _ in LINK.findall(page.content_string)}:
            if not (ROOT / path).is_file():
                raise FileNotFoundError(f"{page.src_uri} links to {path}, which is not there")
            if Path(path).suffix in SHOWN and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turns links out of docs/ into links within the site."""

    def link(found: re.Match[str]) -> str:
        shown, text, path, anchor = found.groups()
        if Path(path).suffix in SHOWN:
            return f"{shown}[{text}]({path}{anchor or ''})"
        return f"{text} (`{path}`)" if text.strip("`") != Path(path).name else f"`{path}`"

    return LINK.sub(link, markdown)
