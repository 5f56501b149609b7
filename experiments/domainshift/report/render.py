"""A report as files: one HTML page without script or network, Markdown, LaTeX, CSV."""

from __future__ import annotations

import base64
import csv
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from domainshift.records.results import Result
from domainshift.report import contents, figures, switches
from domainshift.report.audit import RULES
from domainshift.report.choices import Choice
from domainshift.report.comparisons import counted
from domainshift.report.contents import Report, Section
from domainshift.report.statistics import wilson
from domainshift.report.study import Study
from domainshift.report.tables import (
    ARROW,
    DASH,
    PM,
    PRIMARY_HEADINGS,
    numbers,
    primary_rows,
    span,
)

TEMPLATES = Path(__file__).resolve().parent / "templates"
MAPS = 3  # pictures of maps
MAP_WIDTH = 1700  # pixels: those of maps.png, whose squares a smaller size would blur
FAILURES = 10  # in the banner

PARTS = {  # by the id of the section, in the order of the page; tables follow the claims
    "main": "Main findings",
    "limits": "What these figures are not",
    "claims": "Published claims",
    "confusions": "Which classes the primary arms confuse",
    "choices": "Choosing without target labels",
    "findings": "All findings",
    "cost": "What it cost",
    "maps": "Maps",
    "aside": "Records set aside, runs missing",
    "audit": "Audit",
    "runs": "Every run",
    "reading": "How to read this page",
}
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$",
    PM: r"$\pm$", "\N{MINUS SIGN}": "$-$", ARROW: r"$\to$", DASH: "--",
}  # fmt: skip


# --- templates --------------------------------------------------------------------------------


def latex_text(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)


def unbroken(text: str) -> Markup:
    """Text whose small words and dashes between numbers are no place for a line break."""
    space, joiner = "\N{NO-BREAK SPACE}", "\N{WORD JOINER}"
    words = rf"(?<=[\dp]) ({PM}|of|to|&lt;) (?=\d)"
    text = re.sub(words, rf"{space}\1{space}", str(escape(text)))
    text = re.sub(r"\bp (?=\d)", f"p{space}", text)
    return Markup(re.sub(rf"(?<=\d){DASH}(?=\d)", f"{joiner}{DASH}{joiner}", text))


@functools.cache
def environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: bool(name) and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "tex": latex_text,
        "unbroken": unbroken,
        "counted": counted,
        "cell": lambda text: text.replace("|", "\\|"),
    }
    return env


def rendered(suffix: str, report: Report, **values: Any) -> str:
    study = report.study
    return environment().get_template(f"report.{suffix}.j2").render(
        report=report,
        study=study,
        passes=report.audit.passes,
        what_was_run=contents.what_was_run(study),
        progress=contents.progress(study),
        set_aside=contents.set_aside(study),
        how_to_read=contents.HOW_TO_READ,
        **values,
    ).rstrip("\n") + "\n"  # fmt: skip


