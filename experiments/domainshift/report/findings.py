"""What the data say, decided by rule: the sentences of the report."""

from __future__ import annotations

from collections.abc import Sequence

from domainshift.records.results import Result
from domainshift.report import switches
from domainshift.report.comparisons import FIGURE, Comparison, Verdict, counted, signed
from domainshift.report.published import Published
from domainshift.report.statistics import LEVEL, mean, prediction
from domainshift.report.study import Arm, Pair

SHOWN = 5  # comparisons on the first screen


def tally(comparisons: Sequence[Comparison]) -> str:
    """How the comparisons came out."""
    if not comparisons:
        return "No two arms can be compared yet."
    sound = [c for c in comparisons if not c.confounds]
    tested = [c for c in sound if c.adjusted is not None]
    parts = []
    if tested:
        endings = {
            Verdict.HIGHER: "higher than the reference",
            Verdict.LOWER: "lower",
            Verdict.NOT_AFTER_HOLM: "with zero outside the interval, but not after Holm's correction",
            Verdict.SAME: "not distinguishable from zero",
        }
        counts = [(sum(c.verdict == v for c in tested), ending) for v, ending in endings.items()]
        parts.append(", ".join(f"{n} {ending}" for n, ending in counts if n))
    if untested := len(sound) - len(tested):
        parts.append(f"{untested} without an interval, so without a verdict")
    if confounded := len(comparisons) - len(sound):
        parts.append(f"{confounded} confounded, and not counted")
    return f"{counted(len(comparisons), 'comparison')}: {'; '.join(parts)}."


def ranked(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The surest first: what is not confounded, then by verdict and by the size of the difference."""
    order = list(Verdict)

    def rank(c: Comparison) -> tuple:
        sure = 0 if c.verdict.apart else order.index(c.verdict)
        return bool(c.confounds), sure, -abs(c.estimate.mean) if c.estimate else 0.0

    return sorted(comparisons, key=rank)


def against_published(arm: Arm, pair: Pair, published: Published) -> str | None:
    """A published figure beside what one more seed of ours would give.

    The sentence does not say whether a figure that `published.find` doubts lies inside. None where the
    comparison says nothing: we have no result, or ours departs from the protocol in more than the file
    of its weights, which the sentence names.
    """
    results = arm.of(pair)
    weights = switches.plain("weights", results[0].config["weights"]) if results else "none"
    if not results or switches.departures(results[0], () if weights == "none" else ("weights",)):
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
    """The arms of which at least one result calls every image one class."""
    sentences = []
    for arm in arms:
        flags = [result.evaluation.collapsed for result in arm.results.values()]
        if any(flags):
            share = f"{sum(flags)} of {counted(len(flags), 'run')}"
            sentences.append(f"{arm.name}: {share} call every target image one class")
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
