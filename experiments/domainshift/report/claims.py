"""What becomes of published claims: each has a rule, written before its runs, that decides it.

A rule compares weighted sums of arms on each target. What its relation says of the true difference, and
which p decides it (margin: the claim's, else the suite's):

    relation   says                holds by                        contradicted by
    > <        above, below zero   the t test of zero              the same, the other way
    =          within the margin   two one-sided tests (TOST)      the t test of being within the margin
    !=         not zero            the t test of zero              two one-sided tests (TOST)

A small difference may be both, not zero and within the margin; then both relations hold. A rule that
holds is never contradicted.

A claim holds if all its rules hold on all targets, each with p below `ALPHA`: because all must, no
correction is needed (an intersection-union test). It is contradicted if one of them is, with p below
`ALPHA` after Holm's correction over the claim's rules and targets. Of the sums between `or` one must hold:
its p is multiplied by their number, and all must be decided the other way to contradict.

Where a rule is a primary comparison of the suite, it has the p of that family, so that claim and verdict
agree. Fewer than `LEAST_SEEDS` seeds decide nothing, nor does a claim one of whose targets lacks runs.
Claims are tested one by one: of twenty that say nothing true, about one would be decided by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    home_of,
    p_text,
    pool_of,
    share_text,
    signed,
    with_interval,
)
from domainshift.report.statistics import Estimate, beyond, equivalence, estimate, mean, spread
from domainshift.report.study import Arm, Key, Pair, Study

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

    where: the pair, as the page calls it; "" for a step
    p: of a true value of zero
    p_equal: of a true value of the margin or more; None without a margin
    p_beyond: of a true value of no more than the margin; None without a margin
    corrected: whether these are the primary family's, which has been corrected already
    """

    text: str
    relation: str
    where: str
    estimate: Estimate
    p: float | None
    margin: float | None = None
    p_equal: float | None = None
    p_beyond: float | None = None
    corrected: bool = False

    @property
    def p_holds(self) -> float | None:
        if self.relation == "=":
            return self.p_equal
        return self.p if self.relation == "!=" or self.is_right_way else 1.0

    @property
    def p_contradicted(self) -> float | None:
        if self.relation == "=":
            return self.p_beyond
        if self.relation == "!=":
            return self.p_equal
        return 1.0 if self.is_right_way else self.p

    @property
    def is_right_way(self) -> bool:
        return self.estimate.mean != 0 and (self.estimate.mean > 0) == (self.relation == ">")

    def sentence(self, outcome: Outcome) -> str:
        """The estimate with the p that decided it."""
        e = self.estimate
        where = f", {self.where}" if self.where else ""
        value = with_interval(e) if e.low is not None else signed(e.mean)
        p, of = {
            ("=", False): (self.p_equal, "within"),
            ("=", True): (self.p_beyond, "beyond"),
            ("!=", True): (self.p_equal, "within"),
        }.get((self.relation, outcome == Outcome.CONTRADICTED), (self.p, ""))
        text = f"{self.text}{where}: {value}"
        if p is not None:
            text += f"; {of} {self.margin:g} points, p {p_text(p)}" if of else f", p {p_text(p)}"
        return text + f"; {counted(e.n, 'seed')} cannot decide" * (e.n < LEAST_SEEDS)


class Question(NamedTuple):
    """What a claim asks of one pair: one of these rules must hold there."""

    rules: list[RuleEstimate]

    @property
    def p_holds(self) -> float | None:
        ps = [p for rule in self.rules if (p := rule.p_holds) is not None]
        return min(1.0, len(self.rules) * min(ps)) if ps else None

    @property
    def p_contradicted(self) -> float | None:
        ps = [rule.p_contradicted for rule in self.rules]
        return None if None in ps else max(ps)

    @property
    def corrected(self) -> bool:
        return all(rule.corrected for rule in self.rules)


class Finding(NamedTuple):
    question: Question
    outcome: Outcome

    @property
    def sentence(self) -> str:
        first, *others = (rule.sentence(self.outcome) for rule in self.question.rules)
        return f"either {', or '.join([first, *others])}" if others else first


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
        return collapse(study, arms, claim)
    if confounds := confounds_of(study, arms):
        return Outcome.UNDECIDABLE, [f"confounded by {', '.join(confounds)}"]
    if claim.figure == "unsteadiness" and not any(
        unsteadiness(result) is not None for arm in arms for result in arm.results.values()
    ):
        why = f"it needs a test after each of the last {LAST_EPOCHS} epochs (evaluate each)"
        return Outcome.UNDECIDABLE, [why]
    relations = {rule.relation for rules in rules_of(claim) for rule in rules}
    if "=" in relations and margin_of(study, claim) is None:
        return Outcome.UNDECIDABLE, ["no margin is stated, within which arms pass for equal"]
    asked = trend(study, claim) if claim.trend else questions(study, compared, claim)
    findings = decided(asked.questions)
    sentences = [finding.sentence for finding in findings]
    if asked.lacking:
        return Outcome.NOT_RUN, asked.lacking + sentences
    if not findings:
        return Outcome.UNDECIDABLE, ["a trend needs two targets or more"]
    return combined(findings), sentences


