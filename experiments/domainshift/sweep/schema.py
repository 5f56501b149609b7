"""What a suite is: the YAML files of experiments/suites, checked, and documented by their schema.

A suite is a study: tables of arms, each of which is tested for every source, target and seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Len
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from domainshift.config import REPOSITORY, Positive
from domainshift.errors import SuiteError
from domainshift.files import YAML_LOADER
from domainshift.records.claims import different_pairs

SUITES = REPOSITORY / "experiments" / "suites"
FULL = "full"  # the profile that every suite has

RULES = """\
Of two values of a switch the later wins: defaults, the profile's defaults, the table's switches, the
arm's, --set. null stands for no value: the preset decides. Switches of a method apply, in `defaults`
and --set, to the arms whose method has them. An arm's name means one thing in all tables."""


def _different(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("a value occurs twice")
    return values


def _two_names(pair: Any) -> Any:
    if isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1]:
        return tuple(pair)
    raise ValueError("a pair is needed")


Domains = Annotated[list[str], Len(1), AfterValidator(_different)]
Seeds = Annotated[list[Annotated[int, Ge(0)]], Len(1), AfterValidator(_different)]
Pair = Annotated[tuple[str, str], BeforeValidator(_two_names)]
Switches = dict[str, Any]


def key(default: Any, help: str, allowed: str) -> Any:
    """A key of the YAML. `...` as default: it must be there."""
    return Field(default, description=help, json_schema_extra={"allowed": allowed})


DOMAINS = "a list of different domains"
SEEDS = "a list of different whole numbers from 0"
SWITCHES = "a mapping of switches, such as {mode: random}"


class Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def given(self) -> dict[str, Any]:
        """The keys that the YAML has, with their values."""
        return {name: value for name, value in self if name in self.model_fields_set}


class TableKeys(Keys):
    """Keys of a table, all of which a profile may replace."""

    title: str = key("", "what the table is of", "text")
    note: str | None = key(None, "what a reader must know", "text")
    published: list[str] | None = key(
        None,
        "the rows of published.csv that the table repeats: how their source and note begin",
        "a list of labels, such as report-B report T3",
    )
    baseline: str | None = key(
        None, "the arm, of any table, that the others are compared with", "the name of an arm"
    )
    compare: list[Pair] | None = key(
        None, "further comparisons, of arms of any table", "a list of [arm, reference], two names"
    )
    switches: Switches = key({}, "switches of all its arms", SWITCHES)
    sources: Domains | None = key(None, "in place of the suite's", DOMAINS)
    targets: Domains | None = key(None, "in place of the suite's", DOMAINS)
    seeds: Seeds | None = key(None, "in place of the suite's", SEEDS)
    arms: dict[str, Switches] = key({}, "switches by name of the arm", "switches by name")
    grid: dict[str, Annotated[list[Any], Len(1)]] | None = key(
        None, "values by switch; every combination is an arm", "a list of values for each switch"
    )
    name: str | None = key(
        None, "of the arms of the grid; {switch} stands for the value of that switch", "text"
    )


class Table(TableKeys):
    """A table of the report: arms side by side."""

    title: str = key(..., "what the table is of", "text")


class Claim(Keys):
    """A published claim, and the rule that decides it: one of rules, trend, collapse, undecidable."""

    says: str = key(..., "the claim in a sentence", "text")
    rules: list[str] | None = key(
        None,
        "what must hold on each target: arms with + and - between them, on both sides of >, <, = or !=; "
        "commas separate alternatives, all of which must hold",
        "a list of rules, such as random-conv1-p0.7 > baseline",
    )
    figure: Literal["accuracy", "unsteadiness"] = key(
        "accuracy",
        "what the rules are about; unsteadiness: the spread of a run's last ten epochs",
        "accuracy | unsteadiness",
    )
    targets: Domains | None = key(None, "in place of every target of the arms", DOMAINS)
    margin: Positive | None = key(
        None, "points within which a rule with = holds; none: the suite's", "a number above 0"
    )
    trend: Pair | None = key(
        None,
        "an arm and a reference: their difference rises from each target to the next harder one",
        "[arm, reference], two names",
    )
    collapse: list[str] | None = key(
        None, "arms that call nearly all images one class", "a list of names of arms"
    )
    undecidable: str | None = key(None, "why no run of the suite can decide it", "text")
    note: str | None = key(None, "what a reader must know of it", "text")


class Profile(Keys):
    """Another size of the same study."""

    defaults: Switches = key({}, "switches on top of the suite's defaults", SWITCHES)
    sources: Domains | None = key(None, "in place of the suite's", DOMAINS)
    targets: Domains | None = key(None, "in place of the suite's", DOMAINS)
    seeds: Seeds | None = key(None, "in place of the suite's", SEEDS)
    tables: dict[str, TableKeys] = key({}, "by table: the keys to replace", "keys by table")


