"""What the report of a suite says, before it is a page, Markdown, LaTeX or CSV."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import audit
import findings
import plots
import published
from findings import ALPHA, FIGURE, HIGHER, LOWER, Comparison, counted
from intervals import LEVEL, mean, spread, wilson
from published import Published
from study import Arm, Pair, Run, Study, Table, controls, departures, merged, over_seeds

ARROW, DASH, PM = "\N{RIGHTWARDS ARROW}", "\N{EN DASH}", "\N{PLUS-MINUS SIGN}"
WITHHELD = "No finding is drawn while the audit fails."


# --- lines of a table -------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a table: an arm on one source-target pair, or its mean over all of them."""

    arm: Arm
    pair: Pair | None  # None: the mean over `pairs`
    pairs: Sequence[Pair]
    runs: Sequence[Run]
    planned: int
    published: Published | None
    comparison: Comparison | None  # with the table's baseline
    controls: Sequence[Comparison]  # with what `study.controls` names, the baseline left out

    def values(self, name: str) -> list[float] | None:
        """A figure of the summaries, one a seed; None where some run has none.

        A mean over pairs is over all of them, so that the means of two arms are of the same thing: a
        seed that lacks a pair is not in it.
        """
        if self.pair is None:
            return over_seeds(self.arm.runs, name, self.whole_seeds, self.pairs) or None
        values = [run.summary.get(name) for run in self.runs]
        return values if values and None not in values else None

    @property
    def whole_seeds(self) -> list[int]:
        """Seeds of which there is a run on every pair."""
        seeds = {run.config["seed"] for run in self.runs}
        return sorted(s for s in seeds if all((*pair, s) in self.arm.runs for pair in self.pairs))

    @property
    def wilson(self) -> tuple[float, float] | None:
        """Of the mean k. Seeds share the test images, so more of them do not make it narrower."""
        if self.pair is None or not self.runs:
            return None
        correct = mean([run.summary["target_correct"] for run in self.runs])
        return wilson(correct, self.runs[0].summary["target_total"])


def lines_of(table: Table, compared: Sequence[Comparison], rows: list[dict]) -> list[Line]:
    """For each arm its mean over the table's pairs, if there are several, then each pair.

    Args:
        compared: all comparisons of the suite.
        rows: `published.rows()`.
    """
    found = []
    known = {(c.reference.name, findings.same_runs(c.arm, c.reference)): c for c in compared}
    for arm in table.compared():
        pairs = [pair for pair in table.pairs if pair in arm.pairs]
        base = [table.baseline] if table.baseline and arm is not table.baseline else []
        held = [r for a, r in controls(table) if a.name == arm.name]
        against = base + [r for r in held if not table.baseline or r.name != table.baseline.name]
        wholes = [known.get((r.name, findings.same_runs(arm, r))) for r in against]
        for pair in [None, *pairs] if len(pairs) > 1 else pairs:
            over = pairs if pair is None else [pair]
            keys = [key for key in arm.planned if key[:2] in over]
            runs = [arm.runs[key] for key in sorted(keys) if key in arm.runs]
            told = wholes if pair is None else [
                whole if whole and len(pairs) == 1
                else findings.compare(arm, reference, table.name, over)._replace(
                    confounds=whole.confounds if whole else ())
                for reference, whole in zip(against, wholes, strict=True)
            ]  # fmt: skip
            beside = published.find(runs[0], table.published, rows) if runs and pair else None
            found.append(
                Line(arm, pair, over, runs, len(keys), beside, told[0] if base else None,
                     [c for c in told[len(base) :] if c])
            )  # fmt: skip
    return found


# --- what a cell says -------------------------------------------------------------------------


def percent(values: Sequence[float] | None) -> str:
    """'54.1 ± 0.4', or of one seed '54.1'."""
    if not values:
        return ""
    sd = spread(values)
    return f"{mean(values):.1f}" + ("" if sd is None else f" {PM} {sd:.1f}")


