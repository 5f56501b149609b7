"""The lines of the report's tables, and what their cells say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from domainshift.records.results import Result
from domainshift.report import published
from domainshift.report.comparisons import (
    FIGURE,
    Comparison,
    Comparisons,
    Matchups,
    Verdict,
    counted,
    over_seeds,
    share_text,
    signed,
    with_interval,
)
from domainshift.report.published import Published
from domainshift.report.statistics import mean, spread, wilson
from domainshift.report.study import Arm, Pair, Table

ARROW, DASH, PM = "\N{RIGHTWARDS ARROW}", "\N{EN DASH}", "\N{PLUS-MINUS SIGN}"


# --- lines ------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a table: an arm on one source-target pair, or its mean over all of them.

    pair: None for the mean over `pairs`
    comparison: with the table's baseline
    controls: with the references of `Matchups.controls`, the baseline left out
    """

    arm: Arm
    pair: Pair | None
    pairs: Sequence[Pair]
    results: Sequence[Result]
    planned: int
    published: Published | None
    comparison: Comparison | None
    controls: Sequence[Comparison]

    def values(self, name: str) -> list[float] | None:
        """A figure of the summaries, one a seed; None where some result has none.

        A mean over pairs is over all of them, so that the means of two arms are of the same thing: a
        seed that lacks a pair is not in it.
        """
        if self.pair is None:
            return over_seeds(self.arm.results, name, self.whole_seeds, self.pairs) or None
        values = [result.summary.get(name) for result in self.results]
        return values if values and None not in values else None

    @property
    def whole_seeds(self) -> list[int]:
        """Seeds that have a result on every pair."""
        seeds = {result.training.seed for result in self.results}
        return sorted(
            s for s in seeds if all((*pair, s) in self.arm.results for pair in self.pairs)
        )

    @property
    def wilson(self) -> tuple[float, float] | None:
        """Of the mean k. Seeds share the test images, so more of them do not make it narrower."""
        if self.pair is None or not self.results:
            return None
        tests = [result.evaluation for result in self.results]
        return wilson(mean([test.correct for test in tests]), tests[0].total)


def lines_of(
    table: Table,
    matched: Matchups,
    comparisons: Comparisons,
    rows: Sequence[published.Row],
) -> list[Line]:
    """For each arm its mean over the table's pairs, if there are several, then each pair.

    Args:
        matched: of the table.
        comparisons: of the suite.
        rows: `published.rows()`.
    """
    controls: dict[str, list[Arm]] = {}
    for arm, reference in matched.controls:
        if table.baseline is None or reference.name != table.baseline.name:
            controls.setdefault(arm.name, []).append(reference)
    lines = []
    for arm in table.compared:
        pairs = [pair for pair in table.pairs if pair in arm.pairs]
        base = [table.baseline] if table.baseline and arm is not table.baseline else []
        references = base + controls.get(arm.name, [])
        for pair in [None, *pairs] if len(pairs) > 1 else pairs:
            over = pairs if pair is None else [pair]
            keys = [key for key in arm.planned if key[:2] in over]
            results = [arm.results[key] for key in sorted(keys) if key in arm.results]
            own = [
                comparisons.of(table, arm, reference, None if pair is None else over)
                for reference in references
            ]
            beside = published.find(results[0], table.published, rows) if results and pair else None
            lines.append(
                Line(arm, pair, over, results, len(keys), beside, own[0] if base else None,
                     own[len(base) :])
            )  # fmt: skip
    return lines


# --- cells ------------------------------------------------------------------------------------


def percent(values: Sequence[float] | None) -> str:
    """'54.1 ± 0.4', or of one seed '54.1'."""
    if not values:
        return ""
    sd = spread(values)
    return f"{mean(values):.1f}" + ("" if sd is None else f" {PM} {sd:.1f}")


def figure(name: str) -> Callable[[Line], str]:
    """What a cell says of a figure of the summaries."""
    return lambda line: percent(line.values(name))


def last_text(line: Line) -> str:
    return percent(line.values(FIGURE)) or ("incomplete" if line.results else "missing")


def where_text(line: Line) -> str:
    return "mean" if line.pair is None else f"{line.pair[0]} {ARROW} {line.pair[1]}"


