"""Run a suite: all runs behind the tables of a study, from one yaml file, in one command.

    python experiments/suite.py report-b --profile mini --data data/PACS --jobs 2
    python experiments/suite.py study --dry-run

What is finished is skipped, what was killed is resumed, the rest is run: the same command
continues a suite at any time. Each run has a folder in --out (see run.py), and suite.json beside
them says which runs make up which table. The report needs nothing else.

A suite is a yaml file in experiments/suites:

    title, defaults     what it is; switches of all its runs
    sources, targets    domains; every pair of two different ones is run
    seeds               every arm is run with each
    tables              by name, each with `title` and some of: `note`, `published` (which rows of
                        published.csv it repeats: how their "source note" may begin), `baseline`
                        (the arm that others are compared with), `compare` (a list of [arm,
                        reference], compared besides; these too may be arms of other tables),
                        `switches` (of all its arms), `sources`, `targets` and `seeds` of its own,
                        and its arms, in one or both of two ways:
        arms            switches by name of the arm
        grid, name      values by switch, every combination of which is an arm, and its name, in
                        which {switch} stands for the value
    profiles            by name: `sources`, `targets`, `seeds` in place of those above; `defaults`
                        on top of them; `tables`: by name, keys to replace in a table

Of two values of a switch the later wins: defaults, the profile's, the table's, the arm's, --set.
null is no value: the switch is then as its preset has it. An arm has one name in all tables; runs
that are the same are run once.

suite.json has `format`, `suite`, `profile`, `title`, `command` and

    tables: [{name, title, note, published, baseline, compare,
              arms: [{name, runs: [{source, target, seed, run}]}]}]
    runs:   {name: {state, problem, switches}}

A `run` is the name of a folder. Its state is done, missing, or failed, and then `problem` is the
last lines that it printed.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import itertools
import os
import re
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import published
import record
import torch
import yaml
from config import SWITCHES, Config, ConfigError, differing, pick_device, resolve
from data import DataError, find_root
from methods import attach
from model import bare_model
from screen import Screen
from workers import LOG, Failure, Job, Local, Ray, WorkersError, slots

SUITES = Path(__file__).resolve().parent / "suites"
FORMAT = 1  # of suite.json
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit statuses

SPANS = ("sources", "targets", "seeds")
SUITE_KEYS = ("title", "defaults", *SPANS, "tables", "profiles")
TABLE_KEYS = ("title", "note", "published", "baseline", "compare", "switches", "arms", "grid", "name",
              *SPANS)  # fmt: skip
PROFILE_KEYS = ("defaults", *SPANS, "tables")
TEXTS = {"title": str, "name": str, "note": str | None, "baseline": str | None}
OWN = ("source", "target", "seed", "out")  # switches that an arm may not set

FAILURE = "failure.json"  # in the folder of a run that failed, until it is done

# What an estimate of time rests on where no run is finished: training images of 224 x 224 per
# second. Both are guesses. For a GPU: 30 epochs of art_painting, tested each, in about a minute.
GUESS = {"cuda": 1400.0, "cpu": 2.5}  # per GPU; per core
START_SECONDS = 10.0  # of a run that are not training or testing: imports, pictures; a guess too


class SuiteError(ValueError):
    """A suite, or what is in its folder, is not as it must be; the message names what."""


# --- the yaml file ----------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """Refuses a key that is there twice; of those yaml would keep the last and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise SuiteError(f"line {line}: {key!r} is not allowed as a key")
            if key in lines:
                raise SuiteError(f"{key!r} is there twice, in lines {lines[key]} and {line}")
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_suite(name: str) -> dict[str, Any]:
    """The suite called `name`, or in the yaml file of that path. Raises SuiteError."""
    known = {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}
    if name not in known and not name.endswith(".yaml"):
        raise SuiteError(f"no suite {name!r}; there are {', '.join(known)}, or a .yaml file")
    path = known.get(name, Path(name))
    try:
        suite = yaml.load(path.read_text(), Loader)
    except SuiteError as error:
        raise SuiteError(f"{path.name}: {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SuiteError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    check_keys(path.name, suite, SUITE_KEYS, needed=("title", *SPANS, "tables", "profiles"))
    for table, content in suite["tables"].items():
        check_keys(f"{path.name}: table {table}", content, TABLE_KEYS, needed=("title",))
    for profile, content in suite["profiles"].items():
        place = f"{path.name}: profile {profile}"
        check_keys(place, content, PROFILE_KEYS)
        for table, keys in content.get("tables", {}).items():
            if table not in suite["tables"]:
                tables = ", ".join(suite["tables"])
                raise SuiteError(f"{place}: no table {table!r}; there are {tables}")
            check_keys(f"{place}: table {table}", keys, TABLE_KEYS)
    return suite


def check_keys(place: str, mapping: Any, known: Sequence[str], needed: Sequence[str] = ()) -> None:
    if not isinstance(mapping, dict):
        raise SuiteError(f"{place}: {mapping!r} is not allowed; allowed: a mapping of keys")
    for key in mapping:
        if key not in known:
            raise SuiteError(f"{place}: unknown key {key!r}; allowed: {', '.join(known)}")
    for key in needed:
        if key not in mapping:
            raise SuiteError(f"{place}: the key {key!r} is missing")
    for key in set(SPANS) & set(mapping):
        values = mapping[key]
        if not isinstance(values, list) or not values or len(set(map(repr, values))) < len(values):
            raise SuiteError(f"{place}: {key}: {values!r} is not allowed; allowed: a list of "
                             "different values")  # fmt: skip
        kind = int if key == "seeds" else str
        if odd := [value for value in values if type(value) is not kind]:
            allowed = "whole numbers" if kind is int else "names of domains"
            raise SuiteError(f"{place}: {key}: {odd[0]!r} is not allowed; allowed: {allowed}")
    for key in {"defaults", "tables", "profiles", "switches", "arms", "grid"} & set(mapping):
        if not isinstance(mapping[key], dict):
            raise SuiteError(f"{place}: {key}: {mapping[key]!r} is not allowed; allowed: a mapping")
    for key in {"tables", "profiles"} & set(mapping):
        if odd := [name for name in mapping[key] if not isinstance(name, str) or not name]:
            raise SuiteError(f"{place}: {key}: {odd[0]!r} is not allowed as a name; allowed: text")
    for key, kind in TEXTS.items():
        if key in mapping and not isinstance(mapping[key], kind):
            raise SuiteError(f"{place}: {key}: {mapping[key]!r} is not allowed; allowed: text")
    labels = mapping.get("published") or []
    if not isinstance(labels, list):
        raise SuiteError(f"{place}: published: {labels!r} is not allowed; allowed: a list")
    for label in labels:
        if not any(published.is_called(row, str(label)) for row in published.rows()):
            raise SuiteError(f"{place}: published: no row of {published.PATH.name} is called "
                             f"{label!r}")  # fmt: skip
    compare = mapping.get("compare") or []
    for pair in compare if isinstance(compare, list) else [compare]:
        names = pair if isinstance(pair, list) else []
        if [type(name) for name in names] != [str, str] or names[0] == names[1]:
            raise SuiteError(f"{place}: compare: {pair!r} is not allowed; allowed: a list of "
                             "[arm, reference], two different names")  # fmt: skip
    for switch, values in mapping.get("grid", {}).items():
        if not isinstance(values, list) or not values:
            raise SuiteError(f"{place}: grid: {switch}: {values!r} is not allowed; allowed: a list")


def in_profile(suite: Mapping[str, Any], profile: str) -> dict[str, Any]:
    """The suite as a profile has it."""
    if profile not in suite["profiles"]:
        raise SuiteError(f"no profile {profile!r}; there are {', '.join(suite['profiles'])}")
    over = suite["profiles"][profile]
    replaced = over.get("tables", {})
    return {
        "title": suite["title"],
        "defaults": suite.get("defaults", {}) | over.get("defaults", {}),
        "tables": {name: t | replaced.get(name, {}) for name, t in suite["tables"].items()},
        **{key: over.get(key, suite[key]) for key in SPANS},
    }


# --- from the suite to its runs ---------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a suite."""

    name: str  # and its folder
    place: str  # table and arm, for messages
    said: Mapping[str, Any]  # switches that run.py is told, as plain values
    config: Config  # what all of them come to; its device is the suite's to choose

    @property
    def words(self) -> list[str]:
        """The switches as run.py's command line has them."""
        result = []
        for name, value in self.said.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                result.append(f"--{option}" if value else f"--no-{option}")
            else:
                result += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
        return result


class Plan(NamedTuple):
    tables: list[dict[str, Any]]  # as in suite.json
    runs: list[Run]  # each once: all of the first seed, then all of the second, ...
    warnings: list[str]


def arms_of(place: str, table: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and switches of each arm of a table."""
    shared = table.get("switches", {})
    for name, switches in table.get("arms", {}).items():
        if not isinstance(switches, dict):
            raise SuiteError(f"{place}, arm {name}: {switches!r} is not allowed; allowed: switches")
        yield str(name), shared | switches
    if ("grid" in table) != ("name" in table):
        raise SuiteError(f"{place}: 'grid' and 'name' are given together or not at all")
    if "grid" in table:
        for values in itertools.product(*table["grid"].values()):
            switches = dict(zip(table["grid"], values, strict=True))
            yield filled(place, table["name"], switches), shared | switches


def filled(place: str, name: str, switches: Mapping[str, Any]) -> str:
    """`name` with its {switch}es replaced by their values, those of a list joined by +."""

    def value(match: re.Match) -> str:
        if match[1] not in switches:
            raise SuiteError(f"{place}: name {name!r}: {match[1]!r} is no switch of the grid")
        value = switches[match[1]]
        if isinstance(value, bool):
            return str(value).lower()
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    return re.sub(r"\{(\w+)\}", value, str(name))


def expand(suite: Mapping[str, Any], forced: Mapping[str, Any], device: str) -> Plan:
    """Every run of a suite, as `in_profile` gives it.

    Args:
        forced: switches of all runs, whatever the suite says.
        device: "cpu" or "cuda", the kind of device that the runs will be on. It need not be here.

    Raises SuiteError, whose message names the table, the arm and what is wrong with it.
    """
    runs: dict[str, Run] = {}  # by name, also where another name stands for the same run
    names: dict[str, str] = {}  # by hash of the configuration
    tables, warnings = [], []
    if not suite["tables"]:
        raise SuiteError("tables: there is none")
    for table_name, table in suite["tables"].items():
        spans = [table.get(key, suite[key]) for key in SPANS]
        arms = []
        for arm, switches in arms_of(f"table {table_name}", table):
            place = f"table {table_name}, arm {arm}"
            cells = []
            for source, target, seed in itertools.product(*spans):
                if source == target:
                    continue
                said = suite["defaults"] | switches | forced
                run, warned = one_run(place, arm, said, source, target, seed, device)
                warnings += warned
                if not cells:  # the arm's other runs have the same layers
                    check_layers(run)
                other = runs.setdefault(run.name, run)
                if different := differing(other.config.as_dict(), run.config.as_dict()):
                    raise SuiteError(
                        f"two runs are called {run.name}: {other.place} and {place}; "
                        f"{'; '.join(different)}"
                    )
                name = names.setdefault(run.config.hash(), run.name)
                cells.append({"source": source, "target": target, "seed": seed, "run": name})
            if any(other["name"] == arm for other in arms):
                raise SuiteError(f"{place}: two arms of this table have that name; allowed: one")
            arms.append({"name": arm, "runs": cells})
        if not any(arm["runs"] for arm in arms):
            raise SuiteError(f"table {table_name}: has no runs; it needs arms, and a source that "
                             "is not the target")  # fmt: skip
        about = {k: table.get(k) for k in ("title", "note", "published", "baseline", "compare")}
        tables.append({"name": table_name} | about | {"arms": arms})
    known = {arm["name"] for table in tables for arm in table["arms"]}
    for table in tables:
        if table["baseline"] not in {None, *known}:
            raise SuiteError(f"table {table['name']}: baseline: no arm {table['baseline']!r}")
        for name in itertools.chain(*(table["compare"] or ())):
            if name not in known:
                raise SuiteError(f"table {table['name']}: compare: no arm {name!r}")
    once = sorted((runs[name] for name in names.values()), key=lambda run: run.config.seed)
    return Plan(tables, once, list(dict.fromkeys(warnings)))


def one_run(
    place: str, arm: str, said: dict, source: str, target: str, seed: int, device: str
) -> tuple[Run, list[str]]:
    """A run, and the warnings that its record will carry."""
    if taken := [name for name in OWN if name in said]:
        raise SuiteError(f"{place}: {taken[0]} is not for an arm: use sources, targets and seeds")
    said = {name: value for name, value in said.items() if value is not None}
    said |= {"source": source, "target": target, "seed": seed}
    # said, for what "auto" would come to is known where the run will be, not here
    if said.get("amp", "auto") == "auto":
        said["amp"] = "float16" if device == "cuda" else "off"
    name = f"{arm}-{source}-{target}-s{seed}"
    if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
        raise SuiteError(
            f"{place}: {arm!r} cannot name a folder; allowed: letters, digits, . _ + -"
        )
    try:
        config, warnings = resolve(said | {"device": "cpu"})
    except ConfigError as error:
        raise SuiteError(f"{place}: {error}") from None
    values = config.as_dict()
    return Run(name, place, {n: values[n] for n in said} | {"device": device}, config), warnings


def check_layers(run: Run) -> None:
    """Raises SuiteError where the network does not have the layers of a run, or not as many p_zero."""
    if run.config.layers:
        try:
            attach(bare_model(), replace(run.config, attach="hooks")).remove()
        except ConfigError as error:
            raise SuiteError(f"{run.place}: {error}") from None


# --- what is there ----------------------------------------------------------------------------


class State(NamedTuple):
    """What a run's folder holds."""

    kind: str  # done | new | killed | broken | other
    why: str = ""  # in words, where something must be said


def state_of(folder: Path, config: Config) -> State:
    """done: a whole record of this run. new: nothing. killed: begun, and can be continued.
    broken: a file is half-written. other: a record that is not of this run, was edited, or is of
    a run that was not as it must be.
    """
    saved, summary = folder / "config.yaml", folder / "summary.json"
    if not saved.exists() and not summary.exists():
        return State("new")
    try:
        switches = record.read_yaml(saved)
        switches.pop("warnings", None)
        if unlike := set(switches) ^ set(SWITCHES):
            odd = ", ".join(sorted(unlike))
            return State("other", f"{folder} is a record of another version: {odd}")
        if different := differing(switches, config.as_dict()):
            why = f"{folder} is of another configuration: {'; '.join(different)}"
            return State("other", why)
        if not summary.exists():
            return State("killed")
        record.read(folder)
    except record.RecordError as error:
        return State("broken", str(error))
    problems = record.check(folder)
    return State("other", "; ".join(problems)) if problems else State("done")


def mend(folder: Path) -> list[str]:
    """Move aside what is half-written in the folder of a run that is not done.

    run.py makes it anew, from the last checkpoint if that is whole. Returns the files' names.
    """
    aside = []
    for name, read in (
        ("config.yaml", record.read_yaml),
        ("checkpoint.pt", record.read_checkpoint),
        ("summary.json", None),  # it would say that the run is done
    ):
        path = folder / name
        try:
            if path.exists() and (read is None or not read(path)):
                raise record.RecordError
        except record.RecordError:
            os.replace(path, folder / f"{name}.broken")
            aside.append(name)
    return aside


def lock(out: Path, name: str, wait: bool = False) -> BinaryIO | None:
    """The lock called `name`, as a run's folder is, or None while another process has it.

    It is the kernel's and ends with the last process that has the file open, however that ends.
    """
    (out / ".locks").mkdir(parents=True, exist_ok=True)
    file = open(out / ".locks" / name, "ab")  # noqa: SIM115 (held until the run is over)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file


# --- how long it takes ------------------------------------------------------------------------


def work(config: Config) -> float:
    """Cost of a run in training images of 224 x 224. An image without a backward pass is a third."""
    source, target = (
        sum(record.images_per_class(config, domain)) for domain in (config.source, config.target)
    )
    trained = round(source * (1 - config.holdout))
    epochs, updates = config.length(trained)
    once_more = config.bn_recalibration + (config.test_set == "source-train")
    tested = target * (1 + (config.mode == "adabn")) + source - trained + trained * once_more
    passes = epochs * trained if config.updates is None else updates * config.batch_size
    if config.mode == "da":  # the maps are recorded first, of each domain
        passes *= 1 + len(config.mask_sources or (config.target,)) / 3
    elif config.mode == "dann":
        passes *= 2  # the target's images go along
    return (passes + epochs * tested / 3) * (config.image_size / 224) ** 2


class Clock:
    """Estimates seconds from the finished runs of a folder; without any, from a guess.

    Args:
        device: "cpu" or "cuda".
        threads: of each run on a CPU.
        size: runs at a time.
    """

    def __init__(self, device: str, threads: int, size: int) -> None:
        self.rate = GUESS[device] * (threads if device == "cpu" else 1)
        self.size = max(1, size)
        self.seconds = self.work = 0.0
        self.runs = 0

    def learn(self, folder: Path, config: Config) -> None:
        self.seconds += record.read_json(folder / "summary.json")["seconds"]
        self.work += work(config)
        self.runs += 1
        self.rate = self.work / max(self.seconds, 1e-9)

    def run_seconds(self, run: Run) -> float:
        return START_SECONDS + work(run.config) / self.rate

    def left(self, runs: Iterable[Run]) -> float:
        return sum(map(self.run_seconds, runs)) / self.size

    def basis(self) -> str:
        if self.runs:
            return f"by the {self.runs} finished here: {self.rate:.3g} images of 224 px a second"
        return f"a guess, no run is finished here: {self.rate:.3g} images of 224 px a second"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes / 60:.1f} h" if minutes < 2880 else f"{minutes / 1440:.1f} days"


# --- running ----------------------------------------------------------------------------------


class Book:
    """What became of each run, and suite.json, in which it stands."""

    def __init__(self, out: Path, head: Mapping[str, Any], plan: Plan, keep: bool) -> None:
        self.out, self.head, self.plan, self.keep = out, head, plan, keep
        self.states = {run.name: state_of(out / run.name, run.config) for run in plan.runs}

    def check(self) -> None:
        """Raises SuiteError where a folder holds something else."""
        try:
            index = record.read_json(self.out / "suite.json")
            mine = [self.head[key] for key in ("suite", "profile")]
            if (theirs := [index[key] for key in ("suite", "profile")]) != mine:
                raise SuiteError(f"out: {self.out} holds suite {theirs[0]}, profile {theirs[1]}; "
                                 "name another folder")  # fmt: skip
        except (record.RecordError, KeyError, TypeError):
            pass  # none, or one that will be made anew
        others = [state.why for state in self.states.values() if state.kind == "other"]
        if others:
            raise SuiteError(
                "\n".join(others) + "\nnothing was run or changed; say those switches (--set), "
                "name another --out, or move the folders away"
            )

    def write(self) -> None:
        """Put suite.json in place, with what other processes did by now."""
        with lock(self.out, "suite.json", wait=True):
            runs = {run.name: self.entry(run) for run in self.plan.runs}
            index = {"format": FORMAT} | self.head | {"tables": self.plan.tables, "runs": runs}
            record.write_json(self.out / "suite.json", index)

    def entry(self, run: Run) -> dict[str, Any]:
        folder, problem = self.out / run.name, None
        if self.states[run.name].kind != "done":
            self.states[run.name] = state_of(folder, run.config)
        done = self.states[run.name].kind == "done"
        if not done and (folder / FAILURE).exists():
            problem = record.read_json(folder / FAILURE)["lines"]
        state = "done" if done else "failed" if problem is not None else "missing"
        return {"state": state, "problem": problem, "switches": dict(run.said)}

    def close(self, run: Run, failure: Failure | None) -> Failure | None:
        """Enter how a run ended. Returns how it failed: exit status 0 is not yet a record."""
        folder = self.out / run.name
        state = state_of(folder, run.config)
        if failure is None and state.kind != "done":
            failure = Failure(0, [f"ended well, but left no whole record {state.why}".strip()])
        if failure is None:
            (folder / FAILURE).unlink(missing_ok=True)
            if not self.keep:  # 90 MB, and 400 runs would fill a disk
                (folder / "checkpoint.pt").unlink(missing_ok=True)
        else:
            record.write_json(folder / FAILURE, failure._asdict())
        self.write()
        return failure


def run_all(
    todo: Sequence[Run], pool: Local | Ray, book: Book, clock: Clock, screen: Screen
) -> dict[str, Failure]:
    """Execute runs until none is left. Returns those that failed, by name."""
    waiting = deque(todo)
    running: dict[str, tuple[Run, float]] = {}  # and when each was started
    failures: dict[str, Failure] = {}
    busy: set[str] = set()  # what another process was seen at
    count = 0

    def report(run: Run, failure: Failure | None, how: str) -> None:
        nonlocal count
        count += 1
        line, style = f"[{count:{len(str(len(todo)))}}/{len(todo)}] {run.name}", ""
        if failure is None:
            clock.learn(book.out / run.name, run.config)
            result = record.read_json(book.out / run.name / "summary.json")
            line += (
                f"  {result['target_accuracy']:.2f} % "
                f"({result['target_correct']}/{result['target_total']})  {how}"
            )
        else:
            failures[run.name] = failure
            line, style = f"{line}  FAILED: {(failure.lines or ['no word'])[-1]}", "bold red"
        left = [*waiting, *(r for r, _ in running.values())]
        if left:
            line += (
                f"  {min(len(running), pool.size)} running, about {duration(clock.left(left))} left"
            )
        screen.say(line, style)

    while waiting or running:
        for _ in range(len(waiting)):
            if not pool.room():
                break
            run = waiting.popleft()
            folder = book.out / run.name
            held = lock(book.out, run.name)
            if held is None:
                if run.name not in busy:
                    screen.say(f"{run.name}: another process is at it; waiting for that")
                    busy.add(run.name)
                waiting.append(run)
                continue
            state = state_of(folder, run.config)  # another process may have been at it
            if state.kind in ("done", "other"):
                other = Failure(BAD_INPUT, [state.why]) if state.kind == "other" else None
                report(run, book.close(run, other), "by another process")
                held.close()
                continue
            folder.mkdir(exist_ok=True)
            if aside := mend(folder):
                screen.warn(f"{run.name}: half-written, moved aside and made anew: "
                            f"{', '.join(aside)} {state.why}".rstrip())  # fmt: skip
            running[run.name] = run, time.monotonic()
            pool.start(Job(run.name, run.words, folder, held))
        for job, failure in pool.finished(0.5):
            run, start = running.pop(job.name)
            failure = book.close(run, failure)
            job.lock.close()
            report(run, failure, f"{time.monotonic() - start:.0f} s")
    return failures


# --- the command ------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, epilog="See run.py for switches."
    )
    result.add_argument("suite", help="name of a suite in experiments/suites, or a yaml file")
    result.add_argument("--profile", default="full", help="full (default) | mini")
    result.add_argument("--data", help="the same as --set data=")
    result.add_argument("--weights", help="the same as --set weights=")
    result.add_argument("--out", help="folder (default: runs/suites/SUITE-PROFILE)")
    result.add_argument("--set", action="append", default=[], metavar="SWITCH=VALUE",
                        help="a switch of every run, whatever the suite says; repeatable")  # fmt: skip
    result.add_argument("--only", metavar="PATTERN",
                        help="only runs whose name, or table, matches this shell pattern")  # fmt: skip
    result.add_argument("--dry-run", action="store_true", help="list the runs and do nothing")
    result.add_argument("--keep-checkpoints", action="store_true",
                        help="leave the checkpoint, 90 MB, of a finished run")  # fmt: skip
    result.add_argument("--jobs", type=positive, help="runs at a time (CPU: default 1)")
    result.add_argument("--per-device", type=positive, help="runs at a time on a GPU (default 1)")
    result.add_argument(
        "--ray-address", metavar="ADDRESS", help="run on this Ray cluster: auto, host:port"
    )
    return result


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number from 1")
    return int(text)