def last_text(line: Line) -> str:
    return percent(line.values(FIGURE)) or ("incomplete" if line.runs else "missing")


def where_text(line: Line) -> str:
    return "mean" if line.pair is None else f"{line.pair[0]} {ARROW} {line.pair[1]}"


def published_text(line: Line) -> str:
    found = line.published
    if found is None:
        return ""
    return f"{found.accuracy:.2f}" + ("" if found.status == "valid" else f" ({found.status})")


def seeds_text(line: Line) -> str:
    done = len(line.runs)
    if line.pair is not None:
        missing = [
            str(s) for s in line.arm.seeds(line.pair) if (*line.pair, s) not in line.arm.runs
        ]
        text = f"{done} of {line.planned}"
        return f"{text}; missing: {', '.join(missing)}" if missing else text
    text = f"{done} of {line.planned} runs"
    left = done - len(line.whole_seeds) * len(line.pairs)
    return f"{text}; {left} left out, whose seeds lack others" if left else text


def difference_text(line: Line) -> str:
    return difference(line.comparison, line.pairs) if line.comparison else ""


def controls_text(line: Line) -> str:
    """'bn-only: +4.7 ± 2.9, p 0.040', one after the other."""
    found = [
        f"{c.reference.name}: {difference(c, line.pairs)}"
        + ("" if c.adjusted is None else f", p {findings.p_text(c.adjusted)}")
        for c in line.controls
    ]
    return " / ".join(found)


def difference(comparison: Comparison, pairs: Sequence[Pair]) -> str:
    """'+4.7 ± 2.9', and what is to be known of it where it stands in a line of `pairs`."""
    found = comparison.estimate
    if found is None:
        return comparison.verdict
    text = findings.signed(found.mean) if found.low is None else findings.with_interval(found)
    text += f"; {comparison.verdict}" if found.low is None else ""
    text += f"; {comparison.gaps}" if comparison.gaps else ""
    if set(comparison.pairs) == set(pairs):
        return text
    over = f"{len(comparison.pairs)} of {len(pairs)} pairs"
    if len(comparison.pairs) == 1:
        over = f" {ARROW} ".join(comparison.pairs[0])
    return f"{text}; over {over}"


def verdict_text(line: Line) -> str:
    comparison = line.comparison
    if comparison is None or comparison.adjusted is None:
        return ""
    confounded = ", confounded" if comparison.confounds else ""
    return f"{comparison.verdict} (p {findings.p_text(comparison.adjusted)}){confounded}"


def counts_text(line: Line) -> str:
    if line.pair is None or not line.runs:
        return ""
    k = sorted(run.summary["target_correct"] for run in line.runs)
    first = f"{k[0]}" if k[0] == k[-1] else f"{k[0]}{DASH}{k[-1]}"
    return f"{first} of {line.runs[0].summary['target_total']}"


def span(limits: tuple[float, float] | None) -> str:
    return f"{limits[0]:.1f} to {limits[1]:.1f}" if limits else ""


def majority_text(line: Line) -> str:
    return f"{line.runs[0].summary['majority_rate']:.1f}" if line.pair and line.runs else ""


def flags_text(line: Line) -> str:
    collapsed = sum(run.summary["collapsed"] for run in line.runs)
    flags = [f"one class in {collapsed} of {counted(len(line.runs), 'run')}"] if collapsed else []
    beside: dict[str, list[str]] = {}
    for c in ([line.comparison] if line.comparison else []) + list(line.controls):
        if c.confounds:
            beside.setdefault(", ".join(c.confounds), []).append(c.reference.name)
    for what, names in beside.items():
        alone = line.comparison and names == [line.comparison.reference.name]
        flags.append(f"confounded{'' if alone else ' beside ' + ', '.join(names)}: {what}")
    return "; ".join(flags)


class Column(NamedTuple):
    heading: str
    text: Callable[[Line], str]
    kind: str = "n"  # n: a number; or a word for the page's style


