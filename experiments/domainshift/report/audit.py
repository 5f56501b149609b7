"""Check the records of a suite: each by itself, and whether arms that are compared may be.

What a record shows by itself, `domainshift.records.validate` finds when it is read: a record that was
edited or that breaks a rule is in no table. Here come the rules that need the network or several
records. An audit that fails says which results fail which rule.

No record can show that training saw no target label. A method has no argument through which one could
come, and the record shows that as many labelled images were trained on as the source has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from domainshift.errors import BadInput
from domainshift.models import output_shapes
from domainshift.records.results import Result
from domainshift.records.validate import config_of, method_of_record
from domainshift.report import switches
from domainshift.report.comparisons import Matchups, counted, place
from domainshift.report.study import Arm, Study

# In the order of the report: what a rule asks of a result, or of two arms that are compared.
RULES = {
    "record": "sealed and unedited; all figures follow from the epochs and the predictions",
    "length": "as many epochs, updates and passes as the switches say",
    "k of n": "tested on every image of the target",
    "hooks": "the layers that the switches name were shaped in every training pass, once a call",
    "labels": "labelled training images are the source's, less those held out; no target is the source",
    "BatchNorm": "statistics untouched by target images where the switches promise it",
    "arms": "the results of an arm differ in domains and seed alone",
    "data": "results that are compared, or in one arm, read the same images of a domain",
    "updates": "arms that are compared had as many updates",
    "confounds": "arms that are compared differ in the switches of their method alone",
    "weights": "arms that are compared start from the same weights",
    "code": "arms that are compared ran on the same code, versions and kind of device",
}
OF_A_RECORD = ("length", "k of n", "hooks", "labels", "BatchNorm")
OF_A_COMPARISON = ("updates", "confounds", "weights", "code")
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
    checked: dict[str, int]  # rule -> how many results, arms or comparisons
    remarks: list[Remark]

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
    for result in {result.folder: result for result in study.results.values()}.values():
        remarks += [Remark("hooks", result.folder.name, what, True) for what in hooks(result)]
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
    checked |= {"arms": len(arms), "data": len(arms) + len(pairs)}
    checked |= dict.fromkeys(OF_A_COMPARISON, len(pairs))
    return Audit(checked, list(dict.fromkeys(remarks)))


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
