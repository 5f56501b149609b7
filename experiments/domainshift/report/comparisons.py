"""Which arms are compared, over which results, and what comes out.

A comparison is a paired difference, seed by seed, on one source-target pair or averaged over several
within each seed. The interval is Student's over the seeds: they are what is drawn at random, the pairs
are chosen.

A suite declares a few *primary* comparisons beforehand. These, on each pair, are one family: Holm's
correction is over them, and they alone get verdicts. All others explore: they have an interval and
nothing more. A mean over pairs can hide that one pair gains what another loses, so it never has a
verdict.

Where the arms of a table spread alike, the standard error comes from all of them (see
`domainshift.report.statistics.pooled`). Each training counts once there, however many tests it has:
what its tests have in common would pass for agreement of several arms. The difference of two tests of
one training has a spread of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from domainshift.records.results import Result
from domainshift.report import switches
from domainshift.report.statistics import (
    Estimate,
    Pool,
    equivalence,
    estimate,
    holm,
    mean,
    pooled,
    quantile,
    smallest_difference,
)
from domainshift.report.study import Arm, Key, Pair, Study, Table

ALPHA = 0.05  # of the family of primary comparisons
FIGURE = "target_accuracy"  # after the last epoch
EXACT = 12  # pairs of domains, up to which the largest full block is searched for in full


class Verdict(StrEnum):
    HIGHER = "higher"
    LOWER = "lower"
    EQUAL = "equal within the margin"
    UNDECIDED = "undecided"
    CONFOUNDED = "confounded"
    ONE_SEED = "one seed: no interval"
    NO_SPREAD = "no spread between seeds: no interval"
    NOTHING = "no runs yet"

    @property
    def decided(self) -> bool:
        return self in (Verdict.HIGHER, Verdict.LOWER, Verdict.EQUAL)

    @property
    def word(self) -> str:
        """The verdict where there is room for a word or two."""
        return str(self).partition(":")[0].partition(" within")[0].partition(" between")[0]


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
    controls = [pair for pair in table.compare if all(arm.one for arm in pair)]
    controls += [
        (arms[i], arms[j])
        for j in range(len(arms))
        for i in range(len(arms))
        if i != j and methods[i].is_control(configs[j], configs[i])
    ]
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


def pool_of(
    table: Table | None, arms: Sequence[Arm], seeds: Sequence[int], pairs: Sequence[Pair]
) -> Pool | None:
    """The common spread of the arms of a table, for a sum of `arms`.

    Arms that lack one of these seeds or pairs are left out. Of several tests of one training one
    counts: that of an arm of the sum, else the first. None where two of the sum test one training.
    """
    keys = [(*pair, seed) for pair in pairs for seed in seeds]
    names = frozenset(arm.name for arm in arms)
    if table is None or len(independent(arms, names, keys)) < len(arms):
        return None
    return _pool(table, names, tuple(seeds), tuple(pairs))


@functools.lru_cache(maxsize=4096)
def _pool(
    table: Table, names: frozenset[str], seeds: tuple[int, ...], pairs: tuple[Pair, ...]
) -> Pool | None:
    keys = [(*pair, seed) for pair in pairs for seed in seeds]
    arms = independent(table.compared, names, keys)
    return pooled([over_seeds(arm.results, FIGURE, seeds, pairs) for arm in arms])


def independent(arms: Iterable[Arm], names: Collection[str], keys: Collection[Key]) -> list[Arm]:
    """The arms that have all these results, each with trainings of its own; those in `names` first."""
    whole = [arm for arm in arms if all(key in arm.results for key in keys)]
    kept, known = [], set()
    for arm in sorted(whole, key=lambda arm: arm.name not in names):
        trainings = {arm.training(key) for key in keys}
        if not trainings & known:
            kept.append(arm)
            known |= trainings
    return kept


# --- what comes out ---------------------------------------------------------------------------


class Comparison(NamedTuple):
    """An arm minus a reference, in percentage points.

    estimate: None without a result in common
    missing: keys planned for the arm, on pairs that the reference has, that one of them lacks
    left_out: keys that both have, but not on all pairs of their seed
    largest: whether it is certain that less cannot be left out
    primary: whether the suite declared it, so that it has a verdict
    adjusted: Holm's p of there being no difference, over the primary comparisons
    margin: points within which the arms pass for equal; None: the suite states none
    adjusted_equal: Holm's p of their being `margin` or more apart
    smallest: the difference that these seeds would find with 80 % power
    provable: the least margin within which these seeds could show arms equal that are
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
    primary: bool = False
    adjusted: float | None = None
    margin: float | None = None
    adjusted_equal: float | None = None
    smallest: float | None = None
    provable: float | None = None
    confounds: Sequence[str] = ()

    @property
    def verdict(self) -> Verdict | None:
        """None for a comparison that is not primary."""
        e = self.estimate
        if not self.primary:
            return None
        if e is None:
            return Verdict.NOTHING
        if e.low is None:
            return Verdict.ONE_SEED if e.n == 1 else Verdict.NO_SPREAD
        if self.confounds:
            return Verdict.CONFOUNDED
        if self.adjusted is not None and self.adjusted < ALPHA:
            return Verdict.HIGHER if e.mean > 0 else Verdict.LOWER
        equal = self.adjusted_equal is not None and self.adjusted_equal < ALPHA
        return Verdict.EQUAL if equal else Verdict.UNDECIDED

    @property
    def name(self) -> str:
        return f"{self.arm.name} minus {self.reference.name}"

    @property
    def target(self) -> str:
        """The target of its one pair, or how many pairs it is over."""
        if len(self.pairs) == 1:
            return self.pairs[0][1]
        return f"{counted(len(self.pairs), 'pair')} of domains"

    @property
    def gaps(self) -> str:
        """What is not in the figure, in words."""
        parts = [f"{len(self.missing)} missing"] if self.missing else []
        parts += [f"{len(self.left_out)} left out"] if self.left_out else []
        parts += [] if self.largest or not self.left_out else ["perhaps not the fewest"]
        return ", ".join(parts)

    @property
    def verdict_words(self) -> str:
        """The verdict as a sentence says it; "" for a comparison that has none."""
        verdict = self.verdict
        if verdict is None:
            return ""
        equal = ""
        if self.adjusted_equal is not None and self.adjusted_equal < ALPHA:
            equal = f"equal within {self.margin:g} points (p {p_text(self.adjusted_equal)})"
        if verdict in (Verdict.HIGHER, Verdict.LOWER):
            return f"{verdict} (p {p_text(self.adjusted)})" + (f", and {equal}" if equal else "")
        if verdict == Verdict.EQUAL:
            return equal
        if verdict == Verdict.UNDECIDED:
            seeds = f"{NUMBERS.get(len(self.seeds), len(self.seeds))} seeds"
            words = f"undecided: {seeds} cannot say"
            if self.smallest is None or self.smallest > 100:  # no difference is as large
                return words
            return f"{words} (they find {self.smallest:.1f} points or more)"
        if verdict == Verdict.CONFOUNDED:
            return f"no verdict: confounded by {', '.join(self.confounds)}"
        return str(verdict)

    @property
    def sentence(self) -> str:
        e, over = self.estimate, counted(len(self.seeds), "seed")
        if len(self.pairs) > 1:
            over += f" and {len(self.pairs)} pairs of domains"
        else:
            over += "".join(f", {source} to {target}" for source, target in self.pairs)
        if e is None:
            text = f"{self.name}: {Verdict.NOTHING}"
        elif e.low is None:
            why = Verdict.ONE_SEED if e.n == 1 else Verdict.NO_SPREAD
            text = f"{self.name}: {signed(e.mean)} points over {over}; {why}"
        else:
            text = f"{self.name}: {with_interval(e)} points over {over}"
            text += f": {self.verdict_words}" if self.verdict_words else ""
        text += f"; {self.gaps}" if self.gaps else ""
        confounds = self.confounds and self.verdict != Verdict.CONFOUNDED
        return text + (f"; confounded by {', '.join(self.confounds)}" if confounds else "")


NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def with_interval(e: Estimate) -> str:
    return f"{signed(e.mean)} \N{PLUS-MINUS SIGN} {e.high - e.mean:.1f}"


def p_text(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def share_text(share: float) -> str:
    """'95 %'; the page writes percent in this way alone."""
    return f"{100 * share:.0f} %"


def compare(
    arm: Arm, reference: Arm, table: Table | None = None, pairs: Sequence[Pair] | None = None
) -> Comparison:
    """`arm` minus `reference` over what both have, on `pairs` alone if they are given.

    Args:
        table: whose arms give the standard error, if they spread alike.
    """
    name = "" if table is None else table.name
    allowed = set(reference.pairs) if pairs is None else {*reference.pairs} & {*pairs}
    wanted = [key for key in arm.planned if key[:2] in allowed]
    both = [key for key in wanted if key in arm.results and key in reference.results]
    block = full_block(both)
    have, used = set(both), {(*pair, seed) for pair in block.pairs for seed in block.seeds}
    missing = [key for key in wanted if key not in have]
    left_out = [key for key in both if key not in used]
    if not used:
        return Comparison(name, arm, reference, None, missing=missing)
    ours, theirs = (
        over_seeds(a.results, FIGURE, block.seeds, block.pairs) for a in (arm, reference)
    )
    difference = estimate(
        [a - b for a, b in zip(ours, theirs, strict=True)],
        pool=pool_of(table, (arm, reference), block.seeds, block.pairs),
        scale=math.sqrt(2),
    )
    return Comparison(name, arm, reference, difference, block.seeds, block.pairs, missing, left_out,
                      block.largest)  # fmt: skip


# --- of a whole study -------------------------------------------------------------------------


def by_name(primary: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Comparisons by name: those of the same arms together, in their order."""
    groups: dict[str, list[Comparison]] = {}
    for c in primary:
        groups.setdefault(c.name, []).append(c)
    return groups


class Comparisons:
    """Every comparison of a study.

    Args:
        matched: `matchups` of each table, by name.
        confounds: what the audit has to say, by `place`.

    Attributes:
        primary: one for each declared comparison and source-target pair, in the order of the suite.
        exploratory: every other two arms that tables compare, over their pairs.
    """

    def __init__(
        self, study: Study, matched: Mapping[str, Matchups], confounds: Mapping[str, Sequence[str]]
    ) -> None:
        self.tables = {table.name: table for table in study.tables}
        self.confounds = confounds
        self.primary = self._family(study)
        self._verdicts = {(c.arm.name, c.reference.name, tuple(c.pairs)): c for c in self.primary}
        declared = {frozenset((a.name, b.name)) for a, b in study.primary}
        known: dict[frozenset, Comparison] = {}
        for table in study.tables:
            for arm, reference in matched[table.name].all:
                if frozenset((arm.name, reference.name)) in declared:
                    continue
                which = same_results(arm, reference)
                if which not in known:
                    known[which] = self.of(table, arm, reference)
        self.exploratory = list(known.values())

    def of(
        self, table: Table, arm: Arm, reference: Arm, pairs: Sequence[Pair] | None = None
    ) -> Comparison:
        """An arm minus a reference where a table shows them, on some pairs or on all."""
        wanted = arm.pairs if pairs is None else pairs
        asked = tuple(pair for pair in wanted if pair in reference.pairs)
        if verdict := self._verdicts.get((arm.name, reference.name, asked)):
            return verdict
        one = compare(arm, reference, table, pairs)
        return one._replace(confounds=self.confounds.get(place(table, arm, reference), ()))

    def _family(self, study: Study) -> list[Comparison]:
        family = []
        for arm, reference in study.primary:
            remarks = dict.fromkeys(
                line
                for t in study.tables
                for line in self.confounds.get(place(t, arm, reference), ())
            )
            for pair in [pair for pair in arm.pairs if pair in reference.pairs]:
                both = {k for k in arm.results if k[:2] == pair and k in reference.results}
                seeds = [seed for *_, seed in both]
                home = home_of(study, (arm.name, reference.name), pair, seeds)
                one = compare(arm, reference, home, [pair])
                if one.estimate is None:  # the pair is not in its block, and is to be named
                    one = one._replace(pairs=[pair])
                family.append(
                    one._replace(primary=True, confounds=list(remarks), margin=study.margin)
                )
        return adjusted(family)


def home_of(study: Study, names: Iterable[str], pair: Pair, seeds: Iterable[int]) -> Table | None:
    """The table with these arms, by name, whose spread a comparison of them may use.

    Of several the one with most arms that have all these seeds on the pair, each with trainings of its
    own; of equals the first.
    """
    names, keys = set(names), [(*pair, seed) for seed in seeds]

    def arms(table: Table) -> int:
        return len(independent(table.compared, names, keys))

    homes = [t for t in study.tables if names <= {arm.name for arm in t.compared}]
    return max(homes, key=arms, default=None)


def adjusted(family: Sequence[Comparison]) -> list[Comparison]:
    """A family with Holm's p values, the smallest difference that each would find, the least margin.

    The family is what was declared: a comparison without a p counts as one with p 1, so that runs that
    are still missing make no verdict easier. Both figures are at the level that Holm's correction asks
    of the first of the family.
    """
    level = ALPHA / max(1, len(family))
    ps = [c.estimate.p if c.estimate else None for c in family]
    equals = [
        equivalence(c.estimate, c.margin) if c.estimate and c.margin is not None else None
        for c in family
    ]
    result = []
    holms = adjusted_holm(ps, len(ps)), adjusted_holm(equals, len(equals))
    for c, p, p_equal in zip(family, *holms, strict=True):
        c = c._replace(adjusted=p, adjusted_equal=p_equal)
        if p is not None:
            e = c.estimate
            smallest = e.error * smallest_difference(e.df, level)
            c = c._replace(smallest=smallest, provable=e.error * quantile(e.df, level))
        result.append(c)
    return result


def adjusted_holm(values: Sequence[float | None], size: int | None = None) -> list[float | None]:
    """Holm's p values; None stays None.

    Args:
        size: of the family; default: as many as there are.
    """
    places = [i for i, p in enumerate(values) if p is not None]
    others = (len(places) if size is None else size) - len(places)
    known = holm([values[i] for i in places] + [1.0] * others)
    result: list[float | None] = [None] * len(values)
    for i, p in zip(places, known, strict=False):
        result[i] = p
    return result


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