COLUMNS = (
    Column("Arm", lambda line: line.arm.name, "arm"),
    Column(f"Source {ARROW} target", where_text, "pair"),
    Column("Published", published_text),
    Column("Last epoch", last_text),
    Column("Seeds", seeds_text),
    Column("Minus control", controls_text, "control"),
    Column("Minus baseline", difference_text),
    Column("Verdict", verdict_text, "verdict"),
    Column("k of n", counts_text),
    Column("Test set alone", lambda line: span(line.wilson)),
    Column("Epoch selected on source", lambda line: percent(line.values("selected_target_accuracy"))),
    Column("Oracle: epoch chosen by target labels",
           lambda line: percent(line.values("oracle_target_accuracy")), "n oracle"),
    Column("INVALID: tested on training images",
           lambda line: percent(line.values("invalid_test_accuracy")), "n invalid"),
    Column("Largest class", majority_text),
    Column("Flags", flags_text, "flags"),
)  # fmt: skip


class Grid(NamedTuple):
    """A table of text."""

    columns: list[Column]
    rows: list[list[str]]
    lines: list[Line]


def grid_of(lines: Sequence[Line], verdicts: bool) -> Grid:
    """Columns that say nothing in any line are left out, and that of verdicts unless `verdicts`."""
    shown = [column for column in COLUMNS if verdicts or column.text is not verdict_text]
    shown = [column for column in shown if any(map(column.text, lines))]
    return Grid(shown, [[column.text(line) for column in shown] for line in lines], list(lines))


# --- the whole --------------------------------------------------------------------------------


class Section(NamedTuple):
    """A table of the report with what belongs to it."""

    table: Table
    lines: list[Line]
    notes: list[str]
    made_by: str
    versions: list[str]
    pictures: list[plots.Picture]

    def grid(self, report: Report) -> Grid:
        return grid_of(self.lines, report.audit.passes)


class Report(NamedTuple):
    study: Study
    audit: audit.Audit
    comparisons: list[Comparison]
    sections: list[Section]
    main: list[str]  # the sentences of the first screen
    findings: dict[str, list[str]]  # all sentences, by heading
    limits: list[str]  # what keeps the figures from being more than they are

    @property
    def tested(self) -> list[Comparison]:
        """The family that Holm's correction is over."""
        return [c for c in self.comparisons if c.adjusted is not None]

    @property
    def apart(self) -> str:
        """How many comparisons differ from zero; the confounded ones are not among them."""
        sound = [c for c in self.tested if not c.confounds]
        text = f"{sum(c.verdict in (HIGHER, LOWER) for c in sound)} of {len(sound)}"
        aside = len(self.tested) - len(sound)
        return text + (f"; {aside} confounded aside" if aside else "")


def build(study: Study) -> Report:
    result = audit.audit(study)
    confounds: dict[str, list[str]] = {}
    for remark in result.remarks:
        if remark.rule in ("confounds", "updates", "weights"):
            confounds.setdefault(remark.where, []).append(remark.what)
    compared = findings.comparisons(study, confounds)
    rows = published.rows()
    told = compared if result.passes else [c._replace(adjusted=None) for c in compared]
    sections = [section_of(study, table, lines_of(table, told, rows)) for table in study.tables]
    limits = limits_of(list(study.runs.values()))
    if not result.passes:
        return Report(study, result, compared, sections, [WITHHELD], {"": [WITHHELD]}, limits)
    said = sentences(study, compared, sections)
    main = [findings.tally(compared)]
    main += [c.sentence for c in findings.ranked(compared)[: findings.SHOWN]]
    main += said["Beside the published figures"][:3]
    collapsed = said["Collapse"]
    if len(collapsed) > 2:
        collapsed = [f"In {len(collapsed)} arms some runs call every target image one class."]
    return Report(study, result, compared, sections, main + collapsed, said, limits)