def published_text(line: Line) -> str:
    if line.published is None:
        return ""
    status = line.published.status
    return f"{line.published.accuracy:.2f}" + ("" if status == "valid" else f" ({status})")


def seeds_text(line: Line) -> str:
    done = len(line.results)
    if line.pair is not None:
        missing = [
            str(s) for s in line.arm.seeds(line.pair) if (*line.pair, s) not in line.arm.results
        ]
        text = f"{done} of {line.planned}"
        return f"{text}; missing: {', '.join(missing)}" if missing else text
    text = f"{done} of {line.planned} runs"
    left = done - len(line.whole_seeds) * len(line.pairs)
    return f"{text}; {left} left out, whose seeds lack others" if left else text


def difference_text(line: Line) -> str:
    return difference(line.comparison, line.pairs) if line.comparison else ""


def controls_text(line: Line) -> str:
    """'bn-only: +4.7 ± 2.9', one after the other."""
    texts = [f"{c.reference.name}: {difference(c, line.pairs)}" for c in line.controls]
    return " / ".join(texts)


def difference(comparison: Comparison, pairs: Sequence[Pair]) -> str:
    """'+4.7 ± 2.9', and what a reader must know of it where it stands in a line of `pairs`."""
    e = comparison.estimate
    if e is None:
        return Verdict.NOTHING
    why = Verdict.ONE_SEED if e.n == 1 else Verdict.NO_SPREAD
    text = f"{signed(e.mean)}; {why}" if e.low is None else with_interval(e)
    text += f"; {comparison.gaps}" if comparison.gaps else ""
    if set(comparison.pairs) == set(pairs):
        return text
    over = f"{len(comparison.pairs)} of {len(pairs)} pairs"
    if len(comparison.pairs) == 1:
        over = f" {ARROW} ".join(comparison.pairs[0])
    return f"{text}; over {over}"


def verdict_text(line: Line) -> str:
    """The verdicts of the line's primary comparisons."""
    texts = []
    for c in ([line.comparison] if line.comparison else []) + list(line.controls):
        if c.primary:
            beside = "" if c is line.comparison else f"{c.reference.name}: "
            texts.append(beside + c.verdict_words)
    return " / ".join(texts)


def counts_text(line: Line) -> str:
    if line.pair is None or not line.results:
        return ""
    k = sorted(result.evaluation.correct for result in line.results)
    first = f"{k[0]}" if k[0] == k[-1] else f"{k[0]}{DASH}{k[-1]}"
    return f"{first} of {line.results[0].evaluation.total}"


def span(limits: tuple[float, float] | None) -> str:
    return f"{limits[0]:.1f} to {limits[1]:.1f}" if limits else ""


def majority_text(line: Line) -> str:
    return f"{line.results[0].evaluation.majority_rate:.1f}" if line.pair and line.results else ""


def flags_text(line: Line) -> str:
    shares = [r.collapsed_share for r in line.results if r.collapsed_share is not None]
    total = counted(len(line.results), "run")
    flags = []
    if shares:
        flags = [f"one class for {share_text(max(shares))} in {len(shares)} of {total}"]
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
    Column("Minus baseline", difference_text, "n difference"),
    Column("Verdict", verdict_text, "verdict"),
    Column("Flags", flags_text, "flags"),  # before what may have to be scrolled to
    Column("k of n", counts_text),
    Column("Test set alone", lambda line: span(line.wilson)),
    Column("Epoch selected on source", figure("selected_target_accuracy")),
    Column("Oracle: epoch chosen by target labels", figure("oracle_target_accuracy"), "n oracle"),
    Column("INVALID: tested on training images", figure("invalid_test_accuracy"), "n invalid"),
    Column("Largest class", majority_text),
)


class Grid(NamedTuple):
    """A table of text. Each row belongs to the line of the same number."""

    columns: list[Column]
    rows: list[list[str]]
    lines: list[Line]


def loss(name: str) -> Callable[[Line], str]:
    """What a cell says of a loss of the summaries: four digits, for in the reports' unit it is small."""

    def text(line: Line) -> str:
        values = line.values(name) if line.pair else None
        if not values:
            return ""
        sd = spread(values)
        return f"{mean(values):.4f}" + ("" if sd is None else f" {PM} {sd:.4f}")

    return text


