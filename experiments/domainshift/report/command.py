"""Build the report of a suite from its records: the command report.py.

    python experiments/report.py runs/suites/report-b-full
    python experiments/report.py runs/suites/report-b-full --audit-only
    python experiments/report.py --records

Writes report.html, one page that needs no network and no script, and beside it the tables as report.md,
report.tex and report.csv. The audit runs first. If it fails, the page says so above everything else, no
finding is drawn, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainshift import files
from domainshift.errors import BadInput
from domainshift.progress import show_any_name
from domainshift.report import dictionary

FAILED, BAD_INPUT = 1, 2  # exit statuses


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the audit fails (the page is written and says so), 2 bad input."""
    show_any_name()
    parser = argparse.ArgumentParser(
        prog="report.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="of a suite, or any folder of run folders"
    )
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the folder)")
    parser.add_argument(
        "--audit-only", action="store_true", help="print the audit, and write no file"
    )
    parser.add_argument(
        "--records", action="store_true", help="print what every field of every record means"
    )
    args = parser.parse_args(arguments)
    if args.records:
        print(dictionary.dictionary())
        return 0
    if args.folder is None:
        parser.error("the folder of a suite is needed")
    try:
        return audit_only(args.folder) if args.audit_only else report(args.folder, args.out)
    except BadInput as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return BAD_INPUT


def audit_only(folder: Path) -> int:
    from domainshift.report import audit
    from domainshift.report.comparisons import matchups
    from domainshift.report.study import read_study

    study = read_study(folder)
    result = audit.audit(study, {table.name: matchups(table) for table in study.tables})
    print("\n".join(audit.lines(study, result)))
    return 0 if result.passes else FAILED


def report(folder: Path, out: Path | None) -> int:
    from domainshift.report import contents, render
    from domainshift.report.study import read_study

    built = contents.build(read_study(folder))
    out = out or folder / "report.html"
    for suffix, text_of in render.FILES.items():
        files.write_bytes(out.with_suffix(suffix), text_of(built).encode(errors="backslashreplace"))
    print(f"{contents.progress(built.study)}; {out}, and .md, .tex, .csv beside it")
    if built.audit.passes:
        return 0
    rule = "=" * 72
    failures = [f"  {r.rule}: {r.text}" for r in built.audit.failures]
    print(rule, "THE AUDIT FAILS: do not quote a figure of this report", *failures, rule, sep="\n",
          file=sys.stderr)  # fmt: skip
    return FAILED