def decided(asked: Sequence[Question]) -> list[Finding]:
    """What becomes of each question of a claim."""
    later = adjusted_holm([None if q.corrected else q.p_contradicted for q in asked])
    return [
        Finding(q, outcome(q, q.p_contradicted if q.corrected else p))
        for q, p in zip(asked, later, strict=True)
    ]


def margin_of(study: Study, claim: ClaimIndex) -> float | None:
    return claim.margin if claim.margin is not None else study.margin


def confounds_of(study: Study, arms: Sequence[Arm]) -> list[str]:
    """What sets the arms of a claim apart besides their methods."""
    first, *others = arms
    remarks = (r for arm in others for r in comparable(first.one, arm.one, study))
    return list(dict.fromkeys(r.what for r in remarks if r.rule in CONFOUNDING))


def outcome(question: Question, p_contradicted: float | None) -> Outcome:
    """What becomes of a question.

    Args:
        p_contradicted: the question's, after the correction over the claim.
    """
    if min(rule.estimate.n for rule in question.rules) < LEAST_SEEDS:
        return Outcome.UNDECIDED
    ps = {Outcome.HOLDS: question.p_holds, Outcome.CONTRADICTED: p_contradicted}
    return next((o for o, p in ps.items() if p is not None and p < ALPHA), Outcome.UNDECIDED)


def combined(findings: Iterable[Finding]) -> Outcome:
    outcomes = {finding.outcome for finding in findings}
    for one in (Outcome.CONTRADICTED, Outcome.UNDECIDED):
        if one in outcomes:
            return one
    return Outcome.HOLDS


class Asked(NamedTuple):
    """What a claim asks, and in words the results that it lacks."""

    questions: list[Question]
    lacking: list[str]


def pairs_of(arms: Sequence[Arm], claim: ClaimIndex) -> tuple[list[Pair], list[str]]:
    """The pairs that a claim is about, planned for all `arms`, and in words the targets without one."""
    names = " and ".join(arm.name for arm in arms)
    pairs = [pair for pair in arms[0].pairs if all(pair in arm.pairs for arm in arms)]
    if claim.targets is None:
        return pairs, [] if pairs else [f"no target is planned for all of {names}"]
    tested = {target for _, target in pairs}
    lacking = [f"{t}: not planned for all of {names}" for t in claim.targets if t not in tested]
    return [pair for pair in pairs if pair[1] in claim.targets], lacking


def lack_of(study: Study, arms: Sequence[Arm], pairs: Sequence[Pair], figure: str) -> str:
    """Why no seed has the results of all `arms` on all `pairs`."""
    parts = []
    for pair in pairs:
        without = [arm.name for arm in arms if not arm.of(pair)]
        if without:
            parts.append(f"{study.called(pair)}: no result of {' and '.join(without)}")
    if parts:
        return "; ".join(parts)
    where = " and ".join(map(study.called, pairs))
    what = "" if figure == "accuracy" else f" tested after each of the last {LAST_EPOCHS} epochs"
    return f"{where}: no seed has results of {' and '.join(arm.name for arm in arms)}{what}"


# --- rules about sums of arms -----------------------------------------------------------------


def questions(study: Study, compared: Comparisons, claim: ClaimIndex) -> Asked:
    """The rules of a claim, on every target."""
    asked, lacking = [], []
    for rules in rules_of(claim):
        arms = [study.arms[name] for name in dict.fromkeys(n for r in rules for n in r.weights)]
        pairs, unplanned = pairs_of(arms, claim)
        lacking += unplanned
        for pair in pairs:
            estimates = [estimate_of(study, compared, claim, rule, pair) for rule in rules]
            if None in estimates:
                lacking.append(lack_of(study, arms, [pair], claim.figure))
            else:
                asked.append(Question(estimates))
    return Asked(asked, list(dict.fromkeys(lacking)))


def estimate_of(
    study: Study, compared: Comparisons, claim: ClaimIndex, rule: Rule, pair: Pair
) -> RuleEstimate | None:
    """A rule on one pair; None where no seed has all its results."""
    margin, where = margin_of(study, claim), study.called(pair)
    primary = primary_of(compared, rule, pair) if claim.figure == "accuracy" else None
    if primary is not None:
        return primary_estimate(rule, where, primary, margin, len(compared.primary))
    e = weighted(study, rule, pair, claim.figure)
    if e is None:
        return None
    same, more = (equivalence(e, margin), beyond(e, margin)) if margin else (None, None)
    return RuleEstimate(rule.text, rule.relation, where, e, e.p, margin, same, more)


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


def primary_estimate(
    rule: Rule, where: str, c: Comparison, margin: float | None, family: int
) -> RuleEstimate:
    """A rule with the p values of a primary comparison.

    Those that the comparison lacks, of another margin or beyond it, are multiplied by the size of the
    family, which is never less than Holm's correction.
    """
    e = c.estimate
    if rule.weights[c.arm.name] < 0:
        low, high = (None, None) if e.low is None else (-e.high, -e.low)
        e = e._replace(mean=-e.mean, low=low, high=high)

    def corrected(p: float | None) -> float | None:
        return None if p is None else min(1.0, family * p)

    same = more = None
    if margin:
        same = c.adjusted_equal if margin == c.margin else corrected(equivalence(e, margin))
        more = corrected(beyond(e, margin))
    return RuleEstimate(rule.text, rule.relation, where, e, c.adjusted, margin, same, more, True)


