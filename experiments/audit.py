"""Check the records of a suite: each by itself, and whether arms that are compared may be.

    python experiments/audit.py runs/suites/report-b-full

What a record shows by itself record.py finds when it is read: one that was edited or breaks a rule is
in no table. Here come the layers, found a second time, and what a study needs besides. An audit that
fails says which runs fail which rule, and the exit status is 1.

What no record can show is that code in training saw no target label: methods.py has no argument
through which one could come. The record shows that as many images were trained on with labels as the
source has.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from config import plain
from model import bare_model
from study import (
    CONFOUNDS,
    METHOD,
    Arm,
    Run,
    Study,
    StudyError,
    differences,
    matchups,
    read_study,
    shown,
)
from torch import nn

FAILED, BAD_INPUT = 1, 2  # exit statuses

KINDS = {"conv": nn.Conv2d, "bn": nn.BatchNorm2d, "relu": nn.ReLU}

# In the order of the report. What a rule asks of a run, or of two arms that are compared.
RULES = {
    "record": "sealed and unedited; summary.json follows from config.yaml and metrics.jsonl",
    "length": "as many epochs, updates and passes as the switches say",
    "k of n": "tested on every image of the target, in every epoch",
    "hooks": "the layers that the switches name were shaped in every training pass, once a call",
    "labels": "labelled training images are the source's, less those held out; the target is no "
    "mask source",
    "BatchNorm": "statistics untouched by target images where the switches promise it",
    "arms": "the runs of an arm differ in domains and seed alone",
    "updates": "arms that are compared had as many updates",
    "confounds": "arms that are compared differ in the switches of their method alone",
    "weights": "arms that are compared start from the same weights",
    "code": "arms that are compared ran on the same code, versions and kind of device",
}
# Rules of a run by itself, which every sealed record is held to.
OF_A_RUN = ("length", "k of n", "hooks", "labels", "BatchNorm")


class Remark(NamedTuple):
    """What an audit has to say of a run or of a comparison."""

    rule: str
    where: str
    what: str
    fails: bool  # False: to be known, and shown with the figures it concerns


class Audit(NamedTuple):
    checked: dict[str, int]  # rule -> how many runs or comparisons
    remarks: list[Remark]

    @property
    def failures(self) -> list[Remark]:
        return [remark for remark in self.remarks if remark.fails]

    @property
    def passes(self) -> bool:
        return not self.failures


def audit(study: Study) -> Audit:
    """Apply every rule to every record and comparison of a study."""
    remarks = [
        Remark(rule, problem.name, line, True)
        for problem in study.problems
        if problem.fails
        for rule, line in zip(
            problem.rules or ["record"] * len(problem.lines), problem.lines, strict=True
        )
    ]
    for name, run in study.runs.items():
        remarks += [Remark("hooks", name, what, True) for what in hooks(run)]
    arms = {(t.name, a.name): a for t in study.tables for a in t.arms if a.runs}
    for arm in arms.values():
        remarks += uniform(arm)
    pairs = [(table.name, *pair) for table in study.tables for pair in matchups(table)]
    for table, arm, reference in pairs:
        where = f"{table}: {arm.name} and {reference.name}"
        both = [(arm.runs[key], reference.runs[key]) for key in arm.runs if key in reference.runs]
        both = both or [(arm.one, reference.one)]  # the switches can be told already
        told = Counter(remark for runs in both for remark in comparable(*runs, study))
        for remark, n in told.items():
            share = "" if n == len(both) else f" (in {n} of {len(both)} pairs of runs)"
            remarks.append(remark._replace(where=where, what=remark.what + share))
    kinds = Counter(problem.kind for problem in study.problems if problem.fails)
    whole = len(study.runs) + kinds["broken rule"]
    checked = {"record": len(study.runs) + kinds.total()} | dict.fromkeys(OF_A_RUN, whole)
    checked |= {"arms": len(arms)}
    checked |= dict.fromkeys(("updates", "confounds", "weights", "code"), len(pairs))
    return Audit(checked, list(dict.fromkeys(remarks)))


# --- a run ------------------------------------------------------------------------------------


@functools.cache
def modules() -> dict[str, nn.Module]:
    """The modules of a ResNet-18, by name; without weights."""
    return dict(bare_model().named_modules())


def conv_number(layer: str) -> int | None:
    """The reports' number of a convolution, from 1; None for another module."""
    convs = [name for name, module in modules().items() if isinstance(module, nn.Conv2d)]
    return convs.index(layer) + 1 if layer in convs else None


def layers_of(run: Run) -> list[str]:
    """The layers that the switches of a run name, found without the code that shaped them."""
    config = run.config
    if not config["apply_maps"]:
        return []
    of_kind = [n for n, m in modules().items() if isinstance(m, KINDS[config["after"]])]
    found: list[str] = []
    for entry in config["layers"]:
        if isinstance(entry, int):
            found.append(of_kind[entry - 1])
        elif entry in modules():
            found.append(entry)
        else:
            pattern = "*" if entry == "all" else entry
            found += [name for name in of_kind if fnmatch.fnmatchcase(name, pattern)]
    return found[config["every"] - 1 :: config["every"]]


