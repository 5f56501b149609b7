"""Which arms are compared, over which results, and what comes out.

A comparison is a paired difference: seed by seed and source-target pair by pair, over the largest full
block of both that the two arms have in common. It is averaged over the pairs of each seed. The interval
is Student's over the seeds: they are what is drawn at random, the pairs are chosen.

The verdict looks at Holm's adjusted p value, with all comparisons of the suite as one family, each
counted once however many tables show it. Confounded comparisons belong to the family, but to no count
of verdicts: they do not say what made the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from domainshift.records.results import Result
from domainshift.report import switches
from domainshift.report.statistics import Estimate, estimate, holm, mean
from domainshift.report.study import Arm, Key, Pair, Study, Table

ALPHA = 0.05  # of the family of all comparisons
FIGURE = "target_accuracy"  # after the last epoch
EXACT = 12  # pairs of domains, up to which the largest full block is searched for in full


class Verdict(StrEnum):
    HIGHER = "higher"
    LOWER = "lower"
    NOT_AFTER_HOLM = "zero is outside the interval, but not after Holm's correction"
    SAME = "not distinguishable from zero"
    ONE_SEED = "one seed: no interval"
    NO_SPREAD = "no spread between seeds: no interval"
    NOTHING = "nothing in common yet"

    @property
    def apart(self) -> bool:
        """Whether the difference is not zero."""
        return self in (Verdict.HIGHER, Verdict.LOWER)


# --- which arms -------------------------------------------------------------------------------


class Matchups(NamedTuple):
    """The comparisons of a table, (arm, reference) each, no two arms twice.

    controls: an arm with those that do what comes along with its method, and what the suite says to
        compare.
    all: the controls first; then every arm with the baseline, and every two arms that differ in one
        on/off or choice switch alone, the later with the earlier.
    """

    controls: list[tuple[Arm, Arm]]
    all: list[tuple[Arm, Arm]]


def matchups(table: Table) -> Matchups:
    arms = [arm for arm in table.compared if arm.one]
    values = [switches.method_values(arm.one) for arm in arms]
    configs = [arm.one.config | own for arm, own in zip(arms, values, strict=True)]
    methods = [switches.method_of(arm.one) for arm in arms]
    controls = [
        (arms[i], arms[j])
        for j in range(len(arms))
        for i in range(len(arms))
        if i != j and methods[i].is_control(configs[j], configs[i])
    ]
    controls += [pair for pair in table.compare if all(arm.one for arm in pair)]
    others = []
    for i, arm in enumerate(arms):
        for j, reference in enumerate(arms[:i]):
            alone = only_difference(values[j], values[i])
            if (table.baseline is arms[0] is reference) or (
                alone and switches.is_choice(arm.one, alone)
            ):
                others.append((arm, reference))
    return Matchups(once(controls), once(controls + others))


def only_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """The one switch in which two arms differ; None if they differ in none or several."""
    if a["mode"] != b["mode"]:
        return None
    names = [name for name in a if a[name] != b.get(name)]
    return names[0] if len(names) == 1 else None


def once(pairs: Iterable[tuple[Arm, Arm]]) -> list[tuple[Arm, Arm]]:
    """The first of every two arms, whichever is the reference."""
    first: dict[frozenset[str], tuple[Arm, Arm]] = {}
    for pair in pairs:
        first.setdefault(frozenset(arm.name for arm in pair), pair)
    return list(first.values())


# --- over which results -----------------------------------------------------------------------


class Block(NamedTuple):
    """Seeds and source-target pairs all combinations of which are there."""

    seeds: list[int]
    pairs: list[Pair]
    largest: bool = True  # whether it is certain that no block is larger


def full_block(keys: Iterable[Key]) -> Block:
    """The largest set of seeds and source-target pairs all combinations of which are in `keys`.

    A mean over pairs is taken seed by seed, and seeds must not differ in the pairs that it is over.
    Of blocks equally large, the one of more seeds. Up to `EXACT` pairs, or seeds that differ in their
    pairs, every block is looked at. Beyond that there may be too many: then pairs and seeds are added
    one by one, those with most results first, and the largest block on the way is taken.
    """
    of_seed: dict[int, set[Pair]] = {}
    of_pair: dict[Pair, set[int]] = {}
    for source, target, seed in keys:
        of_seed.setdefault(seed, set()).add((source, target))
        of_pair.setdefault((source, target), set()).add(seed)
    kinds = dict.fromkeys(map(frozenset, of_seed.values()))
    exact = min(len(kinds), len(of_pair)) <= EXACT
    # the pairs of the best block are those that some seeds have in common
    candidates: set[frozenset[Pair]] = set()
    if exact:
        for pairs in kinds:
            candidates |= {pairs, *(pairs & other for other in candidates)}
    else:
        common = frozenset(of_pair)
        for pairs in sorted(kinds, key=lambda p: (-len(p), sorted(p))):
            common &= pairs
            candidates |= {pairs, common}
        ranked = sorted(of_pair, key=lambda pair: (-len(of_pair[pair]), pair))
        candidates |= {frozenset(ranked[:n]) for n in range(1, len(ranked) + 1)}

    def seeds(pairs: frozenset[Pair]) -> list[int]:
        return sorted(seed for seed, own in of_seed.items() if pairs <= own)

    blocks = [(seeds(pairs), sorted(pairs)) for pairs in candidates if pairs]
    if not blocks:
        return Block([], [])
    best = max(blocks, key=lambda b: (len(b[0]) * len(b[1]), len(b[0]), b[1]))
    return Block(*best, exact)


def over_seeds(
    results: Mapping[Key, Result], name: str, seeds: Sequence[int], pairs: Sequence[Pair]
) -> list[float] | None:
    """A figure of the summaries by seed: its mean over the pairs; None if some result lacks it."""
    values = [[results[(*pair, seed)].summary.get(name) for pair in pairs] for seed in seeds]
    return None if any(v is None for row in values for v in row) else [mean(row) for row in values]


# --- what comes out ---------------------------------------------------------------------------


class Comparison(NamedTuple):
    """An arm minus a reference, in percentage points.

    estimate: None without a result in common
    missing: keys planned for the arm, on pairs that the reference has, that one of them lacks
    left_out: keys that both have, but not on all pairs of their seed
    largest: whether it is certain that less cannot be left out
    adjusted: Holm's p
    """

    table: str
    arm: Arm
    reference: Arm
    estimate: Estimate | None
    seeds: Sequence[int] = ()
    pairs: Sequence[Pair] = ()
    missing: Sequence[Key] = ()
    left_out: Sequence[Key] = ()
    largest: bool = True
    adjusted: float | None = None
    confounds: Sequence[str] = ()

    @property
    def verdict(self) -> Verdict:
        e = self.estimate
        if e is None:
            return Verdict.NOTHING
        if e.n == 1:
            return Verdict.ONE_SEED
        if e.low is None:
            return Verdict.NO_SPREAD
        if self.adjusted is not None and self.adjusted < ALPHA:
            return Verdict.HIGHER if e.mean > 0 else Verdict.LOWER
        return Verdict.NOT_AFTER_HOLM if e.low > 0 or e.high < 0 else Verdict.SAME

    @property
    def name(self) -> str:
        return f"{self.arm.name} minus {self.reference.name}"

    @property
    def gaps(self) -> str:
        """What is not in the figure, in words."""
        parts = [f"{len(self.missing)} missing"] if self.missing else []
        parts += [f"{len(self.left_out)} left out"] if self.left_out else []
        parts += [] if self.largest or not self.left_out else ["perhaps not the fewest"]
        return ", ".join(parts)

    @property
    def sentence(self) -> str:
        e, over = self.estimate, counted(len(self.seeds), "seed")
        if len(self.pairs) > 1:
            over += f" and {len(self.pairs)} pairs of domains"
        else:
            over += "".join(f", {source} to {target}" for source, target in self.pairs)
        if e is None:
            text = f"{self.name}: {self.verdict}"
        elif e.low is None:
            text = f"{self.name}: {signed(e.mean)} points over {over}; {self.verdict}"
        else:
            text = f"{self.name}: {with_interval(e)} points over {over}: {self.verdict}"
            text += f" (p {p_text(self.adjusted)} after Holm)" if self.adjusted is not None else ""
        text += f"; {self.gaps}" if self.gaps else ""
        return text + (f"; confounded by {', '.join(self.confounds)}" if self.confounds else "")


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def with_interval(e: Estimate) -> str:
    return f"{signed(e.mean)} \N{PLUS-MINUS SIGN} {e.high - e.mean:.1f}"


def p_text(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def compare(
    arm: Arm, reference: Arm, table: str = "", pairs: Sequence[Pair] | None = None
) -> Comparison:
    """`arm` minus `reference` over what both have, on `pairs` alone if they are given."""
    allowed = set(reference.pairs) if pairs is None else {*reference.pairs} & {*pairs}
    wanted = [key for key in arm.planned if key[:2] in allowed]
    both = [key for key in wanted if key in arm.results and key in reference.results]
    block = full_block(both)
    have, used = set(both), {(*pair, seed) for pair in block.pairs for seed in block.seeds}
    missing = [key for key in wanted if key not in have]
    left_out = [key for key in both if key not in used]
    if not used:
        return Comparison(table, arm, reference, None, missing=missing)
    ours, theirs = (
        over_seeds(a.results, FIGURE, block.seeds, block.pairs) for a in (arm, reference)
    )
    difference = estimate([a - b for a, b in zip(ours, theirs, strict=True)])
    return Comparison(table, arm, reference, difference, block.seeds, block.pairs, missing, left_out,
                      block.largest)  # fmt: skip


def comparisons(
    study: Study, matched: Mapping[str, Matchups], confounds: Mapping[str, Sequence[str]]
) -> list[Comparison]:
    """Every comparison of the suite once, with Holm's p over all of them.

    Args:
        matched: `matchups` of each table, by name.
        confounds: what the audit has to say, by `place`.
    """
    known: dict[frozenset, Comparison] = {}
    for table in study.tables:
        for arm, reference in matched[table.name].all:
            which = same_results(arm, reference)
            if which not in known:
                remarks = confounds.get(place(table, arm, reference), ())
                known[which] = compare(arm, reference, table.name)._replace(confounds=remarks)
    with_p = [key for key, c in known.items() if c.estimate and c.estimate.p is not None]
    for key, p in zip(with_p, holm([known[k].estimate.p for k in with_p]), strict=True):
        known[key] = known[key]._replace(adjusted=p)
    return list(known.values())


def place(table: Table, arm: Arm, reference: Arm) -> str:
    """What a comparison is called where an audit speaks of it."""
    return f"{table.name}: {arm.name} and {reference.name}"


def same_results(arm: Arm, reference: Arm) -> frozenset:
    """What a comparison is known by in every table: the planned results of both that are paired."""
    keys = arm.planned.keys() & reference.planned.keys()
    return frozenset(
        (a.name if not keys else "", frozenset(a.planned[key] for key in keys))
        for a in (arm, reference)
    )
