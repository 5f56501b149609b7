"""From the records of a suite's runs to its tables: arms, what is there of each, what is missing.

Everything comes from the run folders and from suite.json beside them (see suite.py). Without
suite.json runs are grouped by their switches, and what was planned is then not known.

A record that cannot be relied on never enters a table. It is a `Problem`, and in the tables its
place is a gap.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import record
from config import MODES_OF, SWITCHES, WHERE, ConfigError, plain, preset_values
from intervals import mean

FORMAT = 1  # of suite.json

# Switches that make an arm what it is. A difference in any other switch of two arms is a confound.
METHOD = ("mode", *MODES_OF)
# The domains and the seed pair the runs of two arms; a preset is nothing but the other switches; and
# test_set source-train only tests once more.
APART = (*WHERE, *METHOD, "preset", "source", "target", "seed", "test_set")
OF_THE_DATA = ("data", "limit", "image_size", "weights")
CONFOUNDS = tuple(name for name in SWITCHES if name not in APART)

Key = tuple[str, str, int]  # source, target, seed
Pair = tuple[str, str]


class StudyError(ValueError):
    """A folder holds no suite; the message says what it lacks."""


# --- records ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The record of a finished run, checked."""

    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]

    @property
    def key(self) -> Key:
        return self.config["source"], self.config["target"], self.config["seed"]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.summary["layer_names"])


class Problem(NamedTuple):
    """A record that no table uses."""

    name: str  # of its folder
    kind: str  # unfinished | half-written | another version | edited | broken rule | another run
    lines: Sequence[str]
    rules: Sequence[str] = ()  # of the audit, which each line is of; none: of "record"

    @property
    def fails(self) -> bool:
        """Whether it is a record of what must not be or did not happen, and not one that is none."""
        return self.kind in ("edited", "broken rule", "another run")


def read_run(folder: Path) -> Run | Problem | None:
    """The record in `folder`, or why there is none to use; None for a folder with none at all."""
    name = folder.name
    if not any((folder / part).exists() for part in ("config.yaml", "summary.json")):
        return None
    try:
        config, rows, summary = record.read(folder)
    except record.RecordError as error:
        whole = (folder / "summary.json").exists()
        return Problem(name, "half-written" if whole else "unfinished", [short(error, folder)])
    if faults := record.faults(config, rows, summary):
        rules, lines = zip(*faults, strict=True)
        kinds = {"version": "another version", "record": "edited"}
        kind = next((kinds[rule] for rule in rules if rule in kinds), "broken rule")
        return Problem(name, kind, lines, rules)
    config = {name: value for name, value in config.items() if name != "warnings"}
    return Run(folder, config, rows, summary)


def short(message: object, folder: Path) -> str:
    """A message of record.py without the path of the folder that it is about."""
    text = str(message).replace(f"{folder}/", "").replace(f"{folder}: ", "")
    return text.replace(str(folder), folder.name)


# --- tables -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train, over domains and seeds."""

    name: str
    planned: Mapping[Key, str]  # names of run folders
    runs: Mapping[Key, Run]  # of these, the finished ones

    @property
    def pairs(self) -> list[Pair]:
        return list(dict.fromkeys((source, target) for source, target, _ in self.planned))

    def seeds(self, pair: Pair) -> list[int]:
        """Seeds that are planned for a source-target pair."""
        return [seed for *domains, seed in self.planned if tuple(domains) == pair]

    def of(self, pair: Pair) -> list[Run]:
        """The finished runs of a source-target pair, by seed."""
        return [self.runs[(*pair, s)] for s in sorted(self.seeds(pair)) if (*pair, s) in self.runs]

    @property
    def one(self) -> Run | None:
        """Any run, for the switches that all of them share."""
        return next(iter(self.runs.values()), None)


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    arms: Sequence[Arm]
    note: str | None = None
    published: Sequence[str] = ()  # notes of the published rows it repeats
    baseline: Arm | None = None  # may be an arm of another table
    compare: Sequence[tuple[Arm, Arm]] = ()  # (arm, reference) by the suite's word; of any table

    @property
    def pairs(self) -> list[Pair]:
        return list(dict.fromkeys(pair for arm in self.arms for pair in arm.pairs))

    def compared(self) -> list[Arm]:
        """The baseline first, then the table's other arms."""
        if self.baseline is None:
            return list(self.arms)
        return [self.baseline, *(arm for arm in self.arms if arm.name != self.baseline.name)]


