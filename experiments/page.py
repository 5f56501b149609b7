"""The report as one HTML page: no script, no network; also well-formed XML."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import audit
import contents
import plots
from contents import Grid, Report, Section, grid_of, span
from findings import FIGURE, counted
from intervals import wilson
from PIL import Image
from study import Study

STYLE = Path(__file__).resolve().parent / "report.css"
MANY_PAIRS = 4  # with more, a table shows means over pairs, and each pair in a fold below
MAPS = 3  # pictures of maps
MAP_WIDTH = 1100  # pixels
FAILURES = 10  # in the banner

PARTS = {
    "findings": "All findings",
    "maps": "Maps",
    "aside": "Records set aside, runs missing",
    "audit": "Audit",
    "runs": "Every run",
    "reading": "How to read this page",
}


def tag(name: str, /, *content: str, **attributes: str) -> str:
    """An element. `content` is markup, attributes are text; class_ is class, aria_label aria-label."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value
    )
    inside = "".join(content)
    # of empty elements only those that HTML has as such may end in />
    return (
        f"<{name}{written}/>" if name in ("img", "meta") else f"<{name}{written}>{inside}</{name}>"
    )


def e(text: object) -> str:
    return html.escape(str(text))


def items(texts: Sequence[str]) -> str:
    return tag("ul", *(tag("li", e(text)) for text in texts)) if texts else tag("p", "None.")


def wide(content: str) -> str:
    """What may be wider than a phone, and then scrolls by itself."""
    return tag("div", content, class_="wide", tabindex="0")


def table_of(headings: Iterable[tuple[str, str]], rows: Iterable[str], class_: str = "") -> str:
    """A table. Headings: (text, class)."""
    head = (tag("th", e(text), scope="col", class_=kind) for text, kind in headings)
    inside = tag("thead", tag("tr", *head)) + tag("tbody", *rows)
    return wide(tag("table", inside, class_=class_))


# --- tables -----------------------------------------------------------------------------------


def html_grid(grid: Grid) -> str:
    rows = []
    for texts, line in zip(grid.rows, grid.lines, strict=True):
        cells = [tag("th", e(texts[0]), scope="row")]
        for text, column in zip(texts[1:], grid.columns[1:], strict=True):
            cells.append(tag("td", unbroken(e(text)), class_=column.kind))
        rows.append(tag("tr", *cells, class_="mean" if line.pair is None else ""))
    return table_of(((c.heading, c.kind) for c in grid.columns), rows)


def unbroken(text: str) -> str:
    """The small words that hold numbers together, without a line break at them."""
    return re.sub(
        r"(?<=\d) (\N{PLUS-MINUS SIGN}|of|to) (?=\d)",
        "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}",
        text,
    )


def html_picture(picture: plots.Picture) -> str:
    plot = tag("div", picture.svg, class_="plot", role="img", aria_label=picture.title)
    caption = tag("figcaption", tag("b", e(f"{picture.title}. ")), e(picture.caption))
    return tag("figure", wide(plot), caption)


def html_section(report: Report, section: Section) -> str:
    table = section.table
    if len(table.pairs) > MANY_PAIRS:
        means, each = (
            html_grid(
                grid_of([x for x in section.lines if (x.pair is None) is mean], report.audit.passes)
            )
            for mean in (True, False)
        )
        grid = means + fold(f"Each of the {len(table.pairs)} pairs", each)
    else:
        grid = html_grid(section.grid(report))
    made = tag("p", "Made by ", tag("code", e(section.made_by)), class_="made")
    return tag(
        "section",
        tag("h3", e(table.title)),
        grid,
        *(tag("p", e(note), class_="note") for note in section.notes),
        made,
        *(tag("p", e(text), class_="made") for text in section.versions),
        *map(html_picture, section.pictures),
        id=f"table-{table.name}",
    )


def fold(summary: str, content: str, unfolded: bool = False) -> str:
    open_ = {"open": "open"} if unfolded else {}
    return tag("details", tag("summary", e(summary)), content, **open_)


# --- records ----------------------------------------------------------------------------------


def html_audit(report: Report) -> str:
    rows = []
    for rule, asks in audit.RULES.items():
        mine = [r for r in report.audit.remarks if r.rule == rule]
        failed = sum(r.fails for r in mine)
        told = items([f"{'FAILED: ' if r.fails else ''}{r.where}: {r.what}" for r in mine])
        more = fold(counted(len(mine), "remark"), told, failed > 0) if mine else ""
        outcome = tag("b", f"fails: {failed}", class_="bad") if failed else "passes"
        rows.append(
            tag(
                "tr",
                tag("th", e(rule), scope="row"),
                tag("td", e(asks), more),
                tag("td", str(report.audit.checked[rule]), class_="n"),
                tag("td", outcome),
            )
        )
    headings = (("Rule", ""), ("What it asks", ""), ("Checked", "n"), ("Outcome", ""))
    return table_of(headings, rows, "audit")


def html_runs(study: Study) -> str:
    headings = ("Run", "Last epoch", "k of n", "Test set alone", "Selected epoch", "Oracle epoch",
                "Epochs", "Updates", "Seconds", "Images/s", "Weights")  # fmt: skip
    rows = []
    for name, run in study.runs.items():
        s = run.summary
        cells = (
            f"{s[FIGURE]:.2f}",
            f"{s['target_correct']} of {s['target_total']}",
            span(wilson(s["target_correct"], s["target_total"])),
            s["selected_epoch"] or "",
            s["oracle_epoch"],
            s["epochs"],
            s["updates"],
            f"{s['seconds']:.0f}",
            f"{s['images_per_second']:.0f}",
            f"{s['weights']['source']} {(s['weights']['sha256'] or '')[:8]}",
        )
        name += " (one class)" if s["collapsed"] else ""
        cells = (tag("td", e(cell), class_="n") for cell in cells)
        rows.append(tag("tr", tag("th", e(name), scope="row"), *cells))
    table = table_of(((h, "n" if i else "") for i, h in enumerate(headings)), rows)
    seconds = sum(run.summary["seconds"] for run in study.runs.values())
    took = tag("p", f"{counted(len(study.runs), 'finished run')}, {seconds / 3600:.2f} h together.")
    return took + fold("Show them", table)