LOSSES = (
    Column("Arm", lambda line: line.arm.name, "arm"),
    Column(f"Source {ARROW} target", where_text, "pair"),
    Column("Mean cross-entropy", loss("target_loss")),
    Column("In the reports' unit", loss("target_batch_loss")),
)


def grid_of(lines: Sequence[Line], verdicts: bool, columns: Sequence[Column] = COLUMNS) -> Grid:
    """Columns that say nothing in any line are left out, and that of verdicts unless `verdicts`."""
    columns = [column for column in columns if verdicts or column.text is not verdict_text]
    texts = [[column.text(line) for column in columns] for line in lines]
    kept = [i for i in range(len(columns)) if any(row[i] for row in texts)]
    rows = [[row[i] for i in kept] for row in texts]
    return Grid([columns[i] for i in kept], rows, list(lines))


# --- the main table ---------------------------------------------------------------------------

MARKED = (
    Verdict.HIGHER, Verdict.LOWER, Verdict.EQUAL, Verdict.UNDECIDED, Verdict.CONFOUNDED,
)  # fmt: skip


class Entry(NamedTuple):
    """An arm on one target, in text; "" where there is nothing to say."""

    ours: str
    difference: str  # to the baseline, with half its interval
    mark: str  # one word for the verdict on that difference
    published: str


class MainTable(NamedTuple):
    """A row for each arm, targets as columns.

    headings: of the targets, and of their mean last where there are several
    rows: name of the arm, and an entry for each heading
    """

    headings: list[str]
    rows: list[tuple[str, list[Entry]]]


def main_table(lines: Sequence[Line], verdicts: bool, means_only: bool) -> MainTable:
    """The main table of lines that `lines_of` made.

    Args:
        verdicts: whether verdicts may be shown.
        means_only: whether the targets are too many for columns, so that their mean alone is shown.
    """
    by_arm: dict[str, dict[Pair | None, Line]] = {}
    for line in lines:
        by_arm.setdefault(line.arm.name, {})[line.pair] = line
    pairs = list(dict.fromkeys(line.pair for line in lines if line.pair is not None))
    several = any(line.pair is None for line in lines)
    shown: list[Pair | None] = [*([] if means_only else pairs), *([None] if several else [])]
    sources = {source for source, _ in pairs}

    def heading(pair: Pair | None) -> str:
        if pair is None:
            return f"mean of {counted(len(pairs), 'pair')}" if means_only else "mean"
        return pair[1] if len(sources) == 1 else f"{pair[0]} {ARROW} {pair[1]}"

    rows = [
        (name, [entry_of(own.get(pair), verdicts) for pair in shown])
        for name, own in by_arm.items()
    ]
    return MainTable([heading(pair) for pair in shown], rows)


def entry_of(line: Line | None, verdicts: bool) -> Entry:
    if line is None:
        return Entry("", "", "", "")
    c = line.comparison
    mark = c.verdict.word if c and verdicts and c.verdict in MARKED else ""
    return Entry(last_text(line), short_difference(c, line.pairs), mark, published_text(line))


def short_difference(comparison: Comparison | None, pairs: Sequence[Pair]) -> str:
    """'+4.7 ± 2.9', without an interval '+4.7', and in brackets what is not in it."""
    if comparison is None or comparison.estimate is None:
        return ""
    e, gaps = comparison.estimate, [comparison.gaps] if comparison.gaps else []
    if set(comparison.pairs) != set(pairs):
        gaps.append(f"{len(comparison.pairs)} of {len(pairs)} pairs")
    text = signed(e.mean) if e.low is None else with_interval(e)
    return f"{text} ({', '.join(gaps)})" if gaps else text


# --- primary comparisons ----------------------------------------------------------------------


PRIMARY_HEADINGS = (
    "Comparison", "Target", "Difference", "Verdict", "Difference found from", "Equality shown from",
    "Seeds", "Spread",
)  # fmt: skip


