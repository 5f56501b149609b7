"""From a suite to its evaluations, and from these to the distinct trainings that serve them."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from domainshift.config import Config, Test, differing, preset_values
from domainshift.data import DataSet, open_data
from domainshift.errors import ConfigError, SuiteError
from domainshift.methods import METHODS, Method, load_method_file, method_named
from domainshift.records.claims import arms_of_claim
from domainshift.records.schema import ArmIndex, Cell, ClaimIndex, TableIndex
from domainshift.setup import Setup, default_data, set_up, targets_of_training, training_key
from domainshift.sweep.schema import Suite, Table

OWN = ("source", "target", "seed", "out")  # switches that an arm may not set


@dataclass
class Job:
    """One training, and all the tests that the suite asks of it.

    name: of its folder
    key: of `training_key`
    place: table and arm that asked for it first, for messages
    values: the switches that run.py would be given, as plain values
    setup: what they come to, resolved on the CPU of this machine
    tests: the first target's first
    """

    name: str
    key: str
    place: str
    values: dict[str, Any]
    setup: Setup
    tests: list[Test] = field(default_factory=list)


class Plan(NamedTuple):
    tables: list[TableIndex]
    jobs: list[Job]  # all of the first seed, then all of the second, ...
    warnings: list[str]

    def evaluations(self, jobs: Sequence[Job]) -> set[tuple[str, str]]:
        """(training, test) of each evaluation that tables ask of these trainings."""
        names = {job.name for job in jobs}
        cells = (cell for table in self.tables for arm in table.arms for cell in arm.cells)
        return {(cell.training, cell.test) for cell in cells if cell.training in names}


# --- arms -------------------------------------------------------------------------------------


def arms_of(place: str, table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and switches of each arm of a table."""
    for name, switches in table.arms.items():
        yield name, table.switches | switches
    if (table.grid is None) != (table.name is None):
        raise SuiteError(f"{place}: 'grid' and 'name' are given together or not at all")
    if table.grid is not None:
        for values in itertools.product(*table.grid.values()):
            switches = dict(zip(table.grid, values, strict=True))
            yield grid_name(place, table.name, switches), table.switches | switches


def grid_name(place: str, name: str, switches: Mapping[str, Any]) -> str:
    """`name` with each {switch} replaced by its value; + joins the values of a list."""

    def value(match: re.Match) -> str:
        if match[1] not in switches:
            raise SuiteError(f"{place}: name {name!r}: {match[1]!r} is no switch of the grid")
        value = switches[match[1]]
        if isinstance(value, bool):
            return str(value).lower()
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    return re.sub(r"\{(\w+)\}", value, name)


def plain(switches: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in switches.items()}


def known_switches() -> list[str]:
    """Every switch of a run, whatever its method."""
    options = (name for method in METHODS.values() for name in method.Options.names())
    return list(dict.fromkeys([*Config.names(), *options]))


def arm_values(
    defaults: Mapping[str, Any], own: Mapping[str, Any], forced: Mapping[str, Any]
) -> tuple[dict[str, Any], type[Method]]:
    """The values of an arm, and its method. Raises ConfigError.

    Args:
        own: the switches of the arm and its table.
        defaults, forced: switches of all arms, each for the arms whose method has it.
    """
    values = {n: v for n, v in (defaults | own | forced).items() if v is not None}
    for name in OWN:
        if name in values:
            raise ConfigError(f"{name} is not for an arm: use sources, targets and seeds")
    if "method_file" in values:
        load_method_file(Path(values["method_file"]))
    method = method_named(str(values.get("mode", Config.model_fields["mode"].default)))
    having = {*Config.names(), *method.Options.names()}
    for name in {*defaults, *forced} - {*own} - having:
        if name not in known_switches():
            raise ConfigError(f"{name}: no method has such a switch")
        values.pop(name, None)
    return values, method


