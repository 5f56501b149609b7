"""What becomes of published claims: each has a rule, written before its runs, that decides it.

A rule compares weighted sums of arms on each target. It holds where the sum lies as the rule says, and
the p value, after Holm's correction over the claim's own rules and targets, is below `ALPHA`. A claim
holds if all its rules hold on all targets, and is contradicted if one is decided the other way. Claims
are tested one by one: of twenty that say nothing true, one would be decided by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from domainshift.records.claims import Rule, arms_of_claim, rules_of
from domainshift.records.results import NEARLY_ALL, Result, largest_predicted_share, percent
from domainshift.records.schema import ClaimIndex
from domainshift.report.comparisons import (
    ALPHA,
    FIGURE,
    counted,
    full_block,
    p_text,
    pool_of,
    with_interval,
)
from domainshift.report.statistics import (
    Estimate,
    equivalence,
    estimate,
    holm,
    mean,
    spread,
)
from domainshift.report.study import Arm, Pair, Study, Table

LAST_EPOCHS = 10  # whose spread is the unsteadiness of a run


class Outcome(StrEnum):
    HOLDS = "holds"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    UNDECIDABLE = "cannot be decided"
    NOT_RUN = "not run yet"


class Finding(NamedTuple):
    """One rule of a claim on one source-target pair.

    text: the rule
    p: of its being so by chance, after Holm
    outcome: HOLDS, CONTRADICTED or UNDECIDED
    """

    text: str
    pair: Pair | None
    estimate: Estimate
    p: float | None
    outcome: Outcome

    @property
    def sentence(self) -> str:
        where = f", {self.pair[1]}" if self.pair else ""
        e = self.estimate
        value = with_interval(e) if e.low is not None else f"{e.mean:+.1f}"
        p = f", p {p_text(self.p)}" if self.p is not None else ""
        return f"{self.text}{where}: {value}{p}"


class Claim(NamedTuple):
    """A published claim with what became of it."""

    number: str
    says: str
    outcome: Outcome
    why: list[str]  # in sentences: what decided it, or why nothing did
    note: str | None


def claims_of(study: Study) -> list[Claim]:
    """Every claim that a suite states, in its order."""
    return [decided(study, number, claim) for number, claim in study.claims.items()]


def decided(study: Study, number: str, claim: ClaimIndex) -> Claim:
    """One claim, by its rule."""

    def ended(outcome: Outcome, why: Sequence[str]) -> Claim:
        return Claim(number, claim.says, outcome, list(why), claim.note)

    if claim.undecidable:
        return ended(Outcome.UNDECIDABLE, [claim.undecidable])
    arms = {name: study.arms.get(name) for name in arms_of_claim(claim)}
    lacking = [name for name, arm in arms.items() if arm is None or not arm.results]
    if lacking:
        return ended(Outcome.NOT_RUN, [f"no result of {', '.join(lacking)}"])
    if claim.collapse:
        return ended(*collapse(list(arms.values()), claim))
    if claim.trend:
        findings = [trend(arms[claim.trend[0]], arms[claim.trend[1]])]
        findings = [f for f in findings if f]
    else:
        margin = claim.margin if claim.margin is not None else study.margin
        findings = list(of_rules(study, claim, margin))
    if not findings:
        return ended(Outcome.NOT_RUN, ["no seed has all the runs that its rule is about"])
    return ended(together(findings), [f.sentence for f in findings])


def together(findings: Sequence[Finding]) -> Outcome:
    outcomes = {finding.outcome for finding in findings}
    for outcome in (Outcome.CONTRADICTED, Outcome.UNDECIDED):
        if outcome in outcomes:
            return outcome
    return Outcome.HOLDS


# --- rules about sums of arms -----------------------------------------------------------------


class Tested(NamedTuple):
    rule: Rule
    pair: Pair
    estimate: Estimate


def of_rules(study: Study, claim: ClaimIndex, margin: float | None) -> Iterator[Finding]:
    """The rules of a claim, on every target that all their arms have."""
    tested = []
    for rule in rules_of(claim):
        arms = [study.arms[name] for name in rule.weights]
        for pair in arms[0].pairs:
            wanted = claim.targets is None or pair[1] in claim.targets
            if wanted and (value := weighted(study, rule, pair, claim.figure)):
                tested.append(Tested(rule, pair, value))
    differs = adjusted([t.estimate.p for t in tested])
    equal = adjusted(
        [
            equivalence(t.estimate, margin) if t.rule.relation == "=" and margin else None
            for t in tested
        ]
    )
    for t, p, p_equal in zip(tested, differs, equal, strict=True):
        yield Finding(
            t.rule.text, t.pair, t.estimate, p_equal if t.rule.relation == "=" else p,
            outcome(t, p, p_equal, margin),
        )  # fmt: skip


def outcome(
    tested: Tested, p: float | None, p_equal: float | None, margin: float | None
) -> Outcome:
    e, relation = tested.estimate, tested.rule.relation
    apart = p is not None and p < ALPHA
    if relation == "=":
        if p_equal is not None and p_equal < ALPHA:
            return Outcome.HOLDS
        beyond = margin is not None and abs(e.mean) > margin
        return Outcome.CONTRADICTED if apart and beyond else Outcome.UNDECIDED
    if not apart:
        return Outcome.UNDECIDED
    return Outcome.HOLDS if (e.mean > 0) == (relation == ">") else Outcome.CONTRADICTED


def weighted(study: Study, rule: Rule, pair: Pair, figure: str) -> Estimate | None:
    """A weighted sum of arms over the seeds that all of them have on a pair; None without any."""
    arms = [study.arms[name] for name in rule.weights]
    keys = [k for k in arms[0].results if k[:2] == pair and all(k in a.results for a in arms)]
    block = full_block(keys)
    if not block.seeds:
        return None
    keys = [(*pair, seed) for seed in block.seeds]
    rows = [[value_of(arm.results[key], figure) for key in keys] for arm in arms]
    if any(value is None for row in rows for value in row):
        return None
    weights = list(rule.weights.values())
    sums = [math.fsum(w * v for w, v in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]  # fmt: skip
    pool = pool_of(home_of(study, rule), block.seeds, [pair]) if figure == "accuracy" else None
    return estimate(sums, pool=pool, scale=math.sqrt(math.fsum(w * w for w in weights)))


def home_of(study: Study, rule: Rule) -> Table | None:
    """The first table with all arms of a rule."""
    names = set(rule.weights)
    return next((t for t in study.tables if names <= {a.name for a in t.compared}), None)


def value_of(result: Result, figure: str) -> float | None:
    return result.summary[FIGURE] if figure == "accuracy" else unsteadiness(result)


def unsteadiness(result: Result) -> float | None:
    """Standard deviation of a run's accuracies after its last ten epochs, in points.

    None where not each of them was tested.
    """
    name, last = result.evaluation.name, result.rows[-LAST_EPOCHS:]
    tests = [row.tests.get(name) for row in last]
    if len(tests) < LAST_EPOCHS or None in tests:
        return None
    return spread([percent(test.correct, test.total) for test in tests])


def adjusted(values: Sequence[float | None]) -> list[float | None]:
    """Holm's p values of those that there are."""
    places = [i for i, p in enumerate(values) if p is not None]
    result: list[float | None] = [None] * len(values)
    for i, p in zip(places, holm([values[i] for i in places]), strict=True):
        result[i] = p
    return result