def hooks(run: Run) -> Iterator[str]:
    expected = layers_of(run)
    if list(run.layers) != expected:
        yield f"shaped {', '.join(run.layers) or 'nothing'}; the switches name {', '.join(expected)}"
        return
    for row in run.rows:
        for name in expected:
            # each block calls its one ReLU twice
            calls = 2 if name.endswith(".relu") else 1
            if row["fired"].get(name) != row["passes"] * calls:
                yield (
                    f"epoch {row['epoch']}: {name} was shaped {row['fired'].get(name)} times in "
                    f"{row['passes']} passes of {calls} {'call' if calls == 1 else 'calls'}"
                )


# --- several runs -----------------------------------------------------------------------------


def uniform(arm: Arm) -> Iterator[Remark]:
    """What is not the same in all runs of an arm."""
    first, *others = arm.runs.values()
    names = [n for n in first.config if n not in ("source", "target", "seed", "device", "out")]
    of_source = {run.config["source"]: run for run in reversed(arm.runs.values())}
    for run in others:
        different = differences(first, run, names) + other_weights(first, run)
        for what in different:
            where = f"{first.folder.name} and {run.folder.name}"
            yield Remark("arms", arm.name, f"{where}: {what}", True)
        # epochs of another source are another number of updates
        alike = of_source[run.config["source"]]
        before, after = alike.summary["updates"], run.summary["updates"]
        if before != after:
            where = f"{alike.folder.name} and {run.folder.name}"
            yield Remark("arms", arm.name, f"{where}: updates {before} -> {after}", True)
    for name in sorted({name for run in arm.runs.values() for name in run.summary["versions"]}):
        counts = Counter(shown(run.summary["versions"].get(name)) for run in arm.runs.values())
        if len(counts) > 1:
            what = ", ".join(f"{value} in {n}" for value, n in counts.items())
            yield Remark("arms", arm.name, f"{name} {what} of {len(arm.runs)} runs", False)


def other_weights(a: Run, b: Run) -> list[str]:
    x, y = (run.summary["weights"]["sha256"] for run in (a, b))
    return [f"weights sha256 {str(x)[:12]} -> {str(y)[:12]}"] if x != y else []


def comparable(arm: Run, reference: Run, study: Study) -> Iterator[Remark]:
    """What stands in the way of a comparison of two runs."""

    def remark(rule: str, what: str, fails: bool) -> Remark:
        return Remark(rule, "", what, fails)

    def stated(name: str) -> bool:
        """Whether the suite itself gives the two arms different values."""
        if study.said is None:  # nobody planned this comparison
            return True
        a, b = (study.said.get(run.folder.name, {}) for run in (reference, arm))
        return plain_or_none(name, a) != plain_or_none(name, b)

    for name in CONFOUNDS:
        for what in differences(reference, arm, [name]):
            yield remark("confounds", what, not stated(name))
    # a method where nothing else differs; beside another it has its own part in the difference
    recalibrated = differences(reference, arm, ["bn_recalibration"])
    if recalibrated and len(differences(reference, arm, METHOD)) > 1:
        yield remark("confounds", recalibrated[0], False)
    before, after = reference.summary["updates"], arm.summary["updates"]
    if before != after and reference.config["source"] == arm.config["source"]:
        explained = stated("epochs") or stated("updates")
        yield remark("updates", f"updates {before} -> {after}", not explained)
    for what in other_weights(reference, arm):
        yield remark("weights", what, not stated("weights"))
    a, b = (run.summary["versions"] for run in (reference, arm))
    for name in sorted({*a, *b}):
        if a.get(name) != b.get(name):
            yield remark("code", f"{name} {shown(a.get(name))} -> {shown(b.get(name))}", False)


def plain_or_none(name: str, switches: dict) -> object:
    return plain(name, switches[name]) if name in switches else None


# --- the command ------------------------------------------------------------------------------


def lines(study: Study, result: Audit) -> list[str]:
    """The audit in words."""
    text = []
    for rule, asks in RULES.items():
        mine = [r for r in result.remarks if r.rule == rule]
        failed = sum(r.fails for r in mine)
        word = f"FAILS {failed}" if failed else "passes"
        text.append(f"{rule:10} {word:9} {result.checked[rule]:4} checked  {asks}")
        text += [f"    {'FAILED' if r.fails else 'note'}: {r.where}: {r.what}" for r in mine]
    for problem in study.problems:
        if not problem.fails:
            text.append(f"set aside  {problem.kind}: {problem.name}: {problem.lines[0]}")
    text += [f"set aside  {name}: {why}" for name, why in study.strays.items()]
    verdict = "passes" if result.passes else f"FAILS: {len(result.failures)} failures"
    text.append(f"{study.folder}: {len(study.runs)} records; the audit {verdict}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 passes, 1 fails, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python experiments/audit.py FOLDER (of a suite)", file=sys.stderr)
        return BAD_INPUT
    try:
        study = read_study(Path(arguments[0]))
    except StudyError as error:
        print(f"audit.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    result = audit(study)
    print("\n".join(lines(study, result)))
    return 0 if result.passes else FAILED


if __name__ == "__main__":
    sys.exit(main())
