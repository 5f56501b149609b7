"""What becomes of published claims: each has a rule, written before its runs, that decides it.

A rule compares weighted sums of arms on each target. A claim holds if all its rules hold on all targets,
each with p below `ALPHA`: because all must, no correction is needed (an intersection-union test). It is
contradicted if one of them is decided the other way with p below `ALPHA` after Holm's correction over
the claim's rules and targets. Where a rule is a primary comparison of the suite, it has the p of that
family, so that claim and verdict agree. Fewer than `LEAST_SEEDS` seeds decide nothing. Claims are tested
one by one: of twenty that say nothing true, about one would be decided by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from domainshift.records.claims import Rule, arms_of_claim, rules_of
from domainshift.records.results import NEARLY_ALL, Result, percent
from domainshift.records.schema import ClaimIndex
from domainshift.report.audit import CONFOUNDING, comparable
from domainshift.report.comparisons import (
    ALPHA,
    FIGURE,
    Comparison,
    Comparisons,
    adjusted_holm,
    counted,
    full_block,
    home_of,
    p_text,
    pool_of,
    signed,
    with_interval,
)
from domainshift.report.statistics import Estimate, equivalence, estimate, mean, spread
from domainshift.report.study import Arm, Pair, Study

LAST_EPOCHS = 10  # whose spread is the unsteadiness of a run
LEAST_SEEDS = 3


class Outcome(StrEnum):
    HOLDS = "holds"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    UNDECIDABLE = "cannot be decided"
    NOT_RUN = "not run yet"


class RuleEstimate(NamedTuple):
    """One rule of a claim on one source-target pair, or one step of a trend.

    relation: how the estimate must lie to zero: ">", "<", "=" within the margin, "!=" beyond it
    p: of a true value of zero
    p_equal: of a true value of the margin or more; None without a margin
    corrected: whether both are the primary family's, which Holm has corrected already
    """

    text: str
    relation: str
    pair: Pair | None
    estimate: Estimate
    p: float | None
    p_equal: float | None = None
    corrected: bool = False


class Finding(NamedTuple):
    estimate: RuleEstimate
    outcome: Outcome

    @property
    def sentence(self) -> str:
        t, e = self.estimate, self.estimate.estimate
        where = f", {t.pair[1]}" if t.pair else ""
        value = with_interval(e) if e.low is not None else signed(e.mean)
        p = t.p_equal if t.relation == "=" else t.p
        text = f"{t.text}{where}: {value}" + ("" if p is None else f", p {p_text(p)}")
        return text + f"; {counted(e.n, 'seed')} cannot decide" * (e.n < LEAST_SEEDS)


class Claim(NamedTuple):
    """A published claim with what became of it."""

    number: str
    says: str
    outcome: Outcome
    why: list[str]  # in sentences: what decided it, or why nothing did
    note: str | None


def claims_of(study: Study, compared: Comparisons) -> list[Claim]:
    """Every claim that a suite states, in its order."""
    return [
        Claim(number, claim.says, *decision(study, compared, claim), claim.note)
        for number, claim in study.claims.items()
    ]


def decision(study: Study, compared: Comparisons, claim: ClaimIndex) -> tuple[Outcome, list[str]]:
    """The outcome of a claim, and what decided it or why nothing did."""
    if claim.undecidable:
        return Outcome.UNDECIDABLE, [claim.undecidable]
    names = arms_of_claim(claim)
    lacking = [name for name in names if name not in study.arms or not study.arms[name].results]
    if lacking:
        return Outcome.NOT_RUN, [f"no result of {', '.join(lacking)}"]
    arms = [study.arms[name] for name in names]
    if claim.collapse:
        return collapse(arms, claim)
    if confounds := confounds_of(study, arms):
        return Outcome.UNDECIDABLE, [f"confounded by {', '.join(confounds)}"]
    if claim.figure == "unsteadiness" and not any(
        unsteadiness(result) is not None for arm in arms for result in arm.results.values()
    ):
        why = f"it needs a test after each of the last {LAST_EPOCHS} epochs (evaluate each)"
        return Outcome.UNDECIDABLE, [why]
    estimates = list(steps(*arms) if claim.trend else rule_estimates(study, compared, claim))
    if not estimates:
        return Outcome.NOT_RUN, ["no seed has all the runs that its rule is about"]
    margin = margin_of(study, claim)
    later = adjusted_holm([None if t.corrected else t.p for t in estimates])
    equal = adjusted_holm([None if t.corrected else t.p_equal for t in estimates])
    findings = [
        Finding(t, outcome(t, t.p if t.corrected else p, t.p_equal if t.corrected else q, margin))
        for t, p, q in zip(estimates, later, equal, strict=True)
    ]
    return combined(findings), [finding.sentence for finding in findings]


def margin_of(study: Study, claim: ClaimIndex) -> float | None:
    return claim.margin if claim.margin is not None else study.margin


def confounds_of(study: Study, arms: Sequence[Arm]) -> list[str]:
    """What sets the arms of a claim apart besides their methods."""
    first, *others = arms
    remarks = (r for arm in others for r in comparable(first.one, arm.one, study))
    return list(dict.fromkeys(r.what for r in remarks if r.rule in CONFOUNDING))


def outcome(
    rule: RuleEstimate, later: float | None, equal_later: float | None, margin: float | None
) -> Outcome:
    """Whether a rule holds, by its own p values; contradicted by those after Holm's correction."""
    mean, relation = rule.estimate.mean, rule.relation

    def small(p: float | None) -> bool:
        return p is not None and p < ALPHA

    if rule.estimate.n < LEAST_SEEDS:
        return Outcome.UNDECIDED
    if relation == "=":
        holds = small(rule.p_equal)
        contradicted = small(later) and margin is not None and abs(mean) > margin
    elif relation == "!=":
        holds, contradicted = small(rule.p), small(equal_later)
    else:
        right = (mean > 0) == (relation == ">")
        holds, contradicted = right and small(rule.p), not right and small(later)
    if contradicted:
        return Outcome.CONTRADICTED
    return Outcome.HOLDS if holds else Outcome.UNDECIDED