def weighted(study: Study, rule: Rule, pair: Pair, figure: str) -> Estimate | None:
    """A weighted sum of arms over the seeds that all of them have on a pair; None without any."""
    arms = [study.arms[name] for name in rule.weights]
    keys = common(arms, [pair], figure)
    if not keys:
        return None
    seeds, weights = [seed for *_, seed in keys], [w / rule.divisor for w in rule.weights.values()]
    rows = [[value_of(arm.results[key], figure) for key in keys] for arm in arms]
    sums = [
        math.fsum(w * v for w, v in zip(weights, column, strict=True))
        for column in zip(*rows, strict=True)
    ]
    pool = None
    if figure == "accuracy":
        pool = pool_of(home_of(study, rule.weights, pair, seeds), arms, seeds, [pair])
    return estimate(sums, pool=pool, scale=math.sqrt(math.fsum(w * w for w in weights)))


def common(arms: Sequence[Arm], pairs: Sequence[Pair], figure: str = "accuracy") -> list[Key]:
    """The keys of all pairs, of the seeds for which all arms have the figure on all pairs."""

    def whole(seed: int) -> bool:
        results = (arm.results.get((*pair, seed)) for arm in arms for pair in pairs)
        return all(r is not None and value_of(r, figure) is not None for r in results)

    seeds = [seed for seed in arms[0].seeds(pairs[0]) if whole(seed)]
    return [(*pair, seed) for pair in pairs for seed in seeds]


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


# --- other rules ------------------------------------------------------------------------------


def trend(study: Study, claim: ClaimIndex) -> Asked:
    """A trend, step by step: from each target to the next one that is harder for the reference.

    The difference to the reference must rise at each. A slope over the targets would hold where one of
    them alone gains. Targets are ordered by the reference's mean accuracy. All are needed, over the seeds
    that have all of them.
    """
    arm, reference = arms = [study.arms[name] for name in claim.trend]
    pairs, lacking = pairs_of(arms, claim)
    if lacking:
        return Asked([], lacking)
    seeds = list(dict.fromkeys(seed for *_, seed in common(arms, pairs)))
    if not seeds:
        return Asked([], [lack_of(study, arms, pairs, "accuracy")])

    def figure(a: Arm, pair: Pair, seed: int) -> float:
        return a.results[(*pair, seed)].summary[FIGURE]

    by_ease = sorted(pairs, key=lambda pair: -mean([figure(reference, pair, s) for s in seeds]))
    asked = []
    for easier, harder in zip(by_ease, by_ease[1:], strict=False):
        rises = [
            figure(arm, harder, s) - figure(reference, harder, s)
            - figure(arm, easier, s) + figure(reference, easier, s)
            for s in seeds
        ]  # fmt: skip
        e = estimate(rises)
        step = f"{study.called(harder)} above {study.called(easier)}"
        text = f"{arm.name} minus {reference.name}, {step}"
        asked.append(Question([RuleEstimate(text, ">", "", e, e.p)]))
    return Asked(asked, [])


def collapse(study: Study, arms: Sequence[Arm], claim: ClaimIndex) -> tuple[Outcome, list[str]]:
    """Whether every planned run of these arms is destroyed, or none is."""
    lines, lacking, destroyed, total, whole = [], [], 0, 0, True
    for arm in arms:
        pairs, unplanned = pairs_of([arm], claim)
        empty = [pair for pair in pairs if not arm.of(pair)]
        lacking += [f"{arm.name}, {line}" for line in unplanned]
        lacking += [lack_of(study, [arm], empty, "accuracy")] if empty else []
        wanted = [k for k in arm.planned if claim.targets is None or k[1] in claim.targets]
        results = [arm.results[key] for key in wanted if key in arm.results]
        own = sum(is_destroyed(result) for result in results)
        destroyed, total = destroyed + own, total + len(results)
        whole &= len(results) == len(wanted) and len({key[2] for key in wanted}) >= LEAST_SEEDS
        lines.append(
            f"{arm.name}: {own} of {counted(len(results), 'run')} call more than "
            f"{share_text(NEARLY_ALL)} of the images one class, or are no better than the largest class"
        )
    if lacking:
        return Outcome.NOT_RUN, lacking + lines
    if not whole:
        lines.append(f"undecided until all planned runs of {LEAST_SEEDS} seeds or more are there")
    if not whole or 0 < destroyed < total:
        return Outcome.UNDECIDED, lines
    return (Outcome.HOLDS if destroyed else Outcome.CONTRADICTED), lines


def is_destroyed(result: Result) -> bool:
    test = result.evaluation
    return result.collapsed_share is not None or test.accuracy <= test.majority_rate