@dataclass(frozen=True)
class Study:
    """Everything in a suite's folder."""

    folder: Path
    name: str
    title: str
    profile: str | None
    command: str | None
    tables: Sequence[Table]
    runs: Mapping[str, Run]  # by folder name
    problems: Sequence[Problem]
    failed: Mapping[str, Sequence[str]]  # last lines of runs that failed, by folder name
    said: Mapping[str, Mapping[str, Any]] | None  # what suite.json says of each run's switches
    strays: Mapping[str, str] = field(default_factory=dict)  # finished, in no table -> why
    planned: Sequence[str] = field(default=())

    @property
    def missing(self) -> list[str]:
        """Planned runs of which there is no record to use, whatever the reason."""
        return [name for name in self.planned if name not in self.runs]


def read_study(folder: Path) -> Study:
    """All records below `folder`, in their tables. Raises StudyError."""
    if not folder.is_dir():
        raise StudyError(f"{folder} is no folder; the folder of a suite is needed")
    found = {path.name: read_run(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    runs = {name: run for name, run in found.items() if isinstance(run, Run)}
    problems = [problem for problem in found.values() if isinstance(problem, Problem)]
    path = folder / "suite.json"
    if not path.exists():
        if not runs and not problems:
            raise StudyError(f"{folder} holds neither suite.json nor the record of a run")
        table, strays = grouped(list(runs.values()))
        return Study(folder, folder.name, "Runs by their switches", None, None,
                     [table] if runs else [], runs, problems, {}, None, strays,
                     [name for name in runs if name not in strays])  # fmt: skip
    try:
        index = record.read_json(path)
        if index["format"] != FORMAT:
            raise StudyError(f"{path} has format {index['format']}; this code reads {FORMAT}")
        check_types(index, INDEX, "suite.json")
        said = {name: about["switches"] for name, about in index["runs"].items()}
        wrong = [p for name, run in runs.items() if (p := misplaced(name, run, index, said))]
        for problem in wrong:
            del runs[problem.name]
        failed = {
            n: a["problem"] for n, a in index["runs"].items() if a["problem"] and n not in runs
        }
        tables = indexed(index, runs)
        head = [index[key] for key in ("suite", "title", "profile", "command")]
    except record.RecordError as error:
        raise StudyError(str(error)) from None
    except (LookupError, TypeError, AttributeError) as error:
        raise StudyError(f"{path} is not as suite.py writes it ({error!r})") from None
    placed = {name for table in tables for arm in table.arms for name in arm.planned.values()}
    strays = {
        name: f"finished, but {'no table of ' if name in said else ''}suite.json "
        f"{'has' if name in said else 'does not have'} it"
        for name in runs if name not in placed
    }  # fmt: skip
    return Study(folder, *head, tables, runs, [*problems, *wrong], failed, said, strays, list(said))


# Types in suite.json: of values by key, * for every key; of the elements of a list, which may be null.
INDEX = {
    "suite": str,
    "title": str,
    "profile": str | None,
    "command": str | None,
    "tables": [
        {
            "name": str,
            "title": str,
            "note": str | None,
            "published": [str],
            "baseline": str | None,
            "arms": [
                {"name": str, "runs": [{"source": str, "target": str, "seed": int, "run": str}]}
            ],
        }
    ],
    "runs": {"*": {"problem": [str], "switches": dict}},
}


def check_types(value: Any, kind: Any, place: str) -> None:
    """Raises TypeError, naming the place, where a value is not as `kind` (see INDEX) says."""
    outer = type(kind) if isinstance(kind, list | dict) else kind
    if not isinstance(value, outer | None if outer is list else outer):
        raise TypeError(f"{place}: {record.shortened(value)}")
    if isinstance(kind, list):
        for number, element in enumerate(value or [], 1):
            check_types(element, kind[0], f"{place} {number}")
    elif isinstance(kind, dict):
        for key, inner in kind.items():
            for each in value if key == "*" else [key]:
                check_types(value[each], inner, f"{place}: {each}")


def misplaced(name: str, run: Run, index: Mapping, said: Mapping) -> Problem | None:
    """A record that is whole, but of another run than suite.json has under its name."""
    cells = [c for t in index["tables"] for a in t["arms"] for c in a["runs"] if c["run"] == name]
    lines = []
    for switch, value in said.get(name, {}).items():
        if switch not in WHERE and plain(switch, value) != plain(switch, run.config[switch]):
            lines.append(f"{switch} is {run.config[switch]!r}; suite.json has {value!r}")
    for cell in cells:
        lines += [
            f"{what} is {run.config[what]!r}; suite.json has {cell[what]!r}"
            for what in ("source", "target", "seed")
            if run.config[what] != cell[what]
        ]
    return Problem(name, "another run", list(dict.fromkeys(lines))) if lines else None


def indexed(index: Mapping[str, Any], runs: Mapping[str, Run]) -> list[Table]:
    """The tables of suite.json."""
    arms: dict[tuple[str, str], Arm] = {}
    for table in index["tables"]:
        for arm in table["arms"]:
            planned = {(c["source"], c["target"], c["seed"]): c["run"] for c in arm["runs"]}
            done = {key: runs[name] for key, name in planned.items() if name in runs}
            arms[table["name"], arm["name"]] = Arm(arm["name"], planned, done)

    def whole(name: str) -> Arm:
        return merged([arm for (_, other), arm in arms.items() if other == name])

    tables = []
    for table in index["tables"]:
        own = {arm["name"]: arms[table["name"], arm["name"]] for arm in table["arms"]}
        baseline = None if table["baseline"] is None else whole(table["baseline"])
        compare = [  # an older suite.json does not have the key
            tuple(own[name] if name in own else whole(name) for name in pair)
            for pair in table.get("compare") or ()
        ]
        tables.append(Table(table["name"], table["title"], list(own.values()), table["note"],
                            table["published"] or (), baseline, compare))  # fmt: skip
    return tables


def merged(arms: Sequence[Arm]) -> Arm:
    """One arm of what several tables have of it."""
    planned = {key: run for arm in arms for key, run in arm.planned.items()}
    return Arm(arms[0].name, planned, {k: r for arm in arms for k, r in arm.runs.items()})


def grouped(runs: Sequence[Run]) -> tuple[Table, dict[str, str]]:
    """One table of runs that no suite describes: an arm is what differs in the seed and domains.

    Also the runs that are not in it, with the reason: another has the same switches, domains and seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        switches = {n: plain(n, v) for n, v in run.config.items() if n not in ("source", "target",
                                                                            "seed", *WHERE)}  # fmt: skip
        groups.setdefault(json.dumps(switches, sort_keys=True), []).append(run)
    varying = [
        name for name in SWITCHES
        if name not in ("source", "target", "seed", "mode", "preset", *WHERE)
        and len({json.dumps(plain(name, g[0].config[name])) for g in groups.values()}) > 1
    ]  # fmt: skip
    arms, strays = [], {}
    for group in groups.values():
        one = {run.key: run for run in reversed(group)}  # the first of a name
        strays |= {
            run.folder.name: f"finished, but {one[run.key].folder.name} has its switches, domains and seed"
            for run in group if one[run.key] is not run
        }  # fmt: skip
        group = [run for run in group if one[run.key] is run]
        config = group[0].config
        values = [f"{n} {shown(config[n])}" for n in varying if n in CONFOUNDS or given(config, n)]
        name = ", ".join([config["mode"], *values])
        arms.append(Arm(name, {r.key: r.folder.name for r in group}, {r.key: r for r in group}))
    baselines = [arm for arm in arms if arm.one.config["mode"] == "baseline"]
    return Table("runs", "All runs, by their switches", arms,
                 baseline=baselines[0] if len(baselines) == 1 else None), strays  # fmt: skip


def given(config: Mapping[str, Any], name: str) -> bool:
    """Whether a switch has another value than its default."""
    default = SWITCHES[name].default
    return config[name] != (list(default) if isinstance(default, tuple) else default)


def shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(shown, value)) or "none"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- what differs -----------------------------------------------------------------------------


def differences(a: Run, b: Run, names: Iterable[str]) -> list[str]:
    """'name a -> b' for each of the switches `names` in which two runs differ."""
    pairs = ((name, plain(name, a.config[name]), plain(name, b.config[name])) for name in names)
    return [f"{name} {shown(x)} -> {shown(y)}" for name, x, y in pairs if x != y]


def departures(run: Run, but: Sequence[str] = ()) -> list[str]:
    """'name value (protocol: value)' where a run is not of the published protocol of its preset.

    Preset fastshape is of no published one: only the data and weights can be less than whole.
    The switches `but` are not looked at.
    """
    try:
        protocol = preset_values(run.config["preset"], run.config["mode"])
    except ConfigError:
        return []
    protocol |= {"limit": None, "data": "PACS"}
    names = CONFOUNDS if run.config["preset"] != "fastshape" else OF_THE_DATA
    found = []
    for name in names:
        value, right = plain(name, run.config[name]), protocol.get(name)
        # of amp a preset says auto: float16 on a GPU and off without one is no departure
        if name not in ("amp", *but) and value != right:
            found.append(f"{name} {shown(value)} (protocol: {shown(right)})")
    return found


# --- choosing what can be compared ------------------------------------------------------------


def full_block(keys: Iterable[Key]) -> tuple[list[int], list[Pair]]:
    """The largest set of seeds and source-target pairs all combinations of which are in `keys`.

    A mean over pairs is taken seed by seed, and seeds must not differ in the pairs that it is over.
    Of blocks equally large, the one of more seeds.
    """
    of_seed: dict[int, set[Pair]] = {}
    for source, target, seed in keys:
        of_seed.setdefault(seed, set()).add((source, target))
    # the pairs of the best block are those that some seeds have in common
    candidates: set[frozenset[Pair]] = set()
    for pairs in map(frozenset, of_seed.values()):
        candidates |= {pairs, *(pairs & other for other in candidates)}

    def seeds(pairs: frozenset[Pair]) -> list[int]:
        return sorted(seed for seed, has in of_seed.items() if pairs <= has)

    candidates.discard(frozenset())
    if not candidates:
        return [], []
    best = max(candidates, key=lambda p: (len(p) * len(seeds(p)), len(seeds(p)), sorted(p)))
    return seeds(best), sorted(best)


def over_seeds(runs: Mapping[Key, Run], name: str, seeds: Sequence[int], pairs: Sequence[Pair]):
    """A figure of the summaries by seed: its mean over the pairs; None if some run lacks it."""
    values = [[runs[(*pair, seed)].summary.get(name) for pair in pairs] for seed in seeds]
    return None if any(v is None for row in values for v in row) else [mean(row) for row in values]


# On/off and choice switches: arms that differ in one of them alone are each other's control.
ALTERNATIVES = tuple(
    name for name in METHOD if name != "mode"
    and (SWITCHES[name].metadata["rule"].flag or SWITCHES[name].metadata["rule"].choices)
)  # fmt: skip


# Of random maps without a zero these say nothing.
OF_ZEROS = ("p_zero", "mask_unit", "block_size")


def is_control(control: Run, run: Run) -> bool:
    """Whether `control` does what comes along with the method of `run`, and not the method.

    bn-only, which runs target images through BatchNorm in train mode and shapes nothing, is that of
    target maps; a baseline with BatchNorm measured anew of what has it too; p0 = 0, which leaves the
    binarization, of random maps on the same layers.
    """
    a, b = control.config, run.config
    if a["mode"] == "baseline":
        return a["bn_recalibration"] and b["bn_recalibration"] and b["mode"] != "baseline"
    if a["mode"] == "da" == b["mode"]:
        return not a["apply_maps"] and a["record_mode"] == "train" and b["apply_maps"]
    if a["mode"] == "random" == b["mode"]:
        same = all(a[name] == b[name] for name in METHOD if name not in OF_ZEROS)
        return same and not any(a["p_zero"]) and any(b["p_zero"])
    return False


def controls(table: Table) -> list[tuple[Arm, Arm]]:
    """(arm, reference): the controls among the table's arms, then what its suite says to compare."""
    arms = [arm for arm in table.compared() if arm.one]
    found = [
        (arm, control) for control, arm in itertools.product(arms, repeat=2)
        if is_control(control.one, arm.one)
    ]  # fmt: skip
    return once([*found, *(pair for pair in table.compare if all(arm.one for arm in pair))])


def matchups(table: Table) -> list[tuple[Arm, Arm]]:
    """(arm, reference) for each comparison of a table, no two arms twice.

    Every arm with its `controls`; every arm with the baseline; and every two arms that differ in one
    on/off or choice switch alone, the later with the earlier.
    """
    arms = [arm for arm in table.compared() if arm.one]
    found = controls(table)
    for i, arm in enumerate(arms):
        for reference in arms[:i]:
            one, other = reference.one, arm.one
            different = [n for n in METHOD if one.config[n] != other.config[n]]
            alone = len(different) == 1 and different[0] in ALTERNATIVES
            if alone or (table.baseline is not None and reference is arms[0] is table.baseline):
                found.append((arm, reference))
    return once(found)


def once(pairs: Iterable[tuple[Arm, Arm]]) -> list[tuple[Arm, Arm]]:
    """The first of every two arms, whichever is the reference."""
    found: dict[frozenset[str], tuple[Arm, Arm]] = {}
    for pair in pairs:
        found.setdefault(frozenset(arm.name for arm in pair), pair)
    return list(found.values())