def switches_of(args: argparse.Namespace) -> dict[str, Any]:
    """The switches that --data, --weights and --set give to every run."""
    said = {name: getattr(args, name) for name in ("data", "weights") if getattr(args, name)}
    for word in args.set:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in SWITCHES:
            raise SuiteError(f"--set: {word!r} is not allowed; allowed: SWITCH=VALUE with one of "
                             f"{', '.join(n for n in SWITCHES if n not in OWN)}")  # fmt: skip
        said[name] = {"true": True, "false": False}.get(value, value)
    return said


def remade(args: argparse.Namespace) -> str:
    """The command that makes the whole suite, without what says where and how much of it."""
    words = ["python", "experiments/suite.py", args.suite, "--profile", args.profile]
    for name in ("data", "weights"):
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    for word in args.set:
        words += ["--set", word]
    return shlex.join(words)


def pool_of(args: argparse.Namespace, device: str | None) -> tuple[Local | Ray, str, int]:
    """Where the runs go, the kind of device there, and the threads of each."""
    if device not in (None, "auto", "cpu", "cuda"):
        raise SuiteError(f"--set device: {device!r} is not allowed; allowed: auto | cpu | cuda. "
                         "CUDA_VISIBLE_DEVICES chooses among GPUs")  # fmt: skip
    if args.ray_address:
        if args.jobs:
            raise SuiteError("--jobs is for one machine; on a cluster Ray counts CPUs and GPUs")
        pool = Ray(args.ray_address, args.per_device or 1, {"cpu": False, "cuda": True}.get(device))
        return pool, pool.device, 1
    # a dry run on a laptop tells how long a GPU would take
    planned = args.dry_run and device == "cuda"
    kind = "cuda" if planned else pick_device(device or "auto").type
    if kind == "cpu" and args.per_device:
        raise SuiteError("--per-device is for GPUs, and there is none in use; use --jobs")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = torch.cuda.device_count() or 1 if kind == "cuda" else 0
    places = slots(
        kind, jobs=args.jobs, per_device=args.per_device or 1, gpus=gpus, cores=cores or 1
    )
    return Local(places), kind, int(places[0]["OMP_NUM_THREADS"])