def markdown(report: Report) -> str:
    study = report.study
    text = rendered(
        "md",
        report,
        choices=[choice_row(choice, study) for choice in report.choices.rows],
        choice_headings=choice_headings(study),
        versions=contents.versions_of(list(study.results.values())),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


LATEX_TARGETS = 3  # that a table of seven columns has room for
LATEX_MARKS = {
    "higher": r"$^{\uparrow}$", "lower": r"$^{\downarrow}$", "equal": r"$^{=}$",
    "undecided": r"$^{?}$", "confounded": r"$^{\dagger}$", "": "",
}  # fmt: skip


class LatexTable(NamedTuple):
    """A table for a paper: the arm, then accuracy and difference of each target."""

    label: str
    caption: str
    command: str
    headings: list[str]
    rows: list[list[str]]
    marks: list[str]  # what the signs of its verdicts mean


def latex(report: Report) -> str:
    """A float with booktabs for each table, at most seven columns wide."""
    versions = contents.versions_of(list(report.study.results.values()))
    tables = [latex_table(section) for section in report.sections]
    return rendered("tex", report, tables=tables, versions=versions)


def latex_table(section: Section) -> LatexTable:
    main = section.main
    columns = [i for i, heading in enumerate(main.headings) if not heading.startswith("mean")]
    if not 0 < len(columns) <= LATEX_TARGETS:
        columns = [len(main.headings) - 1]
    used = {entries[i].mark for _, entries in main.rows for i in columns}
    rows = []
    for arm, entries in main.rows:
        cells = [latex_text(arm)]
        for i in columns:
            e = entries[i]
            cells += [latex_text(e.ours), latex_text(e.difference) + LATEX_MARKS[e.mark]]
        rows.append(cells)
    return LatexTable(
        section.table.name,
        section.table.title,
        section.command,
        [main.headings[i] for i in columns],
        rows,
        [f"{sign} {word}" for word, sign in LATEX_MARKS.items() if word in used - {""}],
    )


def as_csv(report: Report) -> str:
    """Every line of every table in numbers."""
    head = {"suite": report.study.name, "profile": report.study.profile}
    rows = [
        head | {"table": section.table.name} | numbers(line, report.audit.passes)
        for section in report.sections
        for line in section.lines
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["suite"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# --- the page ---------------------------------------------------------------------------------


def page(report: Report) -> str:
    """The report as HTML that is also well-formed XML."""
    study, results = report.study, list(report.study.results.values())
    seconds = sum(r.summary["seconds"] for r in figures.trainings(results))
    compared, passes = report.comparisons, report.audit.passes
    family = (
        f"Written by rule from the records. {len(compared.primary)} primary comparisons, targets told "
        f"apart, share Holm's correction; {len(compared.exploratory)} explore."
    )
    confusions = figures.confusions(study, compared.primary) if passes else []
    cost = figures.cost(study)
    return rendered(
        "html",
        report,
        links=links(report, {"confusions": confusions, "cost": cost}),
        style=(TEMPLATES / "style.css").read_text(),
        parts=PARTS,
        banner=banner(report),
        tiles=tiles(report),
        family=family,
        forest=figures.forest(compared.primary) if passes else None,
        primary_headings=PRIMARY_HEADINGS,
        primary=primary_rows(compared.primary) if passes else [],
        confusions=confusions,
        choices=[choice_row(choice, study) for choice in report.choices.rows],
        choice_headings=[
            (name, "n" if name in CHOICE_NUMBERS else "") for name in choice_headings(study)
        ],
        maps=maps(study),
        density=figures.density(results),
        distances=figures.random_densities(results),
        cost=cost,
        rules=rules(report),
        runs=filled(RUN_HEADINGS, [run_row(result) for result in results]),
        runs_line=f"{counted(len(results), 'finished run')} of "
        f"{counted(len(figures.trainings(results)), 'training')}, {seconds / 3600:.2f} h together.",
        versions=contents.versions_of(results),
    )


def links(report: Report, drawn: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Id and title of every section of the page.

    Args:
        drawn: what sections that may be empty show, by id.
    """
    there = drawn | {
        "limits": report.limits,
        "claims": report.claims,
        "choices": report.choices.rows or report.choices.notes,
    }
    parts = [(name, title) for name, title in PARTS.items() if there.get(name, True)]
    tables = [(f"table-{s.table.name}", s.table.title) for s in report.sections]
    before = [part for part in parts if part[0] in ("main", "limits", "claims")]
    return before + tables + parts[len(before) :]


CHOICE_HEADINGS = (
    "Table", "Target", "Validator", "Rank correlation", "Chooses", "Accuracy",
    "Oracle: chosen by target labels, no result", "Its accuracy",
)  # fmt: skip
CHOICE_NUMBERS = ("Rank correlation", "Accuracy", "Its accuracy")


def choice_headings(study: Study) -> list[str]:
    where = f"Source {ARROW} target" if len(study.sources) > 1 else "Target"
    return [where if name == "Target" else name for name in CHOICE_HEADINGS]


def choice_row(choice: Choice, study: Study) -> list[str]:
    def most(arm: tuple[str, int]) -> str:
        return arm[0] if choice.seeds == 1 else f"{arm[0]} ({arm[1]} of {choice.seeds} seeds)"

    correlation = "" if choice.correlation is None else f"{choice.correlation:+.2f}"
    return [
        choice.table,
        f" {ARROW} ".join(choice.pair) if len(study.sources) > 1 else choice.pair[1],
        choice.validator,
        correlation.replace("-", "\N{MINUS SIGN}"),
        most(choice.chosen),
        f"{choice.accuracy:.1f}",
        most(choice.oracle),
        f"{choice.oracle_accuracy:.1f}",
    ]


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """Name, value and kind of what the first screen says in a few words."""
    passes = report.audit.passes
    failures = counted(len(report.audit.failures), "failure")
    runs = contents.progress(report.study)
    decided = report.decided if report.comparisons.primary else "none declared"
    return [
        ("Runs", runs, "open" if report.study.missing else "good"),
        ("Audit", "passes" if passes else f"FAILS: {failures}", "good" if passes else "bad"),
        ("Primary comparisons decided", decided if passes else "withheld", ""),
        ("Seeds", seeds(report.study), ""),
    ]


def seeds(study: Study) -> str:
    return str(len({result.training.seed for result in study.used}))


def banner(report: Report) -> list[str]:
    failures = [f"{r.rule}: {r.text}" for r in report.audit.failures]
    if len(failures) > FAILURES:
        return [*failures[:FAILURES], f"and {len(failures) - FAILURES} more, below"]
    return failures


class Rule(NamedTuple):
    name: str
    asks: str
    checked: int
    failed: int
    remarks: list[str]


def rules(report: Report) -> list[Rule]:
    rows = []
    for name, asks in RULES.items():
        mine = [r for r in report.audit.remarks if r.rule == name]
        remarks = [f"{'FAILED: ' if r.fails else ''}{r.text}" for r in mine]
        failed = sum(r.fails for r in mine)
        rows.append(Rule(name, asks, report.audit.checked[name], failed, remarks))
    return rows


RUN_HEADINGS = (
    "Run", "Last epoch", "k of n", "Test set alone", "Selected epoch", "Oracle epoch", "Epochs",
    "Updates", "Seconds", "Images/s", "Weights",
)  # fmt: skip


def run_row(result: Result) -> list[str]:
    test, training, summary = result.evaluation, result.training, result.summary
    return [
        result.name + (" (one class)" if test.collapsed else ""),
        f"{test.accuracy:.2f}",
        f"{test.correct} of {test.total}",
        span(wilson(test.correct, test.total)),
        str(summary["selected_epoch"] or ""),
        str(summary["oracle_epoch"] or ""),
        str(training.epochs),
        str(training.updates),
        f"{summary['seconds']:.0f}",
        f"{training.images_per_second:.0f}",
        f"{training.weights.source} {(training.weights.sha256 or '')[:8]}",
    ]


def filled(
    headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    return [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]


class Maps(NamedTuple):
    pictures: list[tuple[str, str, str]]  # name of the training, method in words, PNG in base64
    unreadable: list[str]


def maps(study: Study) -> Maps:
    """What the maps look like: the first training of each kind that has a picture."""
    pictures: dict[Any, tuple[str, str, str]] = {}
    unreadable = []
    for result in figures.trainings(study.results.values()):
        values = switches.method_values(result)
        kind = values["mode"], len(result.training.layers) > 1, repr(
            [v for name, v in values.items() if switches.is_choice(result, name)]
        )  # fmt: skip
        path, name = result.folder / "maps.png", result.folder.name
        if kind in pictures or len(pictures) == MAPS or not path.exists():
            continue
        try:
            data = base64.b64encode(small_png(path)).decode()
            pictures[kind] = name, switches.in_words(result), data
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            unreadable.append(f"{name}: maps.png cannot be read as a picture.")
    return Maps(list(pictures.values()), unreadable)


def small_png(path: Path) -> bytes:
    """A picture at most MAP_WIDTH wide. A narrower one keeps every pixel, and no colour is changed."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((MAP_WIDTH, 100 * MAP_WIDTH))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


FILES: dict[str, Callable[[Report], str]] = {
    ".html": page,
    ".md": markdown,
    ".tex": latex,
    ".csv": as_csv,
}
