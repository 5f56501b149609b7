"""What the report of a suite says, before it is a page, Markdown, LaTeX or CSV.

A run, here and in the report, is one result: a training with one test of a target.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from domainshift.records.results import NEARLY_ALL, Result
from domainshift.report import figures, findings, published, switches
from domainshift.report.audit import Audit, audit
from domainshift.report.choices import IMAGES, Choices, choices_of
from domainshift.report.claims import LEAST_SEEDS, Claim, claims_of
from domainshift.report.comparisons import (
    ALPHA,
    EXACT,
    Comparisons,
    counted,
    matchups,
    share_text,
)
from domainshift.report.statistics import AGREE, LEVEL, POWER
from domainshift.report.study import Study, Table
from domainshift.report.tables import (
    LOSSES,
    PM,
    Grid,
    Line,
    MainTable,
    grid_of,
    lines_of,
    main_table,
)

MANY_PAIRS = 4  # with more, the main table shows means over pairs, and the details each pair
REPORTS_UNIT = (
    "In the reports' unit: the sum of the mean losses of batches over the number of images, which is about "
    "the mean cross-entropy divided by the batch size."
)
LOSSES_OF_A = (
    " The eight losses that report A shows are in the report alone: published.csv, which this page takes its "
    "published figures from, has no loss."
)
WITHHELD = "No finding is drawn while the audit fails."


class Section(NamedTuple):
    """A table of the report with what belongs to it."""

    table: Table
    lines: list[Line]
    notes: list[str]
    command: str  # that makes its runs
    pictures: list[figures.Picture]
    verdicts: bool

    @property
    def main(self) -> MainTable:
        """An arm a row, targets as columns."""
        return main_table(self.lines, self.verdicts, len(self.table.pairs) > MANY_PAIRS)

    @property
    def details(self) -> Grid:
        """Everything there is to say, an arm and a pair a row."""
        return grid_of(self.lines, self.verdicts)

    @property
    def losses(self) -> Grid:
        """Losses on the target after the last epoch, an arm and a pair a row."""
        return grid_of([line for line in self.lines if line.pair and line.results], False, LOSSES)

    @property
    def losses_note(self) -> str:
        """What a reader must know of the losses, and where the published ones are."""
        note = f"After {PM} stands the standard deviation over seeds. {REPORTS_UNIT}"
        return note + LOSSES_OF_A * any(x.startswith("report-A") for x in self.table.published)


class Report(NamedTuple):
    study: Study
    audit: Audit
    comparisons: Comparisons
    sections: list[Section]
    main: list[str]  # the sentences of the first screen
    claims: list[Claim]
    choices: Choices  # of arms, without target labels
    findings: dict[str, list[str]]  # all sentences, by heading
    limits: list[str]  # what keeps the figures from being more than they are

    @property
    def decided(self) -> str:
        """How many of the primary comparisons, one a target, have a verdict."""
        primary = self.comparisons.primary
        return f"{sum(c.verdict.decided for c in primary)} of {len(primary)}"


def build(study: Study) -> Report:
    matched = {table.name: matchups(table) for table in study.tables}
    checked = audit(study, matched)
    compared = Comparisons(study, matched, checked.confounds)
    rows = published.rows()
    sections = [
        section_of(
            study, table, lines_of(table, matched[table.name], compared, rows), checked.passes
        )
        for table in study.tables
    ]
    limits = [*checked.limits, *limits_of(list(study.results.values()))]
    if not checked.passes:
        return Report(study, checked, compared, sections, [WITHHELD], [], Choices([], []),
                      {"": [WITHHELD]}, limits)  # fmt: skip
    sentences = all_sentences(study, compared, sections)
    main = [findings.tally(compared.primary), *findings.primary_sentences(compared.primary)]
    collapsed = sentences["Collapse"]
    if len(collapsed) > 2:
        collapsed = [
            f"In {len(collapsed)} arms some runs call nearly every target image one class."
        ]
    return Report(study, checked, compared, sections, main + collapsed, claims_of(study, compared),
                  choices_of(study), sentences, limits)  # fmt: skip


def section_of(study: Study, table: Table, lines: list[Line], verdicts: bool) -> Section:
    beside = {(line.arm.name, line.pair): line.published for line in lines if line.published}
    command = f"{study.command} --only {shlex.quote(table.name)}"
    if study.command is None:
        command = "no suite.json: the finished runs of the folder, grouped by their switches"
    return Section(table, lines, notes_of(table, lines), command, figures.pictures(table, beside),
                   verdicts)  # fmt: skip


def notes_of(table: Table, lines: Sequence[Line]) -> list[str]:
    """What stands below a table: its note, and what a reader must know of published figures."""
    notes = [table.note] if table.note else []
    if results := [result for line in lines for result in line.results]:
        notes.append(f"Runs of {budget(results)}.")
    for line in lines:
        figure = line.published
        if figure and (figure.also or figure.doubts or figure.status != "valid"):
            remarks = "; ".join([figure.note, *figure.doubts])
            text = (
                f"Published {figure.accuracy:.2f} for {line.arm.name}, {line.pair[1]}: {remarks}."
            )
            if figure.also:
                text += f" The same source also has {', '.join(figure.also)}."
            notes.append(text)
    return list(dict.fromkeys(notes))


def all_sentences(
    study: Study, compared: Comparisons, sections: Sequence[Section]
) -> dict[str, list[str]]:
    """Every finding, by heading."""
    arms = list(study.arms.values())
    lines = [line for section in sections for line in section.lines if line.published]
    return {
        "Primary comparisons": [c.sentence for c in compared.primary],
        "Exploratory comparisons: intervals, no verdicts": [
            c.sentence for c in compared.exploratory
        ],
        "Beside the published figures": findings.beside_published(
            [(line.arm, line.pair, line.published) for line in lines]
        ),
        "Collapse": findings.collapsed(arms),
        "The choice of the epoch": findings.epoch_choice(study.used),
        "Testing on the training images": findings.mistake(arms),
    }


def limits_of(results: Sequence[Result]) -> list[str]:
    """How runs depart from their protocols, and what their records warn of, with how many do."""

    def with_share(counts: Counter[str]) -> list[str]:
        share = {text: f" (in {n} of {len(results)} runs)" for text, n in counts.items()}
        return [
            text.rstrip(".") + ("" if n == len(results) else share[text])
            for text, n in counts.items()
        ]

    departed = with_share(
        Counter(text for result in results for text in switches.departures(result))
    )
    limits = [f"Not the protocol: {'; '.join(departed)}."] if departed else []
    if results and not any(result.config["holdout"] for result in results):
        limits.append(
            "No epoch is selected on source images, and no column shows one: none are held out for it "
            "(holdout 0), as in the published protocols."
        )
    warned = with_share(Counter(w for result in results for w in result.training.warnings))
    return limits + [f"{warning}." for warning in warned]


def versions_of(results: Iterable[Result]) -> list[str]:
    """What computed the runs: a line for each set of versions."""
    counts = Counter(
        ", ".join(f"{name} {value}" for name, value in result.training.versions.items())
        for result in results
    )
    return [f"{counted(n, 'run')}: {text}" for text, n in counts.most_common()]


def progress(study: Study) -> str:
    done = len(study.planned) - len(study.missing)
    failed = sum(name.partition("/")[0] in study.failed for name in study.missing)
    others = len(study.missing) - failed
    text = f"{done} of {counted(len(study.planned), 'run')} done"
    text += f", {failed} failed" if failed else ""
    return text + (f", {others} missing" if others else "")


def what_was_run(study: Study) -> str:
    results = study.used
    if not results:
        return "No run is finished."
    models, data = (
        " and ".join(sorted(names))
        for names in ({r.config["model"] for r in results}, {r.training.data for r in results})
    )
    tables = [table for table in study.tables if any(arm.results for arm in table.arms)]
    arms = {arm.name for table in tables for arm in table.compared if arm.results}
    limits = {r.config["limit"] for r in results} - {None}
    images = f"at most {either(limits)} images a class" if limits else "all images"
    sources, targets = (", ".join(sorted({r.key[i] for r in results})) for i in (0, 1))
    return (
        f"{models} on {data}, trained on {sources} and tested on {targets}: "
        f"{counted(len(arms), 'arm')} in {counted(len(tables), 'table')}, "
        f"{counted(len({r.training.seed for r in results}), 'seed')}, "
        f"{counted(len({r.folder for r in results}), 'training')}. Runs of {budget(results)}, "
        f"{either(r.config['image_size'] for r in results)} pixels a side, {images}."
    )


def budget(results: Sequence[Result]) -> str:
    updates = either(result.training.updates for result in results)
    return f"{updates} updates with {either(r.config['batch_size'] for r in results)} images"


def either(values: Iterable[int]) -> str:
    """Different values, or the least and the largest of many."""
    different = sorted(set(values))
    if len(different) < 4:
        return " or ".join(map(str, different))
    return f"{different[0]} to {different[-1]}"


def set_aside(study: Study) -> list[str]:
    """Every record that no table uses, and every run that is not there, with the reason."""
    reasons = {p.name: f"{p.kind}: {'; '.join(p.lines)}" for p in study.problems}
    reasons |= {name: f"failed: {' / '.join(lines)}" for name, lines in study.failed.items()}
    for name in study.missing:
        if name.partition("/")[0] not in study.failed:
            reasons.setdefault(name, "missing")
    reasons |= study.strays
    return [f"{name}: {why}" for name, why in reasons.items()]


HOW_TO_READ = (
    "A run is one training with one test of a target; a training may serve several runs.",
    "Accuracy is in percent of the target's images, after the last epoch, as in the published reports. "
    f"After {PM} stands the sample standard deviation over seeds.",
    "Minus baseline: the difference in percentage points, paired by seed and by source-target pair, "
    f"and half its {share_text(LEVEL)} t interval over seeds. Only runs that both arms have enter; the others "
    "are counted as missing. A mean over pairs is taken within each seed first, over pairs that every "
    "seed in it has. Runs that would make seeds unlike are counted as left out: as few as possible, "
    f"which is searched for in full up to {EXACT} pairs, and step by step beyond. A difference over "
    "fewer pairs than its line says over which. One seed has no interval.",
    "Minus control: the same difference to the arm that it names. That arm does all that comes along "
    "with the method and not the method (BatchNorm measured again, target images in BatchNorm's "
    "statistics, binarization), or the suite names it beforehand.",
    "Verdicts: a suite declares at most six primary comparisons before its runs. On each target they "
    f"are one family. Higher or lower: Holm's p over the family is below {ALPHA}. Equal: two one-sided "
    f"tests, after Holm too, put the difference within the suite's margin. Otherwise these seeds cannot "
    f"say, and the page names the difference that they would find with a probability of {share_text(POWER)}. "
    "Confounded comparisons, which differ in more than the method, get none. All other comparisons "
    "explore: they have an interval and no verdict.",
    "Standard errors: where the arms of a table spread alike (Bartlett's test on residuals about the "
    f"arms and seeds, p at least {AGREE:g}), all of them give the standard deviation, by one test "
    "of each training. A difference that spreads more than it says (F test) has its own, and so has that of two "
    "tests of one training. Simulated with five seeds and no effect, a study then has a false verdict in 5 of "
    "100 cases, and in 7 to 10 where one arm spreads two or three times as much as the others.",
    f"Test set alone: Wilson's {share_text(LEVEL)} interval of the mean k of n. So far other test images alone "
    "could move the figure, however many seeds there are.",
    "Epoch selected on source: accuracy on the target at the epoch that is best on held-out source "
    "images. Oracle: at the epoch that is best on the target; it uses the labels and is no result. Both "
    "need tests after several epochs (--evaluate each).",
    "Largest class: what always answering the target's most frequent class scores. Flags: runs that "
    f"call one class more than {share_text(NEARLY_ALL)} of the images, with the largest such share, and "
    "switches beside those of the method in which an arm differs from its reference.",
    "Claims: each has a rule, stated in the suite before its runs. The t test of zero decides a rule with > "
    "or <. A rule with = is true within the margin: two one-sided tests show that it holds, and a t test of "
    "being within the margin contradicts it. A rule with != is true of every difference but zero: the t test "
    "of zero shows that it holds, and two one-sided tests contradict it. A small difference may be not zero "
    "and within the margin; then both hold. Of the sums between 'or' one must hold, and the p is multiplied "
    "by their number.",
    f"A claim holds if all its rules hold on all their targets, each with p below {ALPHA}. It is contradicted "
    "if one is decided the other way, after Holm's correction over the claim. A rule that is a primary "
    f"comparison has the p of that family. Fewer than {LEAST_SEEDS} seeds decide nothing, and a claim waits "
    "for runs on all its targets. Of twenty claims that say nothing true, about one would be decided by "
    "chance.",
    "Choosing without target labels: for each seed a validator scores all arms and chooses the one with "
    f"the highest score. It sees the predictions for {IMAGES} images of the target, evenly spaced in the "
    "data. Rank correlation is Spearman's, between scores and target accuracies over the arms; its mean "
    "over seeds is shown. The oracle chooses by target labels: its accuracy is an upper bound and not a "
    "result. Without saved features, DEV takes logits.",
)
