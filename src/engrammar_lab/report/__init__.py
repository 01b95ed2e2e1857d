"""The lab's report: one HTML page and one PDF, made from the JSON under results/lab alone.

Remake: engrammar lab report
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engrammar.tables.sealed import write_text
from engrammar_lab.catalogue import STUDIES
from engrammar_lab.report import analysis, tasks, traffic
from engrammar_lab.report.adapters import ATTACH, attach_section
from engrammar_lab.report.analysis import depth_section, gates_section
from engrammar_lab.report.editing import EDIT, edit_section
from engrammar_lab.report.figures import alike
from engrammar_lab.report.forgetting import FORGETTING, forgetting_section
from engrammar_lab.report.horizon import HORIZON_TASKS, horizon_section, horizon_tasks_section, rates_section
from engrammar_lab.report.page import figures_of, render_page, without_figures
from engrammar_lab.report.parts import Report, Section
from engrammar_lab.report.pdf import render_pdf
from engrammar_lab.report.studies import study_section
from engrammar_lab.report.tasks import tasks_section
from engrammar_lab.report.traffic import traffic_section

PAGE, PDF = "report.html", "report.pdf"
# Of each result: the question, and the function that makes its section.
SECTIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Section]]] = {
    **{name: (study.question, study_section) for name, study in STUDIES.items()},
    "rates": (STUDIES["rates"].question, rates_section),
    "horizon": (STUDIES["horizon"].question, horizon_section),
    "horizon-tasks": (HORIZON_TASKS, horizon_tasks_section),
    "tasks": (tasks.QUESTION, tasks_section),
    "attach": (ATTACH, attach_section),
    "edit": (EDIT, edit_section),
    "forgetting": (FORGETTING, forgetting_section),
    "depth": (analysis.DEPTH, depth_section),
    "gates": (analysis.GATES, gates_section),
    "traffic": (traffic.QUESTION, traffic_section),
}


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in `folder` that have a section, in the report's order.

    Raises:
        ValueError: there are no results, or a file is not JSON.
    """
    results = {}
    for name in SECTIONS:
        path = folder / f"{name}.json"
        if path.exists():
            try:
                results[name] = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON ({error}): run the study again.") from error
    if not results:
        raise ValueError(f"{folder} holds no results: run a study first (engrammar lab run allocation).")
    return results


def make_report(results: Mapping[str, Mapping[str, Any]]) -> Report:
    """The report, a function of the results (and of the libraries that draw)."""
    content = json.dumps(results, sort_keys=True).encode()
    return Report(
        sections=tuple(SECTIONS[name][1](result) for name, result in results.items()),
        missing=tuple(question for name, (question, _) in SECTIONS.items() if name not in results),
        date=max(result["date"] for result in results.values()),
        digest=hashlib.sha256(content).hexdigest(),
        versions=_versions(),
    )


def write_report(folder: Path, *, check: bool = False) -> None:
    """Writes report.html and report.pdf, or checks that those in `folder` follow from the JSON there.

    The page's text must be equal. If the page's figures were drawn by the library versions installed here, they must
    look the same (processors differ in rounding by parts of a pixel), and the PDF must equal one with the page's
    figures to the byte. Otherwise the PDF must name the digest of the JSON, and a printed line says what was not
    compared.

    Raises:
        ValueError: there is no result, or the committed report is not what the JSON says.
    """
    report = make_report(load_results(folder))
    page = render_page(report)
    if not check:
        write_text(folder / PAGE, page)
        (folder / PDF).write_bytes(render_pdf(report))
        return
    found, found_pdf = ((folder / name).read_bytes() if (folder / name).exists() else b"" for name in (PAGE, PDF))
    found_page = found.decode(errors="replace")
    if without_figures(found_page) != without_figures(page):
        raise ValueError(f"{folder / PAGE} does not follow from the JSON beside it: engrammar lab report.")
    if f'content="{report.versions}"' not in found_page:
        if report.digest.encode() not in found_pdf:
            raise ValueError(f"{folder / PDF} is of other JSON than that beside it: engrammar lab report.")
        print(f"Figures were not compared: they were drawn by other versions than {report.versions}.")
        return
    pngs = figures_of(found_page)  # as many as in `report`, because the text is equal
    if not all(alike(figure.png, png) for figure, png in zip(report.figures, pngs, strict=True)):
        raise ValueError(f"A figure of {folder / PAGE} does not follow from the JSON beside it: engrammar lab report.")
    if render_pdf(report.with_figures(pngs)) != found_pdf:
        raise ValueError(f"{folder / PDF} does not follow from the JSON beside it: engrammar lab report.")


def _versions() -> str:
    """The versions that may change the bytes of a figure or of the PDF even if the results are the same."""
    named = ("matplotlib", "pillow", "fpdf2", "fonttools", "numpy")
    return ", ".join([*(f"{name} {version(name)}" for name in named), f"zlib {zlib.ZLIB_RUNTIME_VERSION}"])
