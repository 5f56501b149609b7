"""From the records in a suite's folder to its tables: arms, what is there of each, what is missing.

Everything comes from the folders of the trainings and from suite.json beside them. Without suite.json
the evaluations are grouped by their switches, and nobody knows what was planned.

A record that cannot be relied on never enters a table. It is a `Problem`, and the tables show a gap in
its place.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainshift import files
from domainshift.config import Test
from domainshift.errors import RecordError, SuiteError
from domainshift.methods import Method
from domainshift.records.results import Result, evaluation_names, read_record
from domainshift.records.schema import (
    CONFIG,
    FAILURE,
    SUITE,
    TRAINING,
    ClaimIndex,
    SuiteIndex,
)
from domainshift.records.validate import Problem, read_result
from domainshift.report import switches
from domainshift.report.checked import check

Key = tuple[str, str, int]  # source, target, seed
Pair = tuple[str, str]  # source, target


# --- tables -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train and test, over domains and seeds."""

    name: str
    planned: Mapping[Key, str]  # names of results
    results: Mapping[Key, Result]  # the finished ones of these

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        return list(dict.fromkeys((source, target) for source, target, _ in self.planned))

    def seeds(self, pair: Pair) -> list[int]:
        """Seeds that are planned for a source-target pair, in order."""
        return sorted(seed for *domains, seed in self.planned if tuple(domains) == pair)

    def of(self, pair: Pair) -> list[Result]:
        """The results of a source-target pair, by seed."""
        keys = ((*pair, seed) for seed in self.seeds(pair))
        return [self.results[key] for key in keys if key in self.results]

    def training(self, key: Key) -> str:
        """The folder of the training that a planned result is a test of."""
        return self.planned[key].rpartition("/")[0]

    @property
    def one(self) -> Result | None:
        """Any result, for the switches that all of them share."""
        return next(iter(self.results.values()), None)


@dataclass(frozen=True, eq=False)
class Table:
    name: str
    title: str
    arms: Sequence[Arm]
    note: str | None = None
    published: Sequence[str] = ()  # notes of the published rows it repeats
    baseline: Arm | None = None  # may be an arm of another table
    compare: Sequence[tuple[Arm, Arm]] = ()  # (arm, reference) that the suite names; of any table

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        return list(dict.fromkeys(pair for arm in self.arms for pair in arm.pairs))

    @functools.cached_property
    def compared(self) -> list[Arm]:
        """The baseline first, then the table's other arms."""
        if self.baseline is None:
            return list(self.arms)
        return [self.baseline, *(arm for arm in self.arms if arm.name != self.baseline.name)]


@dataclass(frozen=True, eq=False)
class Study:
    """Everything in a suite's folder. A result is called by its training's folder and its test."""

    folder: Path
    name: str
    title: str
    tables: Sequence[Table]
    results: Mapping[str, Result]  # by name
    problems: Sequence[Problem]
    planned: Sequence[str]  # names of results
    strays: Mapping[str, str] = field(default_factory=dict)  # finished, in no table -> why
    failed: Mapping[str, Sequence[str]] = field(default_factory=dict)  # training -> its last lines
    primary: Sequence[tuple[Arm, Arm]] = ()  # (arm, reference) that get verdicts
    margin: float | None = None  # points within which their arms pass for equal
    claims: Mapping[str, ClaimIndex] = field(default_factory=dict)  # published ones, by number
    profile: str | None = None
    command: str | None = None
    switches: Mapping[str, Mapping[str, Any]] | None = None  # that the suite gives each training

    @functools.cached_property
    def arms(self) -> dict[str, Arm]:
        """Every arm by name, with what all tables have of it."""
        by_name: dict[str, list[Arm]] = {}
        for arm in (arm for table in self.tables for arm in table.arms):
            by_name.setdefault(arm.name, []).append(arm)
        return {name: merged(same) for name, same in by_name.items()}

    @functools.cached_property
    def sources(self) -> set[str]:
        return {source for table in self.tables for source, _ in table.pairs}

    def called(self, pair: Pair) -> str:
        """A pair in words: its target, and its source too where the suite has several."""
        return pair[1] if len(self.sources) < 2 else " to ".join(pair)

    @functools.cached_property
    def missing(self) -> list[str]:
        """Planned results of which there is no record to use, whatever the reason."""
        return [name for name in self.planned if name not in self.results]

    @functools.cached_property
    def used(self) -> list[Result]:
        """The results that tables have."""
        return [result for name, result in self.results.items() if name not in self.strays]


