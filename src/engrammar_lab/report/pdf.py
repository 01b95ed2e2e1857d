"""The report as a PDF on A4: the summary, then a section per question. The same results give the same bytes."""

import io
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
from fpdf import FPDF, FontFace
from fpdf.enums import TableBordersLayout
from PIL import Image

from engrammar_lab.report.parts import ABOUT, TITLE, Figure, Report, Section, Table, summary

INK, SOFT, LINE, BOX = (29, 33, 38), (95, 102, 112), (221, 225, 230), (244, 246, 248)
FONT = "DejaVu"
PIXELS_PER_MM = 144 / 25.4 * 1.04


def render_pdf(report: Report) -> bytes:
    """The report as a PDF; its metadata hold the digest of the results and the versions that drew it."""
    pdf = FPDF(format="A4")
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pdf.add_font(FONT, "", fonts / "DejaVuSans.ttf")
    pdf.add_font(FONT, "B", fonts / "DejaVuSans-Bold.ttf")
    pdf.set_creation_date(datetime.fromisoformat(report.date).replace(tzinfo=UTC))
    pdf.set_title(TITLE)
    pdf.set_producer(report.versions)
    pdf.set_keywords(report.digest)
    pdf.set_margin(16)
    pdf.set_auto_page_break(True, 16)
    pdf.set_text_color(INK)
    pdf.set_draw_color(LINE)
    pdf.add_page()
    _heading(pdf, TITLE, 18)
    _text(pdf, ABOUT, 8.5)
    links = [pdf.add_link() for _ in report.sections]
    _table(pdf, summary(report), links)
    if report.missing:
        _text(pdf, f"Not run: {' '.join(report.missing)}", 8.5)
    _text(pdf, f"Newest result: {report.date}. SHA-256 of the results: {report.digest}.", 7, SOFT)
    for section, link in zip(report.sections, links):
        pdf.add_page()
        pdf.set_link(link, page=pdf.page)
        pdf.start_section(section.question)
        _section(pdf, section)
    return bytes(pdf.output())


def _section(pdf: FPDF, section: Section) -> None:
    _heading(pdf, section.question, 14)
    pdf.set_font(FONT, "", 9)
    with pdf.table(
        rows=(),
        col_widths=(1, 6.5),
        first_row_as_headings=False,
        borders_layout=TableBordersLayout.NONE,
        text_align="LEFT",
        line_height=4.6,
        padding=1,
    ) as table:
        for name, words in section.verdict.rows():
            row = table.row(style=FontFace(fill_color=BOX))
            row.cell(name, style=FontFace(emphasis="BOLD", color=SOFT))
            row.cell(words)
    pdf.ln(2)
    _text(pdf, section.measured, 7.5, SOFT)
    for part in section.body:
        if isinstance(part, Table):
            _table(pdf, part)
        elif isinstance(part, Figure):
            _figure(pdf, part)
        else:
            _text(pdf, part, 9)


def _heading(pdf: FPDF, text: str, size: float) -> None:
    pdf.set_font(FONT, "B", size)
    pdf.multi_cell(0, size * 0.45, text, align="L", new_x="LMARGIN", new_y="NEXT")
    pdf.ln(2)


def _text(pdf: FPDF, text: str, size: float, colour: tuple[int, int, int] = INK) -> None:
    pdf.set_font(FONT, "", size)
    pdf.set_text_color(colour)
    pdf.multi_cell(0, size * 0.5, text.replace("`", ""), align="L", new_x="LMARGIN", new_y="NEXT")
    pdf.set_text_color(INK)
    pdf.ln(2)


def _figure(pdf: FPDF, figure: Figure) -> None:
    width, height = Image.open(io.BytesIO(figure.png)).size
    shown = min(pdf.epw, width / PIXELS_PER_MM)
    if pdf.will_page_break(shown * height / width + 8):
        pdf.add_page()
    pdf.image(io.BytesIO(figure.png), w=shown, alt_text=figure.caption)
    _text(pdf, figure.caption, 7.5, SOFT)


def _table(pdf: FPDF, table: Table, links: list[int] | None = None) -> None:
    """Writes a table. Columns share the page by their content: at least the longest word, at most a paragraph."""
    size = 8.0 if len(table.columns) < 7 else 7.0
    pdf.set_font(FONT, "B", size)
    columns = list(zip(table.columns, *table.rows))
    words = [
        max(pdf.get_string_width(f"{word} ") for cell in column for word in f"{cell} ".split(" ")) for column in columns
    ]
    whole = [max(pdf.get_string_width(f"{cell} ") for cell in column) for column in columns]
    room = pdf.epw - sum(words) - 3 * len(columns)
    wanted = [max(0.0, min(full, 110.0) - word) for full, word in zip(whole, words)]
    share = min(1.0, max(0.0, room) / (sum(wanted) or 1))
    widths = [word + 3 + share * want for word, want in zip(words, wanted)]
    pdf.set_font(FONT, "", size)
    height = (len(table.rows) + 2) * (size * 0.5 + 1.8) + 8
    if height < pdf.eph / 2 and pdf.will_page_break(height):
        pdf.add_page()
    with pdf.table(
        rows=(),
        col_widths=tuple(widths),
        width=min(pdf.epw, sum(widths)),
        align="LEFT",
        borders_layout=TableBordersLayout.HORIZONTAL_LINES,
        text_align="LEFT",
        v_align="TOP",
        line_height=size * 0.5,
        padding=(0.9, 1),
    ) as drawn:
        drawn.row(table.columns)
        for place, cells in enumerate(table.rows):
            row = drawn.row(style=FontFace(emphasis="BOLD") if place in table.strong else None)
            for column, cell in enumerate(cells):
                row.cell(cell, link=links[place] if links and column == 0 else None)
    pdf.ln(1)
    if table.caption:
        _text(pdf, table.caption, 7.5, SOFT)
    pdf.ln(2)
