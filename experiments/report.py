"""Build the report of a suite from the records of its runs, and from nothing else.

    python experiments/report.py runs/suites/report-b-full

Writes report.html, one page that needs no network and no script, and beside it the tables as
report.md, report.tex and report.csv. The audit runs first: if it fails, the page says so above
everything else, no finding is drawn, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contents
import record
from contents import ARROW, DASH, PM, Line, Report, Section
from findings import FIGURE, Comparison
from intervals import mean, spread
from page import page
from study import StudyError, read_study

FAILED, BAD_INPUT = 1, 2  # exit statuses


def markdown(report: Report) -> str:
    def cells(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    study, passes = report.study, report.audit.passes
    outcome = "passes" if passes else "FAILS: do not quote a figure of this report"
    text = [f"# {study.title}", "", contents.what_was_run(study), ""]
    text += [f"Runs: {contents.progress(study)}. Audit: {outcome}.", ""]
    text += ["## Main findings", "", *(f"- {line}" for line in report.main), ""]
    if report.limits:
        text += ["## What these figures are not", "", *(f"- {line}" for line in report.limits), ""]
    for section in report.sections:
        grid = section.grid(report)
        text += [f"## {section.table.title}", "", cells([c.heading for c in grid.columns])]
        text.append(cells([" ---: " if c.kind.startswith("n") else " --- " for c in grid.columns]))
        text += [cells(row) for row in grid.rows]
        text += ["", *(f"{note}\n" for note in section.notes), f"Made by `{section.made_by}`  "]
        text += [*section.versions, ""]
    text += ["## All findings", ""]
    for heading, lines in report.findings.items():
        text += [f"### {heading}", ""] if heading and lines else []
        text += [*(f"- {line}" for line in lines), ""] if lines else []
    text += ["## Records set aside, runs missing", ""]
    text += [f"- {line}" for line in contents.set_aside(study) or ["None."]]
    text += ["", "## How to read this", "", *(f"- {line}" for line in contents.HOW_TO_READ)]
    return "\n".join(text) + "\n"


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$",
    PM: r"$\pm$", "\N{MINUS SIGN}": "$-$", ARROW: r"$\to$", DASH: "--",
}  # fmt: skip


def latex_text(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)


def latex(report: Report) -> str:
    """A tabular for each table, to be put where it is wanted; needs no package."""
    outcome = "passes" if report.audit.passes else "FAILS: do not quote a figure of these tables"
    text = [f"% {report.study.title}: {contents.progress(report.study)}; the audit {outcome}"]
    for section in report.sections:
        grid = section.grid(report)
        letters = "".join("r" if c.kind.startswith("n") else "l" for c in grid.columns)
        text += ["", f"% {section.table.title}", f"% made by: {section.made_by}"]
        text += [f"% {line}" for line in (*section.versions, *section.notes)]
        text += [rf"\begin{{tabular}}{{{letters}}}", r"\hline"]
        text.append(" & ".join(latex_text(c.heading) for c in grid.columns) + r" \\ \hline")
        text += [" & ".join(map(latex_text, row)) + r" \\" for row in grid.rows]
        text += [r"\hline", r"\end{tabular}"]
    return "\n".join(text) + "\n"


FIGURES = {
    "accuracy": FIGURE,
    "selected": "selected_target_accuracy",
    "oracle": "oracle_target_accuracy",
    "invalid": "invalid_test_accuracy",
}


def csv_row(report: Report, section: Section, line: Line) -> dict[str, Any]:
    """A line of a table in numbers: percent and percentage points; nothing where there is none."""
    source, target = line.pair or ("mean", "mean")
    row: dict[str, Any] = {
        "suite": report.study.name,
        "profile": report.study.profile,
        "table": section.table.name,
        "arm": line.arm.name,
        "source": source,
        "target": target,
        "runs": len(line.runs),
        "planned": line.planned,
    }
    single = line.runs if line.pair else []  # a mean has no k of n
    row["seeds"] = " ".join(str(run.config["seed"]) for run in single)
    row["correct"] = " ".join(str(run.summary["target_correct"]) for run in single)
    for name in ("target_total", "majority_rate"):
        row[name] = single[0].summary[name] if single else None
    row["collapsed_runs"] = sum(run.summary["collapsed"] for run in line.runs)
    for name, figure in FIGURES.items():
        values = line.values(figure)
        row |= {name: mean(values), f"{name}_spread": spread(values)} if values else {
            name: None, f"{name}_spread": None}  # fmt: skip
    row["wilson_low"], row["wilson_high"] = line.wilson or (None, None)
    for name in ("accuracy", "status", "note"):
        row[f"published_{name}"] = getattr(line.published, name, None)
    row["published_doubts"] = "; ".join(line.published.doubts) if line.published else None
    c = line.comparison
    found = c.estimate if c else None
    row |= {
        "reference": c.reference.name if c else None,
        "difference": found.mean if found else None,
        "difference_low": found.low if found else None,
        "difference_high": found.high if found else None,
        "difference_pairs": " ".join(map("-".join, c.pairs)) if c else None,
        "difference_seeds": len(c.seeds) if c else None,
        "difference_missing": len(c.missing) if c else None,
        "difference_left_out": len(c.left_out) if c else None,
        "p_holm": c.adjusted if c else None,
        "verdict": c.verdict if c and c.adjusted is not None and report.audit.passes else None,
        "confounds": "; ".join(c.confounds) if c else None,
    }
    return row | controls_of(line, report.audit.passes)


def controls_of(line: Line, passes: bool) -> dict[str, str]:
    """The differences to the arm's controls: of several, one after the other in each field."""

    def each(value: Callable[[Comparison], Any]) -> str:
        values = ["" if (v := value(c)) is None else str(v) for c in line.controls]
        return "; ".join(values) if any(values) else ""

    return {
        "control": each(lambda c: c.reference.name),
        "control_difference": each(lambda c: c.estimate and c.estimate.mean),
        "control_low": each(lambda c: c.estimate and c.estimate.low),
        "control_high": each(lambda c: c.estimate and c.estimate.high),
        "control_pairs": each(lambda c: " ".join(map("-".join, c.pairs))),
        "control_p_holm": each(lambda c: c.adjusted),
        "control_verdict": each(lambda c: c.verdict if c.adjusted is not None and passes else None),
        "control_confounds": each(lambda c: ", ".join(c.confounds)),
    }


def as_csv(report: Report) -> str:
    rows = [csv_row(report, section, line) for section in report.sections for line in section.lines]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["suite"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the audit fails (the page is written and says so), 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="of a suite, or any folder of run folders")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the folder)")
    args = parser.parse_args(arguments)
    out = args.out or args.folder / "report.html"
    made = {".html": page, ".md": markdown, ".tex": latex, ".csv": as_csv}
    try:
        report = contents.build(read_study(args.folder))
        for suffix, make in made.items():
            record.write_bytes(out.with_suffix(suffix), make(report).encode())
    except (StudyError, record.RecordError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{contents.progress(report.study)}; {out}, and .md, .tex, .csv beside it")
    if report.audit.passes:
        return 0
    rule = "=" * 72
    failures = [f"  {r.rule}: {r.where}: {r.what}" for r in report.audit.failures]
    print(rule, "THE AUDIT FAILS: do not quote a figure of this report", *failures, rule, sep="\n",
          file=sys.stderr)  # fmt: skip
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