def read_study(folder: Path) -> Study:
    """All records below `folder`, in their tables. Raises SuiteError, also for a suite.json at fault."""
    if not folder.is_dir():
        raise SuiteError(f"{folder} is no folder; the folder of a suite is needed")
    if (folder / SUITE).exists():
        try:
            index = read_record(folder / SUITE, SuiteIndex)
        except RecordError as error:
            raise SuiteError(" ".join(str(error).split())) from None
        check(index)
        return planned_study(folder, index)
    results, problems = records(folder)
    results = {name: r for name, r in results.items() if is_of_target(r)}
    if not results and not problems:
        raise SuiteError(f"{folder} holds neither {SUITE} nor the record of a run")
    table, strays = grouped(list(results.values()))
    planned = [name for name in results if name not in strays]
    title = "Results by their switches"
    return Study(folder, folder.name, title, [table] if results else [], results, problems, planned,
                 strays)  # fmt: skip


def records(folder: Path) -> tuple[dict[str, Result], list[Problem]]:
    """Every evaluation in the folders of `folder`, by name, and what cannot be used."""
    entries: list[Result | Problem] = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = evaluation_names(path)
        entries += [read_result(path, name) for name in names]
        if not names and begun(path):
            entries.append(Problem(path.name, "unfinished", ["not tested to the end"]))
    results = {entry.name: entry for entry in entries if isinstance(entry, Result)}
    return results, [entry for entry in entries if isinstance(entry, Problem)]


def begun(training: Path) -> bool:
    return any((training / part).exists() for part in (CONFIG, TRAINING))


def is_of_target(result: Result) -> bool:
    """Whether it tests another domain; tests of the source stand beside such a one."""
    return result.evaluation.images == "all" and result.evaluation.domain != result.training.source


# --- with suite.json --------------------------------------------------------------------------


def planned_study(folder: Path, index: SuiteIndex) -> Study:
    cells: dict[str, list[Any]] = {}
    for table in index.tables:
        for arm in table.arms:
            for cell in arm.cells:
                cells.setdefault(f"{cell.training}/{cell.test}", []).append(cell)
    extra = {f"{name}/{test.name}" for name, t in index.trainings.items() for test in t.tests}
    results, problems = records(folder)
    for name in [name for name in results if name in cells]:
        if lines := misplaced(results[name], cells[name], index):
            del results[name]
            problems.append(Problem(name, "another run", lines))
    results = {name: r for name, r in results.items() if name in cells or is_of_target(r)}
    # a fault in a test of the source is one of the planned results beside it
    apart = {*extra, *index.trainings} - {*cells}
    problems = [problem for problem in problems if problem.name not in apart]
    failed = failures(folder, index, results)
    known = {*results, *(problem.name for problem in problems)}
    for name in (name for name in cells if name not in known):
        training = name.partition("/")[0]
        if training not in failed and begun(folder / training):
            trained = (folder / training / TRAINING).exists()
            line = "not tested yet" if trained else "not trained to the end"
            problems.append(Problem(name, "unfinished", [line]))
    reasons = {True: f"no table of {SUITE} has it", False: f"{SUITE} does not have it"}
    strays = {n: f"finished, but {reasons[n in extra]}" for n in results if n not in cells}
    tables, primary = indexed(index, results)
    return Study(
        folder, index.suite, index.title, tables, results, problems, list(cells), strays, failed,
        primary=primary, margin=index.margin, claims=index.claims, profile=index.profile,
        command=index.command,
        switches={name: training.switches for name, training in index.trainings.items()},
    )  # fmt: skip


def failures(
    folder: Path, index: SuiteIndex, results: Mapping[str, Result]
) -> dict[str, Sequence[str]]:
    """The last lines of every training that failed and that lacks a planned result."""
    lacking = dict.fromkeys(
        c.training for t in index.tables for a in t.arms for c in a.cells
        if f"{c.training}/{c.test}" not in results
    )  # fmt: skip
    lines = {}
    for name in lacking:
        try:
            lines[name] = list(files.read_json(folder / name / FAILURE)["lines"])
        except (RecordError, LookupError, TypeError):  # no failure, or no word of it
            continue
    return lines


