"""What the data say, decided by rule: comparisons, verdicts, and the sentences of the report.

A comparison is a paired difference: seed by seed and source-target pair by pair, over the largest
full block of both that the two arms have in common. It is averaged over the pairs of each seed, and
the interval is Student's over the seeds: they are what is drawn at random, the pairs are chosen.

The verdict looks at Holm's adjusted p value, with all comparisons of the suite as one family, each
counted once however many tables show it. Confounded ones are of the family, but of no count of
verdicts: they do not say what made the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from intervals import LEVEL, Estimate, estimate, holm, mean, prediction
from published import Published
from study import Arm, Key, Pair, Run, Study, departures, full_block, matchups, over_seeds, plain

ALPHA = 0.05  # of the family of all comparisons
FIGURE = "target_accuracy"  # the last epoch's
SHOWN = 5  # comparisons on the first screen

HIGHER, LOWER = "higher", "lower"
NOT_AFTER_HOLM = "zero is outside the interval, but not after Holm's correction"
SAME = "not distinguishable from zero"
ONE_SEED = "one seed: no interval"
NO_SPREAD = "no spread between seeds: no interval"
NOTHING = "nothing in common yet"


class Comparison(NamedTuple):
    """An arm minus a reference, in percentage points."""

    table: str
    arm: Arm
    reference: Arm
    estimate: Estimate | None  # None: no run in common
    seeds: Sequence[int]
    pairs: Sequence[Pair]
    missing: Sequence[
        Key
    ]  # planned for the arm, on pairs that the reference has; one of both lacks it
    left_out: Sequence[Key] = ()  # both have it, but not all pairs of its seed
    adjusted: float | None = None  # Holm's p
    confounds: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        found = self.estimate
        if found is None:
            return NOTHING
        if found.n == 1:
            return ONE_SEED
        if found.low is None:
            return NO_SPREAD
        if self.adjusted is not None and self.adjusted < ALPHA:
            return HIGHER if found.mean > 0 else LOWER
        return NOT_AFTER_HOLM if found.low > 0 or found.high < 0 else SAME

    @property
    def name(self) -> str:
        return f"{self.arm.name} minus {self.reference.name}"

    @property
    def gaps(self) -> str:
        """What is not in the figure, in words."""
        parts = [f"{len(self.missing)} missing"] if self.missing else []
        return ", ".join(parts + ([f"{len(self.left_out)} left out"] if self.left_out else []))

    @property
    def sentence(self) -> str:
        over = counted(len(self.seeds), "seed")
        if len(self.pairs) > 1:
            over += f" and {len(self.pairs)} pairs of domains"
        else:
            over += "".join(f", {source} to {target}" for source, target in self.pairs)
        if self.estimate is None:
            text = f"{self.name}: {self.verdict}"
        elif self.estimate.low is None:
            text = f"{self.name}: {signed(self.estimate.mean)} points over {over}; {self.verdict}"
        else:
            text = f"{self.name}: {with_interval(self.estimate)} points over {over}: {self.verdict}"
            text += f" (p {p_text(self.adjusted)} after Holm)" if self.adjusted is not None else ""
        text += f"; {self.gaps}" if self.gaps else ""
        if self.confounds:
            text += f"; confounded by {', '.join(self.confounds)}"
        return text


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def with_interval(found: Estimate) -> str:
    return f"{signed(found.mean)} \N{PLUS-MINUS SIGN} {found.high - found.mean:.1f}"


def p_text(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def compare(
    arm: Arm, reference: Arm, table: str = "", pairs: Sequence[Pair] | None = None
) -> Comparison:
    """`arm` minus `reference` over what both have, on `pairs` alone if they are given."""
    wanted = [
        key for key in arm.planned
        if key[:2] in reference.pairs and (pairs is None or key[:2] in pairs)
    ]  # fmt: skip
    both = [key for key in wanted if key in arm.runs and key in reference.runs]
    seeds, block = full_block(both)
    used = {(*pair, seed) for pair in block for seed in seeds}
    missing = [key for key in wanted if key not in both]
    left_out = [key for key in both if key not in used]
    if not used:
        return Comparison(table, arm, reference, None, (), (), missing)
    ours, theirs = (over_seeds(a.runs, FIGURE, seeds, block) for a in (arm, reference))
    found = estimate([a - b for a, b in zip(ours, theirs, strict=True)])
    return Comparison(table, arm, reference, found, seeds, block, missing, left_out)


def comparisons(study: Study, confounds: dict[str, list[str]]) -> list[Comparison]:
    """Every comparison of the suite once, with Holm's p over all of them.

    Args:
        confounds: what the audit has to say, by "table: arm and reference".
    """
    found: dict[frozenset, Comparison] = {}
    for table in study.tables:
        for arm, reference in matchups(table):
            which = same_runs(arm, reference)
            if which not in found:
                where = f"{table.name}: {arm.name} and {reference.name}"
                result = compare(arm, reference, table.name)
                found[which] = result._replace(confounds=confounds.get(where, []))
    with_p = [key for key, c in found.items() if c.estimate and c.estimate.p is not None]
    for key, p in zip(with_p, holm([found[k].estimate.p for k in with_p]), strict=True):
        found[key] = found[key]._replace(adjusted=p)
    return list(found.values())


def same_runs(arm: Arm, reference: Arm) -> frozenset:
    """What a comparison is known by in every table: the runs of both that are paired, by plan."""
    keys = arm.planned.keys() & reference.planned.keys()
    return frozenset(
        (a.name if not keys else "", frozenset(a.planned[key] for key in keys))
        for a in (arm, reference)
    )


# --- sentences --------------------------------------------------------------------------------


def tally(found: Sequence[Comparison]) -> str:
    """How the comparisons came out."""
    if not found:
        return "No two arms can be compared yet."
    sound = [c for c in found if not c.confounds]
    tested = [c for c in sound if c.adjusted is not None]
    parts = [f"{counted(len(found), 'comparison')}"]
    if tested:
        words = {
            HIGHER: "higher than the reference",
            LOWER: "lower",
            NOT_AFTER_HOLM: "with zero outside the interval, but not after Holm's correction",
            SAME: "not distinguishable from zero",
        }
        counts = [(sum(c.verdict == v for c in tested), word) for v, word in words.items()]
        parts.append(", ".join(f"{n} {word}" for n, word in counts if n))
    if untested := len(sound) - len(tested):
        parts.append(f"{untested} without an interval, so without a verdict")
    if aside := len(found) - len(sound):
        parts.append(f"{aside} confounded, and not counted")
    return f"{parts[0]}: {'; '.join(parts[1:])}."


def ranked(found: Sequence[Comparison]) -> list[Comparison]:
    """The surest first: what is not confounded, then by verdict and by the size of the difference."""
    order = [HIGHER, LOWER, NOT_AFTER_HOLM, SAME, ONE_SEED, NO_SPREAD, NOTHING]

    def place(c: Comparison) -> tuple:
        sure = 0 if c.verdict in (HIGHER, LOWER) else order.index(c.verdict)
        return bool(c.confounds), sure, -abs(c.estimate.mean) if c.estimate else 0.0

    return sorted(found, key=place)


def against_published(arm: Arm, pair: Pair, published: Published) -> str | None:
    """A published figure beside what one more seed of ours would give.

    Whether it lies inside is not said of one that `published.find` has doubts about.
    None where that says nothing: we have no runs, or they depart from the protocol in more than the
    file that their weights are from, which is named.
    """
    runs = arm.of(pair)
    weights = plain("weights", runs[0].config["weights"]) if runs else "none"
    if not runs or departures(runs[0], () if weights == "none" else ("weights",)):
        return None
    values = [run.summary[FIGURE] for run in runs]
    text = f"{arm.name}, {pair[1]}: ours {mean(values):.1f} over {counted(len(values), 'seed')}"
    text += "" if weights == "imagenet" else f" with weights {weights}"
    text += f", published {published.accuracy:.2f}"
    if published.status != "valid":
        return f"{text}, which is no result ({published.status})"
    known = [*published.doubts, *(f"the same source also has {other}" for other in published.also)]
    text += f" ({'; '.join(known)})" if known else ""
    limits = prediction(values)
    if limits is None:
        return f"{text}; {ONE_SEED if len(values) == 1 else NO_SPREAD}"
    low, high = max(0.0, limits[0]), min(100.0, limits[1])  # of percent
    where = f"{low:.1f} to {high:.1f} where one more seed of ours would lie, at {LEVEL:.0%}"
    if published.doubts:
        return f"{text}; beside the {where}"
    inside = low <= published.accuracy <= high
    return f"{text}: {'inside' if inside else 'outside'} the {where}"


def collapsed(arms: Sequence[Arm]) -> list[str]:
    """The arms whose predictions are one class, by rule: in at least one run."""
    found = []
    for arm in arms:
        flags = [run.summary["collapsed"] for run in arm.runs.values()]
        if any(flags):
            share = f"{sum(flags)} of {counted(len(flags), 'run')}"
            found.append(f"{arm.name}: {share} call every target image one class")
    return found


def epoch_choice(runs: Sequence[Run]) -> list[str]:
    """What choosing the epoch would change, over all runs."""
    text = []
    if runs:
        gain = mean([r.summary["oracle_target_accuracy"] - r.summary[FIGURE] for r in runs])
        text.append(
            f"Choosing each run's epoch by target labels (an oracle, no result) adds {gain:.1f} points "
            f"over the last epoch, on average of {counted(len(runs), 'run')}."
        )
    chosen = [r for r in runs if r.summary["selected_target_accuracy"] is not None]
    if chosen:
        gain = mean([r.summary["selected_target_accuracy"] - r.summary[FIGURE] for r in chosen])
        text.append(
            f"Choosing it by held-out source images moves the figure by {signed(gain)} points, on average of "
            f"{counted(len(chosen), 'run')}."
        )
    return text


def mistake(arms: Sequence[Arm]) -> list[str]:
    """What testing on the training images would have said."""
    found = []
    for arm in arms:
        runs = [r for r in arm.runs.values() if "invalid_test_accuracy" in r.summary]
        if runs:
            wrong = mean([run.summary["invalid_test_accuracy"] for run in runs])
            right = mean([run.summary[FIGURE] for run in runs])
            found.append(
                f"{arm.name}: {wrong:.1f} on its own training images, {right:.1f} on the target "
                f"({counted(len(runs), 'run')})"
            )
    return found
