"""What the data say, decided by rule: the sentences of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from domainshift.records.results import NEARLY_ALL, Result, largest_predicted_share
from domainshift.report import switches
from domainshift.report.comparisons import (
    FIGURE,
    Comparison,
    Verdict,
    counted,
    signed,
    with_interval,
)
from domainshift.report.published import Published
from domainshift.report.statistics import LEVEL, mean, prediction
from domainshift.report.study import Arm, Pair

UNDECLARED = "The suite declares no primary comparison, so this page has intervals and no verdict."


def tally(primary: Sequence[Comparison]) -> str:
    """How the primary comparisons came out, each counted on each target."""
    if not primary:
        return UNDECLARED
    counts = Counter(c.verdict for c in primary)
    parts = [f"{counts[v]} {WORDS.get(v, v)}" for v in Verdict if counts[v]]
    return f"{counted(len(primary), 'primary comparison')}, one a target: {', '.join(parts)}."


WORDS = {
    Verdict.HIGHER: "higher than the reference",
    Verdict.LOWER: "lower",
    Verdict.UNDECIDED: "that these seeds cannot decide",
    Verdict.ONE_SEED: "of one seed, without an interval",
    Verdict.NO_SPREAD: "without spread between seeds, so without an interval",
    Verdict.NOTHING: "without a result in common yet",
}


MANY = 4  # source-target pairs, beyond which a sentence counts them


def many(group: Sequence[Comparison]) -> str:
    """A comparison's verdicts, counted, and the range of its differences."""
    counts = Counter(str(c.verdict) for c in group)
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    means = [c.estimate.mean for c in group if c.estimate]
    span = f"; differences from {signed(min(means))} to {signed(max(means))}" if means else ""
    return f"of {len(group)} pairs of domains {verdicts}{span}"


def by_comparison(primary: Sequence[Comparison]) -> list[list[Comparison]]:
    """The primary comparisons in the order of the suite, those of the same arms together."""
    groups: dict[str, list[Comparison]] = {}
    for c in primary:
        groups.setdefault(c.name, []).append(c)
    return list(groups.values())


def primary_sentences(primary: Sequence[Comparison]) -> list[str]:
    """One sentence for each declared comparison: what came out on each target, or how often of many."""
    sentences = []
    for group in by_comparison(primary):
        if len(group) > MANY:
            sentences.append(f"{group[0].name}: {many(group)}.")
            continue
        sources = {source for c in group for source, _ in c.pairs}
        parts = []
        for c in group:
            where = c.target if len(sources) < 2 else " to ".join(c.pairs[0])
            e = c.estimate
            value = (
                ""
                if e is None
                else f"{with_interval(e) if e.low is not None else signed(e.mean)}, "
            )
            gaps = f"; {c.gaps}" if c.gaps and e is not None else ""
            parts.append(f"{where} {value}{c.verdict_words}{gaps}")
        sentences.append(f"{group[0].name}: {'; '.join(parts)}.")
    return sentences


def against_published(arm: Arm, pair: Pair, published: Published) -> str | None:
    """A published figure beside what one more seed of ours would give.

    The sentence does not say whether a figure that `published.find` doubts lies inside. None where the
    comparison says nothing: we have no result, or ours departs from the protocol in more than the file
    of its weights, which the sentence names.
    """
    results = arm.of(pair)
    weights = switches.plain("weights", results[0].config["weights"]) if results else "none"
    but = () if weights == "none" else ("weights",)
    if not results or switches.departures(results[0], but, published.preset):
        return None
    values = [result.summary[FIGURE] for result in results]
    text = f"{arm.name}, {pair[1]}: ours {mean(values):.1f} over {counted(len(values), 'seed')}"
    text += "" if weights == "imagenet" else f" with weights {weights}"
    text += f", published {published.accuracy:.2f}"
    if published.status != "valid":
        return f"{text}, which is no result ({published.status})"
    remarks = [*published.doubts, *(f"the same source also has {x}" for x in published.also)]
    text += f" ({'; '.join(remarks)})" if remarks else ""
    limits = prediction(values)
    if limits is None:
        return f"{text}; {Verdict.ONE_SEED if len(values) == 1 else Verdict.NO_SPREAD}"
    low, high = max(0.0, limits[0]), min(100.0, limits[1])  # of percent
    where = f"{low:.1f} to {high:.1f} where one more seed of ours would lie, at {LEVEL:.0%}"
    if published.doubts:
        return f"{text}; beside the {where}"
    inside = low <= published.accuracy <= high
    return f"{text}: {'inside' if inside else 'outside'} the {where}"


def beside_published(entries: Sequence[tuple[Arm, Pair, Published]]) -> list[str]:
    """Every published figure of the tables that can be compared, and how many cannot."""
    texts = [against_published(*entry) for entry in entries]
    sentences = list(dict.fromkeys(text for text in texts if text))
    if None in texts:
        sentences.append(
            f"{counted(texts.count(None), 'published figure')} in the tables not compared with ours: "
            "our runs depart from the protocol."
        )
    judged = sum(": inside" in text or ": outside" in text for text in sentences)
    if judged > 1:
        sentences.append(
            f"Each of the {judged} figures is held against an interval of its own at {LEVEL:.0%}: of "
            f"as many runs like ours about {judged * (1 - LEVEL):.1f} lie outside by chance."
        )
    return sentences


def collapsed(arms: Sequence[Arm]) -> list[str]:
    """The arms of which at least one result calls nearly every image one class."""
    sentences = []
    for arm in arms:
        shares = [nearly_all(result) for result in arm.results.values()]
        those = [share for share in shares if share is not None]
        if those:
            part = f"{len(those)} of {counted(len(shares), 'run')}"
            sentences.append(
                f"{arm.name}: {part} call one class more than {100 * NEARLY_ALL:.0f} % of the images"
            )
    return sentences


def nearly_all(result: Result) -> float | None:
    """The part of the images that a collapsed run calls one class; None for another run."""
    share, _ = largest_predicted_share(result.evaluation.confusion)
    return share if share > NEARLY_ALL else None


def epoch_choice(results: Sequence[Result]) -> list[str]:
    """What choosing the epoch would change, over all results that were tested after several."""
    oracle, selected = (
        [r.summary[name] - r.summary[FIGURE] for r in results if r.summary[name] is not None]
        for name in ("oracle_target_accuracy", "selected_target_accuracy")
    )
    sentences = []
    if oracle:
        sentences.append(
            f"Choosing each run's epoch by target labels (an oracle, no result) adds {mean(oracle):.1f} "
            f"points over the last epoch, on average of {counted(len(oracle), 'run')}."
        )
    if selected:
        sentences.append(
            f"Choosing it by held-out source images moves the figure by {signed(mean(selected))} "
            f"points, on average of {counted(len(selected), 'run')}."
        )
    return sentences


def mistake(arms: Sequence[Arm]) -> list[str]:
    """What testing on the training images would have said."""
    sentences = []
    for arm in arms:
        results = [r for r in arm.results.values() if r.invalid is not None]
        if results:
            wrong = mean([r.invalid.accuracy for r in results])
            right = mean([r.evaluation.accuracy for r in results])
            sentences.append(
                f"{arm.name}: {wrong:.1f} on its own training images, {right:.1f} on the target "
                f"({counted(len(results), 'run')})"
            )
    return sentences