# --- other rules ------------------------------------------------------------------------------


def trend(arm: Arm, reference: Arm) -> Finding | None:
    """Whether the difference to a reference grows with the reference's error, over the targets.

    The slope of each seed's differences over the error that the reference has on each target, which is
    its mean over the seeds; the estimate is over the seeds. None with fewer than two targets.
    """
    block = full_block(k for k in arm.results if k in reference.results)
    if len(block.pairs) < 2:
        return None

    def figure(a: Arm, pair: Pair, seed: int) -> float:
        return a.results[(*pair, seed)].summary[FIGURE]

    errors = np.array(
        [100 - mean([figure(reference, pair, s) for s in block.seeds]) for pair in block.pairs]
    )
    about = errors - errors.mean()
    slopes = [
        float(about @ [figure(arm, p, s) - figure(reference, p, s) for p in block.pairs] / (about @ about))
        for s in block.seeds
    ]  # fmt: skip
    e = estimate(slopes)
    outcome = Outcome.UNDECIDED
    if e.p is not None and e.p < ALPHA:
        outcome = Outcome.HOLDS if e.mean > 0 else Outcome.CONTRADICTED
    text = f"points of {arm.name} minus {reference.name} for each point of error"
    return Finding(text, None, e, e.p, outcome)


def collapse(arms: Sequence[Arm], claim: ClaimIndex) -> tuple[Outcome, list[str]]:
    """Whether every run of these arms calls nearly all images one class, or none does."""
    lines, collapsed, total = [], 0, 0
    for arm in arms:
        results = [
            r for key, r in arm.results.items() if claim.targets is None or key[1] in claim.targets
        ]
        shares = [largest_predicted_share(r.evaluation.confusion)[0] for r in results]
        own = sum(share > NEARLY_ALL for share in shares)
        collapsed, total = collapsed + own, total + len(results)
        if results:
            lines.append(
                f"{arm.name}: {own} of {counted(len(results), 'run')} call more than "
                f"{100 * NEARLY_ALL:.0f} % of the images one class"
            )
    if not total:
        return Outcome.NOT_RUN, ["no run on these targets"]
    if collapsed == total:
        return Outcome.HOLDS, lines
    return Outcome.UNDECIDED if collapsed else Outcome.CONTRADICTED, lines
