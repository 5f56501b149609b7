"""The rules that decide published claims, as text: `random-conv1-p0.7 > baseline`."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from domainshift.records.schema import ClaimIndex

RELATIONS = (">", "<", "=")
ALLOWED = "allowed: ARM [- ARM] [, ...] > ARM [- ARM] [, ...], with >, < or ="


class Rule(NamedTuple):
    """A weighted sum of arms, and how it lies to zero.

    text: the rule, without alternatives
    weights: by arm
    relation: ">" above, "<" below, "=" within a margin of zero
    """

    text: str
    weights: dict[str, float]
    relation: str


def parsed(text: str) -> list[Rule]:
    """The rules that a text stands for: arms with + and - between them, on both sides of a relation.

    Commas separate alternatives: `a, b > c, d` means that each of a and b is above each of c and d.
    Words are apart by spaces, because names of arms have + and - in them. Raises ValueError.
    """
    words = text.replace(",", " , ").split()
    relations = [i for i, word in enumerate(words) if word in RELATIONS]
    if len(relations) != 1:
        raise ValueError(f"rule {text!r} is not allowed; {ALLOWED}")
    (middle,) = relations
    sides = [alternatives(side, text) for side in (words[:middle], words[middle + 1 :])]
    return [one_rule(left, words[middle], right) for left, right in itertools.product(*sides)]


def alternatives(words: list[str], text: str) -> list[list[tuple[int, str]]]:
    """The sums between commas, each as (sign, arm)."""
    sums = []
    for is_comma, group in itertools.groupby(words, lambda word: word == ","):
        if is_comma:
            continue
        first, *others = group
        terms = [(1, first)]
        signs, arms = others[::2], others[1::2]
        if len(signs) != len(arms) or not set(signs) <= {"+", "-"} or {"+", "-"} & {first, *arms}:
            raise ValueError(f"rule {text!r} is not allowed; {ALLOWED}")
        terms += [(1 if sign == "+" else -1, arm) for sign, arm in zip(signs, arms, strict=True)]
        sums.append(terms)
    if not sums:
        raise ValueError(f"rule {text!r} lacks an arm; {ALLOWED}")
    return sums


def one_rule(left: list[tuple[int, str]], relation: str, right: list[tuple[int, str]]) -> Rule:
    weights: dict[str, float] = {}
    for side, factor in ((left, 1), (right, -1)):
        for sign, arm in side:
            weights[arm] = weights.get(arm, 0) + sign * factor
    text = f" {relation} ".join(
        " ".join([f"{'+' if sign > 0 else '-'} {arm}" for sign, arm in side]).removeprefix("+ ")
        for side in (left, right)
    )
    return Rule(text, {arm: w for arm, w in weights.items() if w}, relation)


def rules_of(claim: ClaimIndex) -> list[Rule]:
    """Every rule of a claim. Raises ValueError for one that is none."""
    return [rule for text in claim.rules for rule in parsed(text)]


def arms_of_claim(claim: ClaimIndex) -> list[str]:
    """Names of all arms that a claim's rule is about. Raises ValueError for a rule that is none."""
    names = [name for rule in rules_of(claim) for name in rule.weights]
    return list(dict.fromkeys([*names, *(claim.trend or ()), *claim.collapse]))
