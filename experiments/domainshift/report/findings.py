"""What the data say, decided by rule: the sentences of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from domainshift.records.results import NEARLY_ALL, Result
from domainshift.report import switches
from domainshift.report.comparisons import (
    FIGURE,
    Comparison,
    Verdict,
    by_name,
    counted,
    share_text,
    signed,
    with_interval,
)
from domainshift.report.published import Published
from domainshift.report.statistics import LEVEL, mean, prediction
from domainshift.report.study import Arm, Pair

MANY = 4  # source-target pairs, beyond which a sentence names those alone that are decided
UNDECLARED = "The suite declares no primary comparison, so this page has intervals and no verdict."


def tally(primary: Sequence[Comparison]) -> str:
    """How the primary comparisons came out, each counted on each target."""
    if not primary:
        return UNDECLARED
    counts = Counter(c.verdict for c in primary)
    parts = [f"{counts[v]} {WORDS.get(v, v)}" for v in Verdict if counts[v]]
    names = counted(len(by_name(primary)), "primary comparison")
    return f"{names}, {len(primary)} with the targets told apart: {', '.join(parts)}."


WORDS = {
    Verdict.HIGHER: "higher than the reference",
    Verdict.LOWER: "lower",
    Verdict.UNDECIDED: "that these seeds cannot decide",
    Verdict.ONE_SEED: "of one seed, without an interval",
    Verdict.NO_SPREAD: "without spread between seeds, so without an interval",
    Verdict.NOTHING: "without runs yet",
}


def primary_sentences(primary: Sequence[Comparison]) -> list[str]:
    """One sentence for each declared comparison: what came out on each target, or how often of many."""
    return [
        f"{name}: {many(group) if len(group) > MANY else each(group)}."
        for name, group in by_name(primary).items()
    ]


def each(group: Sequence[Comparison]) -> str:
    """What came out on each pair of a comparison."""
    sources = {source for c in group for source, _ in c.pairs}
    parts = []
    for c in group:
        e, where = c.estimate, c.target if len(sources) < 2 else " to ".join(c.pairs[0])
        value = f"{signed(e.mean) if e.low is None else with_interval(e)}, " if e else ""
        gaps = f"; {c.gaps}" if c.gaps and e else ""
        parts.append(f"{where} {value}{c.verdict_words}{gaps}")
    return "; ".join(parts)


def many(group: Sequence[Comparison]) -> str:
    """A comparison's verdicts on many pairs: those that are decided by name, the others counted."""
    decided = [
        f"{c.verdict.word} {' to '.join(c.pairs[0])} ({with_interval(c.estimate)})"
        for c in group
        if c.verdict.decided
    ]
    counts = Counter(c.verdict.word for c in group if not c.verdict.decided)
    others = [f"{n} {word}" for word, n in counts.most_common()]
    means = [c.estimate.mean for c in group if c.estimate]
    span = f"; differences from {signed(min(means))} to {signed(max(means))}" if means else ""
    return f"of {len(group)} pairs of domains {', '.join([*decided, *others])}{span}"


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
    where = f"{low:.1f} to {high:.1f} where one more seed of ours would lie, at {share_text(LEVEL)}"
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
            f"Each of the {judged} figures is held against an interval of its own at {share_text(LEVEL)}: of "
            f"as many runs like ours about {judged * (1 - LEVEL):.1f} lie outside by chance."
        )
    return sentences


def collapsed(arms: Sequence[Arm]) -> list[str]:
    """The arms of which at least one result calls nearly every image one class."""
    sentences = []
    for arm in arms:
        shares = [result.collapsed_share for result in arm.results.values()]
        those = [share for share in shares if share is not None]
        if those:
            part = f"{len(those)} of {counted(len(shares), 'run')}"
            sentences.append(
                f"{arm.name}: {part} call one class more than {share_text(NEARLY_ALL)} of the images"
            )
    return sentences


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