def section_of(study: Study, table: Table, lines: list[Line]) -> Section:
    beside = {(line.arm.name, line.pair): line.published for line in lines if line.published}
    runs = {run.folder: run for line in lines for run in line.runs}
    made_by = f"{study.command} --only {shlex.quote(table.name)}"
    if study.command is None:
        made_by = "no suite.json: the finished runs of the folder, grouped by their switches"
    return Section(table, lines, notes_of(table, lines), made_by, versions_of(list(runs.values())),
                   plots.pictures(table, beside))  # fmt: skip


def notes_of(table: Table, lines: Sequence[Line]) -> list[str]:
    """What stands below a table: its note, and what is to be known of published figures."""
    notes = [table.note] if table.note else []
    if runs := [run for line in lines for run in line.runs]:
        notes.append(f"Runs of {budget(runs)}.")
    for line in lines:
        found = line.published
        if found and (found.also or found.doubts or found.status != "valid"):
            told = "; ".join([found.note, *found.doubts])
            text = f"Published {found.accuracy:.2f} for {line.arm.name}, {line.pair[1]}: {told}."
            if found.also:
                text += f" The same source also has {', '.join(found.also)}."
            notes.append(text)
    return list(dict.fromkeys(notes))


def sentences(
    study: Study, compared: Sequence[Comparison], sections: Sequence[Section]
) -> dict[str, list[str]]:
    """Every finding, by heading."""
    by_name: dict[str, list[Arm]] = {}
    for arm in (arm for section in sections for arm in section.table.compared()):
        by_name.setdefault(arm.name, []).append(arm)
    arms = [merged(same) for same in by_name.values()]
    lines = [line for section in sections for line in section.lines if line.published]
    told = [findings.against_published(line.arm, line.pair, line.published) for line in lines]
    beside = list(dict.fromkeys(text for text in told if text))
    if None in told:
        beside.append(
            f"{counted(told.count(None), 'published figure')} in the tables not compared with ours: "
            "our runs depart from the protocol."
        )
    judged = sum(": inside" in text or ": outside" in text for text in beside)
    if judged > 1:
        beside.append(
            f"Each of the {judged} figures is held against an interval of its own at {LEVEL:.0%}: of "
            f"as many runs like ours about {judged * (1 - LEVEL):.1f} lie outside by chance."
        )
    return {
        "Comparisons": [c.sentence for c in compared],
        "Beside the published figures": beside,
        "Collapse": findings.collapsed(arms),
        "The choice of the epoch": findings.epoch_choice(
            [run for name, run in study.runs.items() if name not in study.strays]
        ),
        "Testing on the training images": findings.mistake(arms),
    }


def limits_of(runs: Sequence[Run]) -> list[str]:
    """How runs depart from their protocols, and what their records warn of, with how many do."""

    def told(counts: Counter[str]) -> list[str]:
        share = {text: f" (in {n} of {len(runs)} runs)" for text, n in counts.items()}
        return [text + ("" if n == len(runs) else share[text]) for text, n in counts.items()]

    departed = told(Counter(text for run in runs for text in departures(run)))
    warned = Counter(text for run in runs for text in run.summary["warnings"])
    warned = Counter({text: n for text, n in warned.items() if not text.startswith("collapsed")})
    limits = [f"Not the protocol: {'; '.join(departed)}."] if departed else []
    if runs and not any(run.config["holdout"] for run in runs):
        limits.append(
            "No epoch is selected on source images, and no column shows one: none are held out for it "
            "(holdout 0), as in the published protocols."
        )
    return limits + told(warned)


def versions_of(runs: Sequence[Run]) -> list[str]:
    """What computed the runs: a line for each set of versions."""
    found = Counter(
        ", ".join(f"{name} {value}" for name, value in run.summary["versions"].items())
        for run in runs
    )
    return [f"{counted(n, 'run')}: {text}" for text, n in found.most_common()]


