"""Check the records of a suite: each by itself, and whether arms that are compared may be.

What a record shows by itself, `domainshift.records.validate` finds when it is read: a record that was
edited or that breaks a rule is in no table. Here come the rules that need the network or several
records. An audit that fails says which results fail which rule.

No record can show that training saw no target label. A method has no argument through which one could
come, and the record shows that as many labelled images were trained on as the source has.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from domainshift.errors import BadInput
from domainshift.models import output_shapes
from domainshift.records.results import MANY_SKIPPED, Result, percent
from domainshift.records.schema import Row, Versions
from domainshift.records.validate import config_of, method_of_record
from domainshift.report import switches
from domainshift.report.comparisons import Matchups, counted, place, share_text
from domainshift.report.study import Arm, Study

# In the order of the report: what a rule asks of a result, or of two arms that are compared.
RULES = {
    "record": "sealed and unedited; all figures follow from the epochs and the predictions",
    "length": "as many epochs, updates and passes as the switches say",
    "rates": "learning rates as the switches say, at the start of every epoch",
    "steps": "no updates skipped but those that float16 skips",
    "k of n": "tested on every image of the target",
    "hooks": "the layers that the switches name were shaped in every training pass, once a call",
    "maps": "maps as dense as the switches say, and applied",
    "labels": "labelled training images are the source's, less those held out; no target is the source",
    "BatchNorm": "statistics untouched by target images where the switches promise it",
    "copies": "no run, no losses and no weights are those of a training of another seed or source",
    "repeats": "trainings of one key have equal losses where one machine made them",
    "arms": "the results of an arm differ in domains and seed alone",
    "data": "results that are compared, or in one arm, read the same images of a domain",
    "updates": "arms that are compared had as many updates",
    "confounds": "arms that are compared differ in the switches of their method alone",
    "weights": "imagenet weights are the published file; arms that are compared start from the same",
    "code": "arms that are compared ran on the same code, versions and kind of device",
}
OF_A_RECORD = ("length", "rates", "steps", "k of n", "hooks", "maps", "labels", "BatchNorm")
OF_A_COMPARISON = ("updates", "confounds", "weights", "code")
SHOWN = 5  # trainings that a limit names
COMPUTED = ("device", "pipeline", "memory_format", "attach")  # places that decide the last bits
CONFOUNDING = ("confounds", "updates", "weights", "data")  # what these find confounds a comparison


class Remark(NamedTuple):
    """What an audit has to say of a result or of a comparison."""

    rule: str
    where: str
    what: str
    fails: bool  # False: to be known, and shown with the figures it concerns

    @property
    def text(self) -> str:
        return f"{self.where}: {self.what}"


class Audit(NamedTuple):
    """What an audit found.

    checked: how many results, trainings, arms or comparisons, by rule
    limits: sentences on what keeps the figures from being of one code on one machine, or of arms
        that differ
    """

    checked: dict[str, int]
    remarks: list[Remark]
    limits: Sequence[str] = ()

    @property
    def failures(self) -> list[Remark]:
        return [remark for remark in self.remarks if remark.fails]

    @property
    def passes(self) -> bool:
        return not self.failures

    @property
    def confounds(self) -> dict[str, list[str]]:
        """What confounds each comparison, by `comparisons.place`."""
        lines: dict[str, list[str]] = {}
        for remark in self.remarks:
            if remark.rule in CONFOUNDING:
                lines.setdefault(remark.where, []).append(remark.what)
        return lines


def audit(study: Study, matched: Mapping[str, Matchups]) -> Audit:
    """Apply every rule to every record and comparison of a study.

    Args:
        matched: `matchups` of each table, by name.
    """
    failing = [problem for problem in study.problems if problem.fails]
    remarks = [
        Remark(rule, problem.name, line, True)
        for problem in failing
        for rule, line in zip(
            problem.rules or ["record"] * len(problem.lines), problem.lines, strict=True
        )
    ]
    trainings = list({result.folder: result for result in study.results.values()}.values())
    for result in trainings:
        remarks += [Remark("hooks", result.folder.name, what, True) for what in hooks(result)]
        remarks += of_training(result)
    alike = alike_arms(study)
    remarks += [*copies(study.results.values()), *alike, *repeats(trainings)]
    remarks += [*other_images(study.results.values()), *tested_elsewhere(study.results.values())]
    arms = [arm for table in study.tables for arm in table.arms if arm.results]
    for arm in arms:
        remarks += uniform(arm)
    pairs = [(table, *pair) for table in study.tables for pair in matched[table.name].all]
    for table, arm, reference in pairs:
        keys = [key for key in arm.results if key in reference.results]
        both = [(arm.results[key], reference.results[key]) for key in keys]
        both = both or [(arm.one, reference.one)]  # their switches are known already
        counts = Counter(remark for results in both for remark in comparable(*results, study))
        for remark, n in counts.items():
            share = "" if n == len(both) else f" (in {n} of {len(both)} pairs of results)"
            where = place(table, arm, reference)
            remarks.append(remark._replace(where=where, what=remark.what + share))
    whole = len(study.results) + sum(problem.kind == "broken rule" for problem in failing)
    checked = {"record": len(study.results) + len(failing)} | dict.fromkeys(OF_A_RECORD, whole)
    checked |= dict.fromkeys(("copies", "repeats"), len(trainings))
    checked |= {"arms": len(arms), "data": len(arms) + len(pairs)}
    checked |= dict.fromkeys(OF_A_COMPARISON, len(pairs))
    limits = [*limits_of(study, trainings), *(f"{remark.text}." for remark in alike)]
    return Audit(checked, list(dict.fromkeys(remarks)), limits)


# --- a training -------------------------------------------------------------------------------


def hooks(result: Result) -> Iterator[str]:
    """Where other layers were shaped than the switches name, or not once in each of their calls."""
    training = result.training
    method = method_of_record(training)
    try:
        expected = list(method.layer_names(config_of(training)))
        shapes = output_shapes(training.switches["model"], training.switches["image_size"])
    except BadInput:  # a network that is not installed here
        return
    if method.name != training.mode:  # nor is its method
        return
    if training.layers != expected:
        names = ", ".join(training.layers) or "nothing"
        yield f"shaped {names}; the switches name {', '.join(expected) or 'nothing'}"
        return
    for row in result.rows:
        for name in expected:
            if row.fired.get(name) != row.passes * len(shapes[name]):
                yield (
                    f"epoch {row.epoch}: {name} was shaped {row.fired.get(name)} times in "
                    f"{row.passes} passes of {counted(len(shapes[name]), 'call')}"
                )


def of_training(result: Result) -> Iterator[Remark]:
    """What must be known of a training, and is no fault of its record."""
    name, training, rows = result.folder.name, result.training, result.rows
    for epoch, what in resumptions(rows):
        yield Remark("code", name, f"from epoch {epoch} on {what}", False)
    if training.skipped > MANY_SKIPPED * training.updates:
        share = percent(training.skipped, training.updates)
        what = f"float16 skipped {training.skipped} of {training.updates} updates ({share:.1f} %)"
        yield Remark("steps", name, what, False)
    for layer in training.density:
        for density, words in ((0.0, "passed nothing on"), (1.0, "passed everything on")):
            epochs = [row.epoch for row in rows if row.density.get(layer) == density]
            if epochs and method_of_record(training).uses_target:
                what = f"the recorded map after {layer} {words} in {counted(len(epochs), 'epoch')}"
                yield Remark("maps", name, f"{what}, first in epoch {epochs[0]}", False)


def resumptions(rows: Sequence[Row]) -> Iterator[tuple[int, str]]:
    """The epochs from which on other code, versions or another device trained, and what differs."""
    for before, after in itertools.pairwise(rows):
        if before.versions != after.versions:
            different = switches.differences(before.versions, after.versions)
            yield after.epoch, ", ".join(different.values())


# --- several trainings ------------------------------------------------------------------------


def losses(result: Result) -> tuple:
    """What the epochs of two trainings share by no chance, if they have two epochs."""
    return tuple((row.train_loss, row.source_train_correct) for row in result.rows)


def copies(results: Iterable[Result]) -> Iterator[Remark]:
    """Where a training or a test has what belongs to another.

    A run has one key. Equal losses, weights or predictions of another seed or source are copied:
    of the same ones they may be equal, if what sets two arms apart has no effect.
    """
    owners: dict[tuple, Result] = {}
    for result in results:
        training = result.training
        parts = {
            "weights_digest": training.weights_digest,
            "losses in every epoch": losses(result) if len(result.rows) > 1 else None,
            "predictions": (result.evaluation.domain, result.evaluation.predictions),
        }
        first = owners.setdefault(("run", training.run), result)
        if first.training.key != training.key:
            what = f"run {training.run[:8]} is also that of {first.folder.name}"
            yield Remark("copies", result.folder.name, what, True)
        for name, value in parts.items():
            first = owners.setdefault((name, value), result)
            differ = stream_of(first) != stream_of(result)
            if value is not None and differ:
                what = f"{name} equal to {first.folder.name}, which has {stream_of(first)}"
                yield Remark("copies", result.folder.name, f"{stream_of(result)}: {what}", True)


def stream_of(result: Result) -> str:
    """What makes every training another one, whatever its other switches."""
    return f"seed {result.training.seed}, source {result.training.source}"


def alike_arms(study: Study) -> list[Remark]:
    """Arms whose trainings of one seed have equal losses: what sets them apart had no effect there."""
    groups: dict[tuple, dict[str, str]] = {}  # of each the arms with the keys of their trainings
    seen: set[Path] = set()
    for arm in (arm for table in study.tables for arm in table.arms):
        for result in arm.results.values():
            if result.folder not in seen:  # a training belongs to the first of its arms
                seen.add(result.folder)
                group = groups.setdefault((stream_of(result), losses(result)), {})
                group.setdefault(arm.name, result.training.key)
    sets = Counter(tuple(group) for group in groups.values() if len(set(group.values())) > 1)
    return [
        Remark(
            "copies",
            " and ".join(names),
            f"equal losses in every epoch, to the bit, for {n} of their seeds and sources: what sets "
            "these arms apart did not change how the source was learned",
            False,
        )
        for names, n in sets.items()
    ]


def repeats(trainings: Iterable[Result]) -> Iterator[Remark]:
    """Where a training of the same key has other losses than another on the same machine.

    On a GPU, or from a tree with uncommitted changes, they may have.
    """
    known: dict[tuple, Result] = {}
    for result in trainings:
        training = result.training
        if any(row.versions != training.versions for row in result.rows):
            continue
        places = {name: training.places.get(name) for name in COMPUTED}
        machine = json.dumps([training.versions, places], sort_keys=True)
        first = known.setdefault((training.key, machine), result)
        if losses(first) != losses(result):
            same = str(places["device"]).startswith("cpu") and not is_dirty(training.versions)
            what = f"{first.folder.name} has the same key, versions and device, and other losses"
            yield Remark("repeats", result.folder.name, what, same)


def other_images(results: Iterable[Result]) -> Iterator[Remark]:
    """Where images of one digest have other counts or classes. Another data set may name more."""
    known: dict[str, tuple[Result, dict[str, Any]]] = {}
    for result in results:
        training, test = result.training, result.evaluation
        read = {name: (data.digest, data.counts) for name, data in training.domains.items()}
        for digest, counts in (read | {test.domain: (test.digest, test.counts)}).values():
            facts = {"data": training.data, "counts": counts, "classes": training.classes}
            first, theirs = known.setdefault(digest, (result, facts))
            if facts != theirs:
                different = ", ".join(switches.differences(theirs, facts).values())
                what = f"the same images as in {first.name}: {different}"
                yield Remark("data", result.name, what, facts["data"] == theirs["data"])


def tested_elsewhere(results: Iterable[Result]) -> Iterator[Remark]:
    """Tests by another code, versions or device than the training."""
    for result in results:
        different = switches.differences(result.training.versions, result.evaluation.versions)
        if different:
            what = f"tested with {', '.join(different.values())}"
            yield Remark("code", result.name, what, False)


# --- limits of all figures --------------------------------------------------------------------


def limits_of(study: Study, trainings: Sequence[Result]) -> Iterator[str]:
    """What computed the figures, where that is not one commit on one machine; skipped updates."""
    computed: dict[str, list[Versions]] = {r.folder.name: [] for r in trainings}
    for result in trainings:
        computed[result.folder.name] += distinct(row.versions for row in result.rows)
    for result in study.results.values():
        computed[result.folder.name].append(result.evaluation.versions)
    for name in dict.fromkeys(n for all_ in computed.values() for v in all_ for n in v):
        counts = Counter(
            value
            for versions in computed.values()
            for value in dict.fromkeys(short_version(name, v.get(name)) for v in versions)
        )
        if len(counts) > 1:
            listing = ", ".join(f"{value} in {n}" for value, n in counts.most_common())
            yield f"Not all was computed with one {name}: {listing} of {counted(len(trainings), 'training')}."
    dirty = sum(any(map(is_dirty, versions)) for versions in computed.values())
    if dirty:
        yield (
            f"{dirty} of {counted(len(trainings), 'training')} ran with uncommitted changes "
            '("-dirty"): no commit holds their code.'
        )
    yield from resumed(trainings)
    yield from skipped(trainings)


def resumed(trainings: Iterable[Result]) -> Iterator[str]:
    """The trainings that went on with another code, versions or device, and from which epoch."""
    lines = []
    for result in trainings:
        epochs = " and ".join(str(epoch) for epoch, _ in resumptions(result.rows))
        lines += [f"{result.folder.name} from epoch {epochs} on"] if epochs else []
    if lines:
        yield f"Resumed with other versions: {some(lines)}."


def skipped(trainings: Sequence[Result]) -> Iterator[str]:
    """The updates that float16 skipped: those of all trainings, and trainings with many."""
    all_ = sum(result.training.updates for result in trainings)
    lost = {r.folder.name: (r.training.skipped, r.training.updates) for r in trainings}
    lost = {name: parts for name, parts in lost.items() if parts[0]}
    if not lost:
        return
    n = sum(part for part, _ in lost.values())
    yield (
        f"float16 skipped {n} of {counted(all_, 'update')} ({percent(n, all_):.2g} %), in {len(lost)} "
        f"of {counted(len(trainings), 'training')}."
    )
    many = [
        f"{name} {percent(part, whole):.1f} %"
        for name, (part, whole) in lost.items()
        if part > MANY_SKIPPED * whole
    ]
    if many:
        yield f"Trainings that skipped more than {share_text(MANY_SKIPPED)} of their updates: {some(many)}."


def some(texts: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = len(texts) - SHOWN
    return "; ".join(texts[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def distinct(versions: Iterable[Versions]) -> list[Versions]:
    """Versions that differ from those before them."""
    different: list[Versions] = []
    for one in versions:
        if not different or one != different[-1]:
            different.append(one)
    return different


def short_version(name: str, value: Any) -> str:
    """A version in words; of a commit twelve digits, and whether it is dirty."""
    text = switches.words(value)
    digits, dash, dirty = text.partition("-")
    return digits[:12] + dash + dirty if name == "commit" else text


def is_dirty(versions: Versions) -> bool:
    """Whether files differed from the commit that ran."""
    return str(versions.get("commit")).endswith("-dirty")


# --- several results --------------------------------------------------------------------------


def uniform(arm: Arm) -> Iterator[Remark]:
    """What is not the same in all results of an arm."""
    first = arm.one
    values = switches.all_values(first)
    of_source: dict[str, Result] = {}
    of_domain: dict[str, tuple[str, Result]] = {}
    for result in arm.results.values():

        def remark(rule: str, what: str, other: Result, here: Result = result) -> Remark:
            return Remark(rule, arm.name, f"{other.name} and {here.name}: {what}", True)

        if result is not first:
            different = switches.differences(values, switches.all_values(result)).values()
            for what in [*different, *other_weights(first, result)]:
                yield remark("arms", what, first)
        # epochs of another source are another number of updates
        alike = of_source.setdefault(result.training.source, result)
        before, after = alike.training.updates, result.training.updates
        if before != after:
            yield remark("arms", f"updates {before} -> {after}", alike)
        for domain, digest in images_of(result).items():
            known, other = of_domain.setdefault(domain, (digest, result))
            if known != digest:
                yield remark("data", f"{domain} {known[:12]} -> {digest[:12]}", other)
    for name in sorted({name for r in arm.results.values() for name in r.training.versions}):
        counts = Counter(
            switches.words(r.training.versions.get(name)) for r in arm.results.values()
        )
        if len(counts) > 1:
            what = ", ".join(f"{value} in {n}" for value, n in counts.items())
            yield Remark("arms", arm.name, f"{name} {what} of {len(arm.results)} results", False)


def images_of(result: Result) -> dict[str, str]:
    """Digests of the images that a result read, by domain."""
    trained = {name: data.digest for name, data in result.training.domains.items()}
    return trained | {result.evaluation.domain: result.evaluation.digest}


def other_weights(a: Result, b: Result) -> list[str]:
    x, y = (str(result.training.weights.sha256)[:12] for result in (a, b))
    return [f"weights sha256 {x} -> {y}"] if x != y else []


def comparable(arm: Result, reference: Result, study: Study) -> Iterator[Remark]:
    """What stands in the way of a comparison of two results."""

    def stated(*names: str) -> bool:
        """Whether the suite itself gives the two arms different values of one of the switches."""
        if study.switches is None:  # nobody planned this comparison
            return True
        a, b = (study.switches.get(result.folder.name, {}) for result in (reference, arm))
        return any(switches.plain(n, a.get(n)) != switches.plain(n, b.get(n)) for n in names)

    different = switches.differences(switches.other_values(reference), switches.other_values(arm))
    for name, what in different.items():
        yield Remark("confounds", "", what, not stated(name))
    yield from other_statistics(arm, reference)
    before, after = reference.training.updates, arm.training.updates
    if before != after and reference.training.source == arm.training.source:
        what = f"updates {before} -> {after}"
        yield Remark("updates", "", what, not stated("epochs", "updates"))
    for what in other_weights(reference, arm):
        yield Remark("weights", "", what, not stated("weights"))
    a, b = images_of(reference), images_of(arm)
    for domain in (name for name in a if name in b and a[name] != b[name]):
        what = f"{domain} {a[domain][:12]} -> {b[domain][:12]}"
        yield Remark("data", "", what, not stated("limit", "data"))
    different = switches.differences(reference.training.versions, arm.training.versions)
    for _, what in sorted(different.items()):
        yield Remark("code", "", what, False)


def other_statistics(arm: Result, reference: Result) -> Iterator[Remark]:
    """Other BatchNorm statistics while testing, beside another difference of the arms.

    Alone they are what is compared, and for AdaBN they are the method. Beside another difference they
    have their own part in the figure.
    """
    different = switches.differences(switches.method_values(reference), switches.method_values(arm))
    owned = any("bn_at_test" in switches.method_of(r).defaults for r in (arm, reference))
    if not owned and len(different) > 1 and "bn_at_test" in different:
        yield Remark("confounds", "", different["bn_at_test"], False)


# --- in words ---------------------------------------------------------------------------------


def lines(study: Study, result: Audit) -> list[str]:
    """The audit in words."""
    text = []
    for rule, asks in RULES.items():
        mine = [r for r in result.remarks if r.rule == rule]
        failed = sum(r.fails for r in mine)
        outcome = f"FAILS {failed}" if failed else "passes"
        text.append(f"{rule:10} {outcome:9} {result.checked[rule]:4} checked  {asks}")
        text += [f"    {'FAILED' if r.fails else 'note'}: {r.text}" for r in mine]
    text += [
        f"set aside  {problem.kind}: {problem.name}: {problem.lines[0]}"
        for problem in study.problems
        if not problem.fails
    ]
    text += [f"set aside  {name}: {why}" for name, why in study.strays.items()]
    verdict = "passes" if result.passes else f"FAILS: {len(result.failures)} failures"
    text.append(f"{study.folder}: {len(study.results)} records; the audit {verdict}")
    return text