def combined(findings: Iterable[Finding]) -> Outcome:
    outcomes = {finding.outcome for finding in findings}
    for one in (Outcome.CONTRADICTED, Outcome.UNDECIDED):
        if one in outcomes:
            return one
    return Outcome.HOLDS


# --- rules about sums of arms -----------------------------------------------------------------


def rule_estimates(
    study: Study, compared: Comparisons, claim: ClaimIndex
) -> Iterator[RuleEstimate]:
    """The rules of a claim, on every target that all their arms have."""
    margin = margin_of(study, claim)
    for rule in rules_of(claim):
        for pair in study.arms[next(iter(rule.weights))].pairs:
            if claim.targets is not None and pair[1] not in claim.targets:
                continue
            primary = primary_of(compared, rule, pair) if claim.figure == "accuracy" else None
            if primary is not None and claim.margin is None:
                yield primary_estimate(rule, primary)
            elif e := weighted(study, rule, pair, claim.figure):
                same = equivalence(e, margin) if margin else None
                yield RuleEstimate(rule.text, rule.relation, pair, e, e.p, same)


def primary_of(compared: Comparisons, rule: Rule, pair: Pair) -> Comparison | None:
    """The primary comparison that a rule of two arms is, either way round, if it has an estimate."""
    if sorted(rule.weights.values()) != [-1, 1]:
        return None
    names = set(rule.weights)
    return next(
        (
            c
            for c in compared.primary
            if {c.arm.name, c.reference.name} == names and list(c.pairs) == [pair] and c.estimate
        ),
        None,
    )


def primary_estimate(rule: Rule, c: Comparison) -> RuleEstimate:
    e = c.estimate
    if rule.weights[c.arm.name] < 0:
        low, high = (None, None) if e.low is None else (-e.high, -e.low)
        e = e._replace(mean=-e.mean, low=low, high=high)
    return RuleEstimate(rule.text, rule.relation, c.pairs[0], e, c.adjusted, c.adjusted_equal, True)