def check_files(plan: Plan) -> None:
    """Find now, and not once a run, that data or weights are not there."""
    for data in {run.config.data for run in plan.runs} - {"toy"}:
        find_root(data)
    for weights in {run.config.weights for run in plan.runs} - {"imagenet", "none"}:
        if not Path(weights).is_file():
            raise SuiteError(f"weights: no file {weights}")


def by_cell(arm: Mapping[str, Any]) -> dict[tuple, str]:
    """The runs of an arm by source, target and seed."""
    return {(cell["source"], cell["target"], cell["seed"]): cell["run"] for cell in arm["runs"]}


def chosen(plan: Plan, pattern: str | None) -> list[Run]:
    """The runs that --only names: those of a table with the arms that it is compared with."""
    if pattern is None:
        return plan.runs
    of_arm: dict[str, dict[tuple, str]] = {}  # runs of each arm, by source, target and seed
    for table in plan.tables:
        for arm in table["arms"]:
            of_arm.setdefault(arm["name"], {}).update(by_cell(arm))
    names = set()
    for table in plan.tables:
        cells = [(cell, run) for arm in table["arms"] for cell, run in by_cell(arm).items()]
        if fnmatch.fnmatchcase(table["name"], pattern):
            names |= {run for _, run in cells}
            for arm in {table["baseline"], *itertools.chain(*(table["compare"] or ()))}:
                other = of_arm.get(arm, {})
                names |= {other[cell] for cell, _ in cells if cell in other}
        names |= {run for _, run in cells if fnmatch.fnmatchcase(run, pattern)}
    if not names:
        raise SuiteError(f"--only: no run and no table matches {pattern!r}")
    return [run for run in plan.runs if run.name in names]