class Setups:
    """What values come to. Equal values with another seed are not resolved again."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.data: dict[tuple[Any, Any], DataSet] = {}
        self.known: dict[str, Setup] = {}

    def of(self, values: Mapping[str, Any], method: type[Method], seed: int) -> Setup:
        key = json.dumps(values, sort_keys=True, default=str)
        if key not in self.known:
            data = self.data_of(values)
            amp = {"amp": "float16"} if self.needs_amp(values, method, data) else {}
            given = {**values, **amp, "device": "cpu", "seed": seed}
            self.known[key] = set_up(given, data)
        setup = self.known[key]
        return setup._replace(config=setup.config.model_copy(update={"seed": seed}))

    def data_of(self, values: Mapping[str, Any]) -> DataSet:
        place = values.get("data") or default_data(), values.get("cache")
        if place not in self.data:
            self.data[place] = open_data(place[0], None if place[1] is None else Path(place[1]))
        return self.data[place]

    def needs_amp(self, values: Mapping[str, Any], method: type[Method], data: DataSet) -> bool:
        """Whether runs on a GPU, which this machine may not have, choose their precision."""
        preset = preset_values(
            values.get("preset", Config.model_fields["preset"].default), method.name
        )
        sources = (values, method.defaults, data.defaults, preset)
        stated = next((source["amp"] for source in sources if "amp" in source), "auto")
        return self.device == "cuda" and stated == "auto"


# --- the plan ---------------------------------------------------------------------------------


def cell_name(arm: str, source: str, target: str, seed: int) -> str:
    return f"{arm}-{source}-{target}-s{seed}"


def folder_name(arm: str, setup: Setup) -> str:
    """A training's folder: the arm, the domains that it trains on, and the seed."""
    config = setup.config
    targets = targets_of_training(setup)
    domains = [re.sub(r"[^\w.+-]", "_", name) for name in (config.source, *targets)]
    return "-".join([arm, *domains, f"s{config.seed}"])


def expand(suite: Suite, forced: Mapping[str, Any], device: str) -> Plan:
    """Every evaluation of a suite, as `in_profile` gives it, and the distinct trainings.

    Args:
        forced: switches of all arms, whatever the suite says.
        device: "cpu" or "cuda", the kind of device that trainings will be on. It need not be here.

    Raises SuiteError, whose message names the table, the arm and what is wrong with it, and other
    BadInput for data or weights that are not there.
    """
    planner = Planner(device)
    tables = []
    for name, table in suite.tables.items():
        spans = [getattr(table, n) or getattr(suite, n) for n in ("sources", "targets", "seeds")]
        arms: dict[str, ArmIndex] = {}
        for arm, switches in arms_of(f"table {name}", table):
            place = f"table {name}, arm {arm}"
            if not re.fullmatch(r"\w[\w.+-]*", arm, re.ASCII):
                raise SuiteError(
                    f"{place}: {arm!r} cannot name a folder; allowed: letters, digits, . _ + -"
                )
            try:
                values, method = arm_values(plain(suite.defaults), plain(switches), plain(forced))
                cells = [
                    planner.cell(place, arm, values, method, source, target, seed)
                    for source, target, seed in itertools.product(*spans)
                    if source != target
                ]
            except ConfigError as error:
                raise SuiteError(f"{place}: {error}") from None
            if arm in arms:
                raise SuiteError(f"{place}: two arms of this table have that name; allowed: one")
            arms[arm] = ArmIndex(name=arm, cells=cells)
        if not any(arm.cells for arm in arms.values()):
            raise SuiteError(
                f"table {name}: has no evaluations; it needs arms, and a source that is not the target"
            )
        tables.append(
            TableIndex(
                name=name,
                title=table.title,
                note=table.note,
                published=table.published or [],
                baseline=table.baseline,
                compare=table.compare or [],
                arms=list(arms.values()),
            )
        )
    check_arms(suite, tables)
    jobs = sorted(planner.jobs.values(), key=lambda job: job.setup.config.seed)
    return Plan(tables, jobs, list(planner.warnings))


def check_arms(suite: Suite, tables: Sequence[TableIndex]) -> None:
    """Raises SuiteError for a comparison or a claim with an arm that no table has."""
    known = {arm.name for table in tables for arm in table.arms}
    for name in itertools.chain(*suite.primary):
        if name not in known:
            raise SuiteError(f"primary: no arm {name!r}")
    tested = {cell.target for table in tables for arm in table.arms for cell in arm.cells}
    for number, claim in suite.claims.items():
        try:
            arms = arms_of_claim(ClaimIndex(**claim.given()))
        except ValidationError as error:
            words = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise SuiteError(f"claim {number}: {words}") from None
        for name in arms:
            if name not in known:
                raise SuiteError(f"claim {number}: no arm {name!r}")
        for target in {*(claim.targets or ())} - {*tested, *suite.targets}:
            raise SuiteError(f"claim {number}: no arm is tested on {target!r}")
    for table in tables:
        if table.baseline not in {None, *known}:
            raise SuiteError(f"table {table.name}: baseline: no arm {table.baseline!r}")
        for name in itertools.chain(*table.compare):
            if name not in known:
                raise SuiteError(f"table {table.name}: compare: no arm {name!r}")