def html_maps(study: Study) -> str:
    """What the maps look like: the first run of each kind that has a picture."""
    pictures: dict[Any, tuple[str, bytes]] = {}  # by kind: name of the run, picture
    unreadable = []
    for run in study.runs.values():
        kind = run.config["mode"], run.config["product"], len(run.layers) > 1
        path = run.folder / "maps.png"
        if kind in pictures or len(pictures) == MAPS or not path.exists():
            continue
        try:
            pictures[kind] = run.folder.name, small_png(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            unreadable.append(f"{run.folder.name}: maps.png cannot be read as a picture.")
    figures = []
    for name, picture in pictures.values():
        data = base64.b64encode(picture).decode()
        image = tag(
            "img", class_="maps", alt=f"Maps of {name}", src=f"data:image/png;base64,{data}"
        )
        caption = f"{name}: one image at the shaped layers; before, the map, after."
        figures.append(tag("figure", wide(image), tag("figcaption", e(caption))))
    shown = "".join(figures) or tag("p", "No run has a picture of its maps.")
    return shown + (items(unreadable) if unreadable else "")


def small_png(path: Path) -> bytes:
    """A picture at most MAP_WIDTH wide, in 128 colours: some 100 kB."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((MAP_WIDTH, 100 * MAP_WIDTH))
        buffer = io.BytesIO()
        picture.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def html_density(study: Study) -> str:
    runs = list(study.runs.values())
    picture = plots.density(runs)
    text = (
        html_picture(picture) if picture else tag("p", "No finished run recorded maps of images.")
    )
    if distances := plots.random_densities(runs):
        text += tag(
            "p",
            f"Random maps: the share of ones in a layer's last map is at most {max(distances):.3f} "
            f"from 1 \N{MINUS SIGN} p0, over {len(distances)} shaped layers, all runs together.",
        )
    return text


# --- the page ---------------------------------------------------------------------------------


def tile(name: str, value: str, kind: str = "") -> str:
    return tag("div", tag("dt", e(name)), tag("dd", e(value)), class_=f"tile {kind}".strip())


def tiles(report: Report) -> str:
    passes, tested = report.audit.passes, report.tested
    failures = counted(len(report.audit.failures), "failure")
    return tag(
        "dl",
        tile("Runs", contents.progress(report.study), "open" if report.study.missing else "good"),
        tile("Audit", "passes" if passes else f"FAILS: {failures}", "good" if passes else "bad"),
        tile("Comparisons", f"{len(report.comparisons)}, {len(tested)} with an interval"),
        tile("Distinguishable from zero", report.apart if passes else "withheld"),
        class_="tiles",
    )


def banner(report: Report) -> str:
    """Above everything else, where the audit fails."""
    failures = [f"{r.rule}: {r.where}: {r.what}" for r in report.audit.failures]
    if not failures:
        return ""
    if len(failures) > FAILURES:
        failures = [*failures[:FAILURES], f"and {len(failures) - FAILURES} more, below"]
    return tag("div", tag("h2", "The audit fails"), tag("p", "Do not quote a figure of this page."),
               items(failures), class_="banner", role="alert")  # fmt: skip


def page(report: Report) -> str:
    study = report.study
    profile = f", profile {study.profile}" if study.profile else ""
    links = [
        tag("li", tag("a", e(s.table.title), href=f"#table-{s.table.name}"))
        for s in report.sections
    ]
    links += [tag("li", tag("a", e(words), href=f"#{name}")) for name, words in PARTS.items()]
    family = (
        f"Written by rule from the records. {counted(len(report.comparisons), 'comparison')}, "
        f"{len(report.tested)} of them with a p value: Holm's correction is over these."
    )
    all_findings = tag("p", e(family)) + "".join(
        (tag("h3", e(heading)) if heading else "") + items(texts)
        for heading, texts in report.findings.items()
        if texts
    )
    inside = {
        "findings": all_findings,
        "maps": html_maps(study) + tag("h3", "How dense they are") + html_density(study),
        "aside": items(contents.set_aside(study)),
        "audit": html_audit(report),
        "runs": html_runs(study),
        "reading": items(contents.HOW_TO_READ),
    }
    main = tag(
        "main",
        banner(report),
        tag(
            "header",
            tag("p", e(f"Suite {study.name}{profile}"), class_="kicker"),
            tag("h1", e(study.title)),
            tag("p", e(contents.what_was_run(study))),
        ),
        tiles(report),
        tag("section", tag("h2", "Main findings"), items(report.main), id="main"),
        tag("section", tag("h2", "What these figures are not"), items(report.limits), id="limits")
        if report.limits
        else "",
        tag("nav", tag("h2", "On this page"), tag("ol", *links)),
        tag("h2", "Tables"),
        *(html_section(report, section) for section in report.sections),
        *(tag("section", tag("h2", e(words)), inside[n], id=n) for n, words in PARTS.items()),
        tag(
            "footer",
            tag("p", "Page: ", tag("code", e(f"python experiments/report.py {study.folder}"))),
            tag("p", "Runs: ", tag("code", e(study.command or "python experiments/run.py"))),
            *(tag("p", e(text)) for text in contents.versions_of(list(study.runs.values()))),
        ),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", e(study.title)),
        tag("style", STYLE.read_text()),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', main), lang='en')}\n"