def run_suite(args: argparse.Namespace, screen: Screen) -> int:
    content = in_profile(read_suite(args.suite), args.profile)
    forced = switches_of(args)
    pool, device, threads = pool_of(args, forced.pop("device", None))
    try:
        plan = expand(content, forced, device)
        runs = chosen(plan, args.only)
        name = Path(args.suite).stem
        out = Path(args.out or Path("runs") / "suites" / f"{name}-{args.profile}")
        head = {"suite": name, "profile": args.profile, "title": content["title"]}
        book = Book(out, head | {"command": remade(args)}, plan, args.keep_checkpoints)
        book.check()
        clock = Clock(device, threads, pool.size)
        for run in plan.runs:
            if book.states[run.name].kind == "done":
                clock.learn(out / run.name, run.config)
        todo = [run for run in runs if book.states[run.name].kind != "done"]

        for warning in plan.warnings:
            screen.warn(warning)
        if args.dry_run:
            for run in runs:
                kind = book.states[run.name].kind
                time_ = "" if kind == "done" else duration(clock.run_seconds(run))
                screen.say(f"{kind:6}  {time_:>8}  {run.name}")
        screen.say(
            f"{name}, profile {args.profile}: {len(runs)} runs, {len(runs) - len(todo)} done, "
            f"{len(todo)} to do, {pool.size} at a time on {device}; "
            f"about {duration(clock.left(todo))} ({clock.basis()})"
        )
        if args.dry_run:
            return 0
        if not args.ray_address:
            check_files(plan)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SuiteError(f"out: cannot make folder {out}: {error.strerror}") from None
        book.write()
        failures = run_all(todo, pool, book, clock, screen)
    finally:
        pool.stop()
    screen.say(f"{len(runs) - len(failures)} of {len(runs)} runs are done: {out / 'suite.json'}")
    for name, failure in failures.items():
        screen.say(f"failed: {name} ({out / name / LOG})", "bold red")
        for line in failure.lines:
            screen.say(f"    {line}")
    return FAILED if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all done, 2 bad input, 1 some runs failed, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(arguments)
    try:
        return run_suite(args, Screen())
    except (SuiteError, ConfigError, DataError, WorkersError) as error:
        for line in str(error).splitlines():
            print(f"suite.py: error: {line}", file=sys.stderr)
        return BAD_INPUT
    except record.RecordError as error:
        print(f"suite.py: failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        again = shlex.join(["python", "experiments/suite.py", *arguments])
        print(f"suite.py: interrupted; to continue: {again}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, for job schedulers
    sys.exit(main())
