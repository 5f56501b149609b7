"""The rules that decide published claims, as text: `random-conv1-p0.7 > baseline`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from domainshift.records.schema import ClaimIndex

RELATIONS = (">", "<", "=", "!=")
ALLOWED = "allowed: ARM [- ARM] [, ... | or ...] > ARM [- ARM] [, ...], with >, <, = or !="
LARGEST_MARGIN = 100  # points, which is all of an accuracy

Sum = list[tuple[int, str]]  # (sign, arm)


class Rule(NamedTuple):
    """A weighted sum of arms, whose weights sum to zero, and how it lies to zero.

    text: the rule, without alternatives
    weights: by arm
    relation: one of RELATIONS; `domainshift.report.claims` says what each means
    divisor: of the sum: how many arms its left side adds up, so that means of several arms compare
    """

    text: str
    weights: dict[str, int]
    relation: str
    divisor: int = 1


def parsed(text: str) -> list[list[Rule]]:
    """What a text stands for: arms with + and - between them, on both sides of a relation.

    Commas separate sums that must all hold: `a, b > c, d` means that each of a and b is above each of c
    and d. `or` separates sums left of > or < of which one must hold: `a or b > c, d` means that a or b
    is above c, and a or b is above d, so that the better of a and b is above both. Words are apart by
    spaces, because names of arms have + and - in them.

    Returns lists of rules: of each list at least one rule must hold.

    Raises ValueError, also for a rule whose arms cancel or whose sides have unlike numbers of arms.
    """
    words = text.replace(",", " , ").split()
    relations = [i for i, word in enumerate(words) if word in RELATIONS]
    if len(relations) != 1:
        raise ValueError(f"rule {text!r} is not allowed; {ALLOWED}")
    (middle,) = relations
    relation, right = words[middle], alternatives(words[middle + 1 :], text)
    left = [alternatives(part, text, "or") for part in split(words[:middle], ",")]
    if not left or not right:
        raise ValueError(f"rule {text!r} lacks an arm; {ALLOWED}")
    if relation not in (">", "<") and any(len(sums) > 1 for sums in left):
        raise ValueError(f"rule {text!r}: 'or' beside {relation} is not allowed; allowed: > or <")
    return [
        [one_rule(one, relation, other) for one in sums]
        for sums, other in itertools.product(left, right)
    ]


def split(words: list[str], separator: str) -> list[list[str]]:
    groups = itertools.groupby(words, lambda word: word == separator)
    return [list(group) for is_separator, group in groups if not is_separator]


def alternatives(words: list[str], text: str, separator: str = ",") -> list[Sum]:
    """The sums between separators."""
    sums, parts = [], split(words, separator)
    if separator == "or" and words.count("or") != len(parts) - 1:
        raise ValueError(f"rule {text!r} is not allowed; {ALLOWED}")
    for first, *others in parts:
        signs, arms = others[::2], others[1::2]
        named = not {"+", "-", ">>", "<<", "==", "or"} & {first, *arms}
        if len(signs) != len(arms) or not set(signs) <= {"+", "-"} or not named:
            raise ValueError(f"rule {text!r} is not allowed; {ALLOWED}")
        own = [(1 if sign == "+" else -1, arm) for sign, arm in zip(signs, arms, strict=True)]
        sums.append([(1, first), *own])
    return sums


def one_rule(left: Sum, relation: str, right: Sum) -> Rule:
    """Raises ValueError unless the weights sum to zero and some are left."""
    weights: dict[str, int] = {}
    for side, factor in ((left, 1), (right, -1)):
        for sign, arm in side:
            weights[arm] = weights.get(arm, 0) + sign * factor
    text = f" {relation} ".join(
        " ".join(f"{'+' if sign > 0 else '-'} {arm}" for sign, arm in side).removeprefix("+ ")
        for side in (left, right)
    )
    ours, theirs = (sum(sign for sign, _ in side) for side in (left, right))
    if ours != theirs:
        raise ValueError(
            f"rule {text!r} has {ours} arms left and {theirs} right, those with - taken off; "
            f"allowed: as many on both sides. {ALLOWED}"
        )
    weights = {arm: w for arm, w in weights.items() if w}
    if not weights:
        raise ValueError(f"rule {text!r} compares an arm with itself; {ALLOWED}")
    return Rule(text, weights, relation, max(1, ours))


def rules_of(claim: ClaimIndex) -> list[list[Rule]]:
    """Every rule of a claim, as `parsed` gives them.

    Raises ValueError for a rule that is none, and for a trend, targets or a margin that decide nothing.
    """
    if claim.targets is not None and (not claim.targets or repeated(claim.targets)):
        raise ValueError(f"targets {claim.targets} is not allowed; allowed: different domains")
    if claim.margin is not None and claim.margin > LARGEST_MARGIN:
        raise ValueError(
            f"margin {claim.margin:g} is not allowed; allowed: above 0, at most {LARGEST_MARGIN}"
        )
    if claim.figure != "accuracy" and not claim.rules:
        raise ValueError(f"figure {claim.figure!r} without rules is not allowed; allowed: accuracy")
    if claim.trend and repeated(claim.trend):
        raise ValueError(f"trend {list(claim.trend)} is not allowed; allowed: two different arms")
    if claim.trend and claim.targets is not None and len(claim.targets) < 2:
        raise ValueError(
            f"targets {claim.targets} beside trend is not allowed; allowed: two or more"
        )
    return [rules for text in claim.rules for rules in parsed(text)]


def repeated(names: list[str] | tuple[str, ...]) -> bool:
    return len(set(names)) < len(names)


def arms_of_claim(claim: ClaimIndex) -> list[str]:
    """Names of all arms that a claim's rule is about. Raises ValueError for a rule that is none."""
    names = [name for rules in rules_of(claim) for rule in rules for name in rule.weights]
    return list(dict.fromkeys([*names, *(claim.trend or ()), *claim.collapse]))


def different_pairs(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Primary comparisons, checked. Raises ValueError: more than six, an arm with itself, or one twice."""
    if len(pairs) > 6:
        raise ValueError(f"{len(pairs)} are not allowed; allowed: at most six")
    for a, b in pairs:
        if a == b:
            raise ValueError(f"{a!r} with itself is not allowed; allowed: two different arms")
    if len({frozenset(pair) for pair in pairs}) < len(pairs):
        raise ValueError("two arms are there twice; allowed: each two once, either way round")
    return pairs
