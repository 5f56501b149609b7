"""Which of several models a validator chooses, and how good that choice is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from domainshift.selection.arrays import SelectionError, vector
from domainshift.selection.validators import VALIDATORS, Inputs, Validator


def rank_correlation(scores: Sequence[float], accuracies: Sequence[float]) -> float | None:
    """Spearman's correlation of scores with target accuracies, from -1 to 1.

    None where it says nothing: for fewer than three models, or where all scores or all accuracies are
    the same but for rounding. Equal values share their mean rank.

    Raises SelectionError: different numbers of them, none, or one that is not finite.
    """
    x, y = vector("scores", scores), vector("accuracies", accuracies)
    if len(x) != len(y):
        raise SelectionError(
            f"accuracies: {len(y)} values are not allowed; allowed: {len(x)}, one per score"
        )
    if len(x) < 3 or _constant(x) or _constant(y):
        return None
    return float(stats.spearmanr(x, y).statistic)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= 1e-12 * max(1.0, np.abs(values).max()))


def choice(scores: Sequence[float]) -> int:
    """Position of the highest score; of equals the first.

    Raises SelectionError: no score, or one that is not finite.
    """
    return int(vector("scores", scores).argmax())


class Selection(NamedTuple):
    """What a validator chooses, beside what target labels choose. Accuracies are percent.

    The oracle chooses by target labels: its accuracy is an upper bound for every other choice, no result.
    """

    validator: str  # its name in `VALIDATORS`
    correlation: float | None  # of `rank_correlation`, over all candidates
    chosen: str  # name of the candidate of the highest score
    accuracy: float  # of the chosen one on the target
    oracle: str  # name of the candidate of the highest target accuracy
    oracle_accuracy: float

    @property
    def regret(self) -> float:
        """Points of target accuracy that the choice loses to the oracle; 0 or more."""
        return self.oracle_accuracy - self.accuracy


def select(
    candidates: Mapping[str, tuple[Inputs, float]],
    validators: Mapping[str, Validator] = VALIDATORS,
) -> list[Selection]:
    """The choice of every validator that can score every candidate, in the order of `validators`.

    A validator is left out where one candidate lacks what it needs: a choice among the others would not
    be comparable. An input that a validator merely uses is taken only if every candidate has it. Target
    accuracies enter the correlation and the oracle, and no score.

    Args:
        candidates: name of a model -> its inputs, and its accuracy on the target in percent. All are
            about the same images of one target.
        validators: name -> validator.

    Raises:
        SelectionError: no candidate; an accuracy outside 0 to 100; candidates with different numbers of
            target images or classes; what the validators raise, with the candidate's name.
    """
    if not candidates:
        raise SelectionError("candidates: none is not allowed; allowed: one or more")
    names = list(candidates)
    inputs = _comparable({name: candidates[name][0] for name in names})
    accuracies = [candidates[name][1] for name in names]
    for name, accuracy in zip(names, accuracies, strict=True):
        if not 0 <= accuracy <= 100:
            raise SelectionError(
                f"candidate {name}: accuracy {accuracy} is not allowed; allowed: 0 to 100 percent"
            )
    oracle = choice(accuracies)
    selections = []
    for validator in validators.values():
        if any(validator.lacks(each) for each in inputs.values()):
            continue
        scores = [_score(validator, name, each) for name, each in inputs.items()]
        chosen = choice(scores)
        selections.append(
            Selection(
                validator=validator.name,
                correlation=rank_correlation(scores, accuracies),
                chosen=names[chosen],
                accuracy=accuracies[chosen],
                oracle=names[oracle],
                oracle_accuracy=accuracies[oracle],
            )
        )
    return selections


def _comparable(inputs: Mapping[str, Inputs]) -> dict[str, Inputs]:
    """The inputs, each without what another lacks. Raises SelectionError for different targets."""
    kept = [
        field
        for field in Inputs.__dataclass_fields__
        if all(getattr(each, field) is not None for each in inputs.values())
    ]
    if "target_logits" in kept:
        shapes = {name: np.shape(each.target_logits) for name, each in inputs.items()}
        first = next(iter(shapes))
        for name, shape in shapes.items():
            if shape != shapes[first]:
                raise SelectionError(
                    f"candidate {name}: target_logits of shape {shape} is not allowed; "
                    f"allowed: {shapes[first]}, as candidate {first} has"
                )
    return {
        name: Inputs(**{field: getattr(each, field) for field in kept})
        for name, each in inputs.items()
    }


def _score(validator: Validator, name: str, inputs: Inputs) -> float:
    try:
        return validator.score(inputs)
    except SelectionError as error:
        raise SelectionError(f"candidate {name}: {validator.name}: {error}") from None