def misplaced(result: Result, cells: Sequence[Any], index: SuiteIndex) -> list[str]:
    """How a record that is whole differs from the one that suite.json has under its name."""
    training, planned = result.training, index.trainings.get(result.folder.name)
    lines = []
    if planned is None:
        lines.append(f"{SUITE} has no such training")
    elif planned.key != training.key:
        pairs = [(n, training.switches.get(n, v), v) for n, v in planned.switches.items()]
        lines += [
            f"{n} is {ours!r}; {SUITE} has {theirs!r}"
            for n, ours, theirs in pairs
            if n != "mode"  # which may share another's training
            and switches.plain(n, ours) != switches.plain(n, theirs)
        ] or [f"its key is {training.key[:12]}; {SUITE} has {planned.key[:12]}"]  # fmt: skip
    test = result.evaluation
    name = Test(domain=test.domain, images=test.images, at_eval=test.at_eval, bn=test.bn).name
    for cell in cells:
        ours = (*result.key, name)
        theirs = (cell.source, cell.target, cell.seed, cell.test)
        for n, a, b in zip(("source", "target", "seed", "test"), ours, theirs, strict=True):
            lines += [f"{n} is {a!r}; {SUITE} has {b!r}"] if a != b else []
    return list(dict.fromkeys(lines))


def indexed(
    index: SuiteIndex, results: Mapping[str, Result]
) -> tuple[list[Table], list[tuple[Arm, Arm]]]:
    """The tables of suite.json, and its primary comparisons.

    Each of these is also a comparison of the first table that has its arm.
    """
    arms: dict[tuple[str, str], Arm] = {}
    by_name: dict[str, list[Arm]] = {}
    for table in index.tables:
        for arm in table.arms:
            planned = {(c.source, c.target, c.seed): f"{c.training}/{c.test}" for c in arm.cells}
            done = {key: results[name] for key, name in planned.items() if name in results}
            arms[table.name, arm.name] = Arm(arm.name, planned, done)
            by_name.setdefault(arm.name, []).append(arms[table.name, arm.name])
    whole = {name: merged(same) for name, same in by_name.items()}
    tables, left = [], list(index.primary)
    for table in index.tables:
        own = {arm.name: arms[table.name, arm.name] for arm in table.arms}
        first = [pair for pair in left if pair[0] in own]
        left = [pair for pair in left if pair not in first]
        baseline = None if table.baseline is None else whole[table.baseline]
        compare = [
            (own.get(a) or whole[a], own.get(b) or whole[b])
            for a, b in dict.fromkeys([*first, *table.compare])
        ]
        tables.append(Table(table.name, table.title, list(own.values()), table.note,
                            table.published, baseline, compare))  # fmt: skip
    return tables, [(whole[a], whole[b]) for a, b in index.primary]


def merged(arms: Sequence[Arm]) -> Arm:
    """One arm of what several tables have of it."""
    planned = {key: name for arm in arms for key, name in arm.planned.items()}
    return Arm(arms[0].name, planned, {k: r for arm in arms for k, r in arm.results.items()})


# --- without ----------------------------------------------------------------------------------


def grouped(results: Sequence[Result]) -> tuple[Table, dict[str, str]]:
    """One table of results that no suite describes: an arm is what differs in seed and domains.

    Also the results that are not in it, with the reason: another has the same switches, domains and
    seed.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        key = json.dumps(switches.all_values(result), sort_keys=True)
        groups.setdefault(key, []).append(result)
    contents = [json.loads(key) for key in groups]
    names = dict.fromkeys(name for values in contents for name in values if name != "mode")
    varying = [n for n in names if len({json.dumps(v.get(n)) for v in contents}) > 1]
    arms, strays = [], {}
    for values, group in zip(contents, groups.values(), strict=True):
        first: dict[Key, Result] = {}
        for result in group:
            if (same := first.setdefault(result.key, result)) is not result:
                strays[result.name] = (
                    f"finished, but {same.name} has its switches, domains and seed"
                )
        method = switches.method_of(group[0])
        own = [n for n in varying if n in values and values[n] != switches.default_of(method, n)]
        name = ", ".join([values["mode"], *(f"{n} {switches.words(values[n])}" for n in own)])
        arms.append(Arm(name, {key: r.name for key, r in first.items()}, first))
    baselines = [arm for arm in arms if switches.mode_of(arm.one) == Method.name]
    baseline = baselines[0] if len(baselines) == 1 else None
    return Table("all", "All results, by their switches", arms, baseline=baseline), strays