def primary_rows(primary: Sequence[Comparison]) -> list[list[str]]:
    """A row of `PRIMARY_HEADINGS` for each primary comparison on each target."""
    rows, several = [], len({source for c in primary for source, _ in c.pairs}) > 1
    for c in primary:
        e = c.estimate
        value = "" if e is None else with_interval(e) if e.low is not None else signed(e.mean)
        smallest, provable = ("" if v is None else f"{v:.1f}" for v in (c.smallest, c.provable))
        own = e is None or e.df is None or e.df == e.n - 1
        spread = "" if e is None or e.df is None else "own" if own else "of all arms"
        rows.append(
            [
                c.name,
                f" {ARROW} ".join(c.pairs[0]) if several else c.target,
                value,
                c.verdict_words,
                smallest,
                provable,
                str(len(c.seeds)),
                spread,
            ]
        )
    return rows


# --- numbers ----------------------------------------------------------------------------------

FIGURES = {
    "accuracy": FIGURE,
    "selected": "selected_target_accuracy",
    "oracle": "oracle_target_accuracy",
    "invalid": "invalid_test_accuracy",
    "loss": "target_loss",
    "batch_loss": "target_batch_loss",
}


def numbers(line: Line, verdicts: bool) -> dict[str, object]:
    """The figures of a line: percent, percentage points and losses; None where there is none."""
    source, target = line.pair or ("mean", "mean")
    single = line.results if line.pair else []  # a mean has no k of n
    row: dict[str, object] = {
        "arm": line.arm.name,
        "source": source,
        "target": target,
        "runs": len(line.results),
        "planned": line.planned,
        "seeds": " ".join(str(result.training.seed) for result in single),
        "correct": " ".join(str(result.evaluation.correct) for result in single),
        "target_total": single[0].evaluation.total if single else None,
        "majority_rate": single[0].evaluation.majority_rate if single else None,
        "collapsed_runs": sum(r.collapsed_share is not None for r in line.results),
    }
    for name, key in FIGURES.items():
        values = line.values(key)
        row[name], row[f"{name}_spread"] = (
            (mean(values), spread(values)) if values else (None, None)
        )
    row["wilson_low"], row["wilson_high"] = line.wilson or (None, None)
    for name in ("accuracy", "status", "note"):
        row[f"published_{name}"] = getattr(line.published, name, None)
    row["published_doubts"] = "; ".join(line.published.doubts) if line.published else None
    c = line.comparison
    e = c.estimate if c else None
    return row | {
        "reference": c.reference.name if c else None,
        "difference": e.mean if e else None,
        "difference_low": e.low if e else None,
        "difference_high": e.high if e else None,
        "difference_pairs": " ".join(map("-".join, c.pairs)) if c else None,
        "difference_seeds": len(c.seeds) if c else None,
        "difference_missing": len(c.missing) if c else None,
        "difference_left_out": len(c.left_out) if c else None,
        "p_holm": c.adjusted if c else None,
        "p_equal": c.adjusted_equal if c else None,
        "smallest": c.smallest if c else None,
        "provable": c.provable if c else None,
        "verdict": c.verdict if c and verdicts else None,
        "confounds": "; ".join(c.confounds) if c else None,
    } | control_numbers(line.controls, verdicts)  # fmt: skip


def control_numbers(controls: Sequence[Comparison], verdicts: bool) -> Mapping[str, str]:
    """The differences to the arm's controls: several stand one after the other in each field."""

    def each(value: Callable[[Comparison], object]) -> str:
        values = ["" if (v := value(c)) is None else str(v) for c in controls]
        return "; ".join(values) if any(values) else ""

    return {
        "control": each(lambda c: c.reference.name),
        "control_difference": each(lambda c: c.estimate and c.estimate.mean),
        "control_low": each(lambda c: c.estimate and c.estimate.low),
        "control_high": each(lambda c: c.estimate and c.estimate.high),
        "control_pairs": each(lambda c: " ".join(map("-".join, c.pairs))),
        "control_p_holm": each(lambda c: c.adjusted),
        "control_p_equal": each(lambda c: c.adjusted_equal),
        "control_verdict": each(lambda c: c.verdict if verdicts else None),
        "control_confounds": each(lambda c: ", ".join(c.confounds)),
    }