class Suite(Keys):
    """A study: what every table shares, and the tables."""

    title: str = key(..., "what is studied", "text")
    defaults: Switches = key({}, "switches of all arms", SWITCHES)
    sources: Domains = key(..., "labelled domains", DOMAINS)
    targets: Domains = key(
        ..., "domains to test on; every pair of two different domains is tested", DOMAINS
    )
    seeds: Seeds = key(..., "every arm is trained with each", SEEDS)
    primary: Annotated[list[Pair], AfterValidator(different_pairs)] = key(
        [],
        "the comparisons that the study is made for: they alone get verdicts, on each target",
        "a list of at most six [arm, reference], no two arms twice",
    )
    margin: Positive | None = key(
        None,
        "points within which the arms of a primary comparison pass for equal",
        "a number above 0",
    )
    claims: dict[str, Claim] = key({}, "published claims by number", "by number")
    tables: Annotated[dict[str, Table], Len(1)] = key(
        ..., "tables by name", "at least one table, by name"
    )
    profiles: dict[str, Profile] = key(
        {}, f"further sizes of the study by name; {FULL} is there without being listed", "by name"
    )

    def in_profile(self, name: str) -> Suite:
        """The suite as a profile has it. Raises SuiteError for one that is not there."""
        profiles = {FULL: Profile()} | self.profiles
        if name not in profiles:
            raise SuiteError(f"profile: {name!r} is not allowed; allowed: {' | '.join(profiles)}")
        profile = profiles[name]
        tables = dict(self.tables)
        for table, changes in profile.tables.items():
            tables[table] = Table.model_construct(**self.tables[table].given() | changes.given())
        spans = {n: v for n in ("sources", "targets", "seeds") if (v := getattr(profile, n))}
        defaults = self.defaults | profile.defaults
        return self.model_copy(update={"defaults": defaults, "tables": tables, **spans})


# --- reading ----------------------------------------------------------------------------------


class Loader(YAML_LOADER):
    """Refuses a key that occurs twice: YAML would keep the last one and say nothing."""

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


def known_suites() -> dict[str, Path]:
    return {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}


def read_suite(name: str) -> Suite:
    """The suite called `name`, or in the YAML file of that path. Raises SuiteError."""
    known = known_suites()
    if name not in known and not name.endswith(".yaml"):
        raise SuiteError(f"no suite {name!r}; there are {', '.join(known)}, or a .yaml file")
    path = known.get(name, Path(name))
    try:
        content = yaml.load(path.read_text("utf-8"), Loader)
    except SuiteError as error:
        raise SuiteError(f"{path.name}: {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SuiteError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    try:
        suite = Suite.model_validate(content)
    except ValidationError as error:
        raise SuiteError(f"{path.name}: {first_fault(error)}") from None
    for name, profile in suite.profiles.items():
        for table in profile.tables:
            if table not in suite.tables:
                allowed = ", ".join(suite.tables)
                raise SuiteError(
                    f"{path.name}: profile {name}: no table {table!r}; there are {allowed}"
                )
    return suite


def first_fault(error: ValidationError) -> str:
    """The first fault in one line: where it is, the key, the value and what is allowed."""
    fault = error.errors()[0]
    loc, kind, value = list(fault["loc"]), fault["type"], fault["input"]
    bad_name = loc[-1:] == ["[key]"]  # of a mapping of free names
    model: type[Keys] = Suite
    place, rest = [], loc
    while len(rest) > 1 and rest[0] in ("tables", "profiles", "claims"):
        if rest[1:] == [rest[1], "[key]"]:
            break
        inner = {"profiles": Profile, "claims": Claim}
        model = inner.get(rest[0]) or (Table if model is Suite else TableKeys)
        place.append(f"{rest[0][:-1]} {rest[1]}")
        rest = rest[2:]
    where = "".join(f"{part}: " for part in place)
    if kind == "extra_forbidden":
        return f"{where}unknown key {rest[0]!r}; allowed: {', '.join(model.model_fields)}"
    if kind == "missing":
        return f"{where}the key {rest[0]!r} is missing"
    if not rest:
        return f"{where}{value!r} is not allowed; allowed: a mapping of keys"
    if bad_name:
        return f"{where}{rest[0]}: {rest[1]!r} is not allowed as a name; allowed: text"
    allowed = model.model_fields[rest[0]].json_schema_extra["allowed"]
    inner = "".join(f"{part}: " for part in rest[1:] if isinstance(part, str))
    return f"{where}{rest[0]}: {inner}{value!r} is not allowed; allowed: {allowed}"


# --- documentation ----------------------------------------------------------------------------


def documentation() -> str:
    """Every key of the YAML, from the schema."""
    parts = ["A suite is a YAML file with these keys."]
    for heading, model in (
        ("", Suite),
        ("A table, in `tables`", Table),
        ("A claim, in `claims`", Claim),
        ("A profile, in `profiles`", Profile),
    ):
        parts.append("\n".join([*([f"{heading}:"] if heading else []), *_lines(model)]))
    return "\n\n".join([*parts, RULES])


def _lines(model: type[Keys]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        extra: Mapping[str, Any] = field.json_schema_extra
        needed = " (needed)" if field.is_required() else ""
        yield f"  {name:<10} {field.description}{needed}"
        yield f"  {'':<10} allowed: {extra['allowed']}"
