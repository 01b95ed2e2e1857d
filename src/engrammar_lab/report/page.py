"""The report as one self-contained HTML page: figures inside, no script, light and dark."""

import base64
import re
from html import escape

from engrammar_lab.report.parts import ABOUT, TITLE, Figure, Report, Section, Table, summary

CSS = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#5f6670;--line:#dde1e6;--page:#fff;--box:#f4f6f8;--link:#2a6fb0}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#a2a9b3;--line:#3a4048;--page:#16191d;--box:#20242a;
--link:#7db4ea}}
body{margin:0 auto;padding:1.2rem;max-width:58rem;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.8rem;margin:.4rem 0}
h2{font-size:1.3rem;margin:2.6rem 0 .4rem;
border-top:1px solid var(--line);padding-top:1.2rem}
a{color:var(--link)}
p.soft,figcaption,caption{color:var(--soft);font-size:.86rem}
code{font-size:.9em;overflow-wrap:anywhere}
dl{background:var(--box);border-left:4px solid var(--link);padding:.7rem 1rem;margin:.8rem 0;border-radius:4px}
dt{font-weight:600;font-size:.8rem;color:var(--soft)}
dd{margin:0 0 .4rem}
div.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
caption{caption-side:bottom;text-align:left;padding-top:.3rem}
th,td{padding:.3rem .6rem;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
th{font-weight:600}
tr.strong td{font-weight:700}
table.numbers td{white-space:nowrap}
table:not(.numbers) td{min-width:5.5rem}
figure{margin:1.2rem 0}
img{max-width:100%;height:auto;background:#fff;border-radius:4px}
"""
IMAGE = re.compile(r'src="data:image/png;base64,([^"]*)"')
VERSIONS = re.compile(r'<meta name="versions"[^>]*>')


def without_figures(page: str) -> str:
    """The page without its figures and the versions that drew them."""
    return VERSIONS.sub("", IMAGE.sub("", page))


def figures_of(page: str) -> list[bytes]:
    """The PNGs of a page, in order."""
    return [base64.b64decode(data) for data in IMAGE.findall(page)]


def render_page(report: Report) -> str:
    """The report as HTML, a function of the report alone."""
    contents = "".join(f'<li><a href="#{own.key}">{escape(own.question)}</a></li>' for own in report.sections)
    links = [f"#{own.key}" for own in report.sections]
    missing = f"<p>Not run: {escape(' '.join(report.missing))}</p>" if report.missing else ""
    body = [
        f"<h1>{escape(TITLE)}</h1>",
        f"<p>{_words(ABOUT)}</p>",
        _table(summary(report), links),
        missing,
        f"<nav><ol>{contents}</ol></nav>",
        *map(_section, report.sections),
        f'<p class="soft">Newest result: {report.date}. SHA-256 of the results: <code>{report.digest}</code>. '
        'The same as a <a href="report.pdf">PDF</a>.</p>',
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="versions" content="{escape(report.versions)}"><title>{escape(TITLE)}</title><style>{CSS}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _section(section: Section) -> str:
    parts = [
        f'<section id="{section.key}"><h2>{escape(section.question)}</h2>',
        "<dl>"
        + "".join(f"<dt>{name}</dt><dd>{escape(words)}</dd>" for name, words in section.verdict.rows())
        + "</dl>",
        f'<p class="soft">{_words(section.measured)}</p>',
    ]
    for part in section.body:
        if isinstance(part, Table):
            parts.append(_table(part))
        elif isinstance(part, Figure):
            parts.append(_figure(part))
        else:
            parts.append(f"<p>{_words(part)}</p>")
    return "\n".join([*parts, "</section>"])


def _words(text: str) -> str:
    """The text as HTML, with `code` marked."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text, quote=False))


def _figure(figure: Figure) -> str:
    data, caption = base64.b64encode(figure.png).decode(), escape(figure.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(table: Table, links: list[str] | None = None) -> str:
    """A table as HTML; `links` are for the first cell of each row."""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    lines = []
    for place, row in enumerate(table.rows):
        cells = [escape(cell, quote=False) for cell in row]
        if links:
            cells[0] = f'<a href="{links[place]}">{cells[0]}</a>'
        strong = ' class="strong"' if place in table.strong else ""
        lines.append(f"<tr{strong}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    kind = "" if links else ' class="numbers"'
    body = f"{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table{kind}>{body}</table></div>'
