"""The rules that decide published claims, as text: `random-conv1-p0.7 > baseline`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from domainshift.records.schema import ClaimIndex

RELATIONS = (">", "<", "=", "!=")
ALLOWED = "allowed: ARM [- ARM] [, ...] > ARM [- ARM] [, ...], with >, <, = or !="

Sum = list[tuple[int, str]]  # (sign, arm)


class Rule(NamedTuple):
    """A weighted sum of arms, and how it lies to zero.

    text: the rule, without alternatives
    weights: by arm
    relation: ">" above, "<" below, "=" within a margin of zero, "!=" not zero
    divisor: of the sum: how many arms its left side adds up, so that means of several arms compare
    """

    text: str
    weights: dict[str, int]
    relation: str
    divisor: int = 1


def parsed(text: str) -> list[Rule]:
    """The rules that a text stands for: arms with + and - between them, on both sides of a relation.

    Commas separate alternatives: `a, b > c, d` means that each of a and b is above each of c and d.
    Words are apart by spaces, because names of arms have + and - in them.

    Raises ValueError, also for a rule whose arms cancel.
    """
    words = text.replace(",", " , ").split()
    relations = [i for i, word in enumerate(words) if word in RELATIONS]
    if len(relations) != 1:
        raise ValueError(f"rule {text!r} is not allowed; {ALLOWED}")
    (middle,) = relations
    sides = [alternatives(side, text) for side in (words[:middle], words[middle + 1 :])]
    rules = [one_rule(left, words[middle], right) for left, right in itertools.product(*sides)]
    for rule in rules:
        if not rule.weights:
            raise ValueError(f"rule {rule.text!r} compares an arm with itself; {ALLOWED}")
    return rules


def alternatives(words: list[str], text: str) -> list[Sum]:
    """The sums between commas."""
    sums = []
    for is_comma, group in itertools.groupby(words, lambda word: word == ","):
        if is_comma:
            continue
        first, *others = group
        signs, arms = others[::2], others[1::2]
        named = not {"+", "-", ">>", "<<", "=="} & {first, *arms}
        if len(signs) != len(arms) or not set(signs) <= {"+", "-"} or not named:
            raise ValueError(f"rule {text!r} is not allowed; {ALLOWED}")
        own = [(1 if sign == "+" else -1, arm) for sign, arm in zip(signs, arms, strict=True)]
        sums.append([(1, first), *own])
    if not sums:
        raise ValueError(f"rule {text!r} lacks an arm; {ALLOWED}")
    return sums


def one_rule(left: Sum, relation: str, right: Sum) -> Rule:
    weights: dict[str, int] = {}
    for side, factor in ((left, 1), (right, -1)):
        for sign, arm in side:
            weights[arm] = weights.get(arm, 0) + sign * factor
    text = f" {relation} ".join(
        " ".join(f"{'+' if sign > 0 else '-'} {arm}" for sign, arm in side).removeprefix("+ ")
        for side in (left, right)
    )
    divisor = max(1, sum(sign for sign, _ in left))
    return Rule(text, {arm: w for arm, w in weights.items() if w}, relation, divisor)


def rules_of(claim: ClaimIndex) -> list[Rule]:
    """Every rule of a claim. Raises ValueError for one that is none."""
    return [rule for text in claim.rules for rule in parsed(text)]


def arms_of_claim(claim: ClaimIndex) -> list[str]:
    """Names of all arms that a claim's rule is about. Raises ValueError for a rule that is none."""
    names = [name for rule in rules_of(claim) for name in rule.weights]
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