def weighted(study: Study, rule: Rule, pair: Pair, figure: str) -> Estimate | None:
    """A weighted sum of arms over the seeds that all of them have on a pair; None without any."""
    arms = [study.arms[name] for name in rule.weights]
    block = full_block(
        k for k in arms[0].results if k[:2] == pair and all(k in a.results for a in arms)
    )
    keys = [(*pair, seed) for seed in block.seeds]
    rows = [[value_of(arm.results[key], figure) for key in keys] for arm in arms]
    if not keys or any(value is None for row in rows for value in row):
        return None
    weights = [weight / rule.divisor for weight in rule.weights.values()]
    sums = [
        math.fsum(w * v for w, v in zip(weights, column, strict=True))
        for column in zip(*rows, strict=True)
    ]
    pool = None
    if figure == "accuracy":
        pool = pool_of(home_of(study, rule.weights, pair, block.seeds), block.seeds, [pair])
    return estimate(sums, pool=pool, scale=math.sqrt(math.fsum(w * w for w in weights)))


def value_of(result: Result, figure: str) -> float | None:
    return result.summary[FIGURE] if figure == "accuracy" else unsteadiness(result)


def unsteadiness(result: Result) -> float | None:
    """Standard deviation of a run's accuracies after its last ten epochs, in points.

    None where not each of them was rule.
    """
    name, last = result.evaluation.name, result.rows[-LAST_EPOCHS:]
    tests = [row.tests.get(name) for row in last]
    if len(tests) < LAST_EPOCHS or None in tests:
        return None
    return spread([percent(test.correct, test.total) for test in tests])


# --- other rules ------------------------------------------------------------------------------


def steps(arm: Arm, reference: Arm) -> Iterator[RuleEstimate]:
    """A trend, step by step: from each target to the next one that is harder for the reference.

    The difference to the reference must rise at each. A slope over the targets would hold where one of
    them alone gains. Targets are ordered by the reference's mean accuracy.
    """
    block = full_block(key for key in arm.results if key in reference.results)

    def figure(a: Arm, pair: Pair, seed: int) -> float:
        return a.results[(*pair, seed)].summary[FIGURE]

    by_ease = sorted(
        block.pairs, key=lambda pair: -mean([figure(reference, pair, s) for s in block.seeds])
    )
    for easier, harder in zip(by_ease, by_ease[1:], strict=False):
        rises = [
            figure(arm, harder, s) - figure(reference, harder, s)
            - figure(arm, easier, s) + figure(reference, easier, s)
            for s in block.seeds
        ]  # fmt: skip
        e = estimate(rises)
        text = f"{arm.name} minus {reference.name}, {harder[1]} above {easier[1]}"
        yield RuleEstimate(text, ">", None, e, e.p)


def collapse(arms: Sequence[Arm], claim: ClaimIndex) -> tuple[Outcome, list[str]]:
    """Whether every planned run of these arms is destroyed, or none is."""
    lines, destroyed, total, whole = [], 0, 0, True
    for arm in arms:
        wanted = [k for k in arm.planned if claim.targets is None or k[1] in claim.targets]
        results = [arm.results[key] for key in wanted if key in arm.results]
        own = sum(is_destroyed(result) for result in results)
        destroyed, total = destroyed + own, total + len(results)
        whole &= len(results) == len(wanted) and len({key[2] for key in wanted}) >= LEAST_SEEDS
        lines.append(
            f"{arm.name}: {own} of {counted(len(results), 'run')} call more than "
            f"{100 * NEARLY_ALL:.0f} % of the images one class, or are no better than the largest class"
        )
    if not total:
        return Outcome.NOT_RUN, ["no run on these targets"]
    if not whole:
        lines.append(f"undecided until all planned runs of {LEAST_SEEDS} seeds or more are there")
    if not whole or 0 < destroyed < total:
        return Outcome.UNDECIDED, lines
    return (Outcome.HOLDS if destroyed else Outcome.CONTRADICTED), lines


def is_destroyed(result: Result) -> bool:
    test = result.evaluation
    return result.collapsed_share is not None or test.accuracy <= test.majority_rate