def progress(study: Study) -> str:
    done, failed = len(study.planned) - len(study.missing), len(study.failed)
    others = len(study.missing) - failed
    text = f"{done} of {counted(len(study.planned), 'run')} done"
    text += f", {failed} failed" if failed else ""
    return text + (f", {others} missing" if others else "")


def what_was_run(study: Study) -> str:
    runs = list(study.runs.values())
    if not runs:
        return "No run is finished."
    data = "drawn images" if any(r.config["data"] == "toy" for r in runs) else "PACS"
    tables = [table for table in study.tables if any(arm.runs for arm in table.arms)]
    arms = {arm.name for table in tables for arm in table.compared() if arm.runs}
    limits = {r.config["limit"] for r in runs}
    images = (
        f"at most {either(limits - {None})} images a class" if limits - {None} else "all images"
    )
    sources, targets = (
        ", ".join(sorted({r.config[n] for r in runs})) for n in ("source", "target")
    )
    return (
        f"ResNet-18 on {data}, trained on {sources} and tested on {targets}: "
        f"{counted(len(arms), 'arm')} in {counted(len(tables), 'table')}, "
        f"{counted(len({r.config['seed'] for r in runs}), 'seed')}. Runs of {budget(runs)}, "
        f"{either(r.config['image_size'] for r in runs)} pixels a side, {images}."
    )


def budget(runs: Sequence[Run]) -> str:
    updates, images = (
        either(values)
        for values in ([r.summary["updates"] for r in runs], [r.config["batch_size"] for r in runs])
    )
    return f"{updates} updates with {images} images"


def either(values: Iterable[int]) -> str:
    """Different values, or of many the least and the largest."""
    found = sorted(set(values))
    return " or ".join(map(str, found)) if len(found) < 4 else f"{found[0]} to {found[-1]}"


def set_aside(study: Study) -> list[str]:
    """Every record that no table uses, and every run that is not there, with the reason."""
    found = {p.name: f"{p.kind}: {'; '.join(p.lines)}" for p in study.problems}
    for name, lines in study.failed.items():
        found[name] = f"failed: {' / '.join(lines)}"
    for name in study.missing:
        found.setdefault(name, "missing")
    found |= study.strays
    return [f"{name}: {why}" for name, why in found.items()]


HOW_TO_READ = (
    "Accuracy is in percent of the target's images, at the last epoch, as in the published reports. "
    f"After {PM} stands the sample standard deviation over seeds.",
    "Minus baseline: the difference in percentage points, paired by seed and by source-target pair, "
    f"and half its {LEVEL:.0%} t interval over seeds. Only runs that both arms have enter; the others "
    "are counted as missing. A mean over pairs is taken within each seed first, over pairs that every "
    "seed in it has; runs that would make seeds unlike are counted as left out, and a difference over "
    "fewer pairs than its line says over which. One seed has no interval.",
    "Minus control: the same difference to the arm that it names, which does all that comes along with "
    "the method and not the method (BatchNorm measured anew, target images in BatchNorm's statistics, "
    "binarization), or which the suite names beforehand; with Holm's p.",
    f"Verdict: higher or lower where Holm's p, over all comparisons of the suite, is below {ALPHA}. "
    "An interval without zero whose p is not below it is named so. Anything else is not "
    "distinguishable from zero. Lines of single pairs beside their mean have an interval and no verdict. "
    "Confounded comparisons, which differ in more than the method, are in Holm's family; they come last and "
    "are in no count of verdicts.",
    f"Test set alone: Wilson's {LEVEL:.0%} interval of the mean k of n. So far other test images alone "
    "could move the figure, however many seeds there are.",
    "Epoch selected on source: accuracy on the target at the epoch that is best on held-out source "
    "images. Oracle: at the epoch that is best on the target; it uses the labels and is no result.",
    "Largest class: what always answering the target's most frequent class scores. Flags: runs whose "
    "every prediction is one class, and switches beside those of the method in which an arm differs "
    "from its reference.",
)