class Planner:
    """Collects the trainings while a suite is expanded."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.setups = Setups(device)
        self.jobs: dict[str, Job] = {}  # by key
        self.names: dict[str, tuple[str, str, Setup]] = {}  # by name: what it is, where, setup
        self.warnings: dict[str, None] = {}

    def cell(
        self,
        place: str,
        arm: str,
        values: Mapping[str, Any],
        method: type[Method],
        source: str,
        target: str,
        seed: int,
    ) -> Cell:
        """One evaluation. Its training is added to the jobs, or the test to that training."""
        domains = {"source": source, "target": [target]}
        setup = self.setups.of({**values, **domains}, method, seed)
        self.warnings |= dict.fromkeys(setup.warnings)
        config, key, tests = setup.config, training_key(setup), setup.config.tests()
        evaluation = cell_name(arm, source, target, seed)
        self.claim("evaluations", evaluation, f"{key} {tests}", place, setup)
        if key not in self.jobs:
            name = folder_name(arm, setup)
            self.claim("trainings", name, key, place, setup)
            plain_values = config.as_dict()
            given = {n: plain_values[n] for n in {**values, **domains, "seed": 0, "data": 0}}
            given |= {"amp": config.amp, "device": self.device}
            self.jobs[key] = Job(name, key, place, given, setup)
        job = self.jobs[key]
        job.tests = list(dict.fromkeys([*job.tests, *tests]))
        if config.evaluate != job.setup.config.evaluate:
            test_oftener(job, config.evaluate)
        return Cell(source=source, target=target, seed=seed, training=job.name, test=tests[0].name)

    def claim(self, what: str, name: str, identity: str, place: str, setup: Setup) -> None:
        """Raises SuiteError where a name already stands for something else."""
        known, other_place, other = self.names.setdefault(
            f"{what} {name}", (identity, place, setup)
        )
        if known != identity:
            differences = differing(other.config.as_dict(), setup.config.as_dict())
            raise SuiteError(
                f"two {what} are called {name}: {other_place} and {place}; {'; '.join(differences)}"
            )


def test_oftener(job: Job, evaluate: str) -> None:
    """Let a training be tested after every epoch that one of its arms asks for."""
    asked = {evaluate, job.setup.config.evaluate} - {"last"}
    value = asked.pop() if len(asked) == 1 else "each"
    job.values["evaluate"] = value
    job.setup = job.setup._replace(config=job.setup.config.model_copy(update={"evaluate": value}))


# --- a part of it -----------------------------------------------------------------------------


def chosen(plan: Plan, pattern: str | None) -> list[Job]:
    """The trainings that --only names, by a table, an arm, an evaluation or a folder.

    A table comes with the arms that it is compared with. Raises SuiteError if nothing matches.
    """
    if pattern is None:
        return plan.jobs
    cells_of: dict[str, dict[tuple[str, str, int], str]] = {}  # trainings by arm and cell
    for table in plan.tables:
        for arm in table.arms:
            cells_of.setdefault(arm.name, {}).update({place_of(c): c.training for c in arm.cells})
    names = set()
    for table in plan.tables:
        whole = fnmatch.fnmatchcase(table.name, pattern)
        for arm in table.arms:
            for cell in arm.cells:
                evaluation = cell_name(arm.name, cell.source, cell.target, cell.seed)
                own = (arm.name, evaluation, cell.training)
                if whole or any(fnmatch.fnmatchcase(name, pattern) for name in own):
                    names.add(cell.training)
        if whole:
            places = {place_of(cell) for arm in table.arms for cell in arm.cells}
            for arm in {table.baseline, *itertools.chain(*table.compare)} - {None}:
                names |= {cells_of[arm][place] for place in places if place in cells_of[arm]}
    if not names:
        raise SuiteError(f"--only: no table, arm or training matches {pattern!r}")
    return [job for job in plan.jobs if job.name in names]


def place_of(cell: Cell) -> tuple[str, str, int]:
    return cell.source, cell.target, cell.seed
