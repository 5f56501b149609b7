"""Studies with known effects: records as the published figures would have them, with noise of runs.

python simulated.py FOLDER      writes one with the effects of report B, for a look at its page
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from domainshift.records.schema import ClaimIndex
from domainshift.report import claims, comparisons
from domainshift.report.comparisons import FIGURE, Comparisons
from domainshift.report.study import Arm, Study, Table

TARGETS = ("cartoon", "sketch", "photo")
BASELINE = {"cartoon": 54.5, "sketch": 40.4, "photo": 95.9}
SPREAD = {"cartoon": 2.0, "sketch": 4.0, "photo": 0.8}  # standard deviation of a run
OF_A_SEED = 1.0  # that all arms of a seed share

# report B: random maps after conv 1 (its tables 2 and 7), target maps after conv 4 (its table 11)
EFFECTS = {
    "random-conv1-p0.7": {"cartoon": 7.9, "sketch": 16.7, "photo": -14.9},
    "da-conv4": {"cartoon": 9.1, "sketch": 14.9, "photo": -5.8},
}
ARMS = (
    "baseline", "binarize-conv1", "random-conv1-p0.4", "random-conv1-p0.7", "random-conv7-p0.7",
    "random-conv10-p0.5", "bn-only", "da-conv4", "da-conv7", "dropout2d",
)  # fmt: skip
PRIMARY = (
    ("random-conv1-p0.7", "baseline"), ("random-conv1-p0.7", "binarize-conv1"),
    ("random-conv10-p0.5", "baseline"), ("random-conv10-p0.5", "dropout2d"),
    ("da-conv4", "bn-only"), ("da-conv7", "bn-only"),
)  # fmt: skip

SUITE = """
title: "Simulated records with the effects of report B"
defaults: {preset: course-template, weights: imagenet, epochs: 12, amp: "off", evaluate: each}
sources: [art_painting]
targets: [cartoon, sketch, photo]
seeds: [0, 1, 2, 3, 4]
primary: [[random-conv1-p0.7, baseline], [random-conv1-p0.7, binarize-conv1],
          [random-conv10-p0.5, baseline], [random-conv10-p0.5, dropout2d], [da-conv4, bn-only],
          [da-conv7, bn-only]]
margin: 4.0
claims:
  B13:
    says: conv 1 is the best position of random maps
    rules: [random-conv1-p0.7 > random-conv7-p0.7]
  B15:
    says: with cartoon's choice sketch rises
    rules: [random-conv1-p0.7 > baseline]
    targets: [sketch]
  B15-photo:
    says: with cartoon's choice photo rises
    rules: [random-conv1-p0.7 > baseline]
    targets: [photo]
  B14:
    says: p0 and position are not separable
    rules: [random-conv1-p0.7 - baseline > random-conv7-p0.7 - baseline]
    targets: [cartoon]
  A7:
    says: shaped learning is unstable
    figure: unsteadiness
    rules: [random-conv1-p0.7 > baseline]
  A8:
    says: the benefit grows with the shift
    trend: [random-conv1-p0.7, baseline]
  B19:
    says: every third layer destroys
    collapse: [da-conv7]
  A9:
    says: shaped training takes longer
    undecidable: "every arm has the same budget"
tables:
  shaping:
    title: "Random maps and target maps"
    published: [report-B report T2, report-B report T7]
    baseline: baseline
    arms:
      baseline: {mode: baseline}
      binarize-conv1: {mode: random, layers: 1, p_zero: 0}
      random-conv1-p0.4: {mode: random, layers: 1, p_zero: 0.4}
      random-conv1-p0.7: {mode: random, layers: 1, p_zero: 0.7}
      random-conv7-p0.7: {mode: random, layers: 7, p_zero: 0.7}
      random-conv10-p0.5: {mode: random, layers: 10, p_zero: 0.5}
      bn-only: {mode: da, layers: 4, record_mode: train, apply_maps: false}
      da-conv4: {mode: da, layers: 4, record_mode: train}
      da-conv7: {mode: da, layers: 7, record_mode: train}
      dropout2d: {mode: dropout2d, layers: 10, drop_rate: 0.5}
profiles: {full: {}}
"""


def draws(seed, scale=None):
    """Accuracies [arm][target][seed of five] of one study without effects.

    Args:
        seed: of the study.
        scale: factor of the spread by arm, where arms differ.
    """
    generator = np.random.default_rng([seed, 20])
    own = generator.normal(size=(len(ARMS), len(TARGETS), 5))
    shared = generator.normal(size=(len(TARGETS), 5)) * OF_A_SEED
    factor = np.array([(scale or {}).get(arm, 1.0) for arm in ARMS])[:, None, None]
    sd = np.array([SPREAD[t] for t in TARGETS])[:, None]
    base = np.array([BASELINE[t] for t in TARGETS])[:, None]
    return base + own * sd * factor + shared


def study_in_memory(seed, effects=None, seeds=5, scale=None, margin=None):
    """A study of figures alone, without records: for simulations of many."""
    values = draws(seed, scale)[..., :seeds]
    figures = {
        name: {
            target: values[i, j] + (effects or {}).get(name, {}).get(target, 0.0)
            for j, target in enumerate(TARGETS)
        }
        for i, name in enumerate(ARMS)
    }
    return study_of(figures, PRIMARY, margin)


def few_trainings(seed, trainings=5, tests=2, alike=0.95):
    """A study without effects, in memory, whose arms are `tests` tests of each of some trainings.

    The tests of a training correlate by `alike`. Of each two trainings that are neighbours the first
    tests are compared, and the last tests of the first two.
    """
    generator = np.random.default_rng([seed, 21])
    own = generator.normal(size=(trainings, 1, len(TARGETS), 5)) * alike**0.5
    own = own + generator.normal(size=(trainings, tests, len(TARGETS), 5)) * (1 - alike) ** 0.5
    shared = generator.normal(size=(len(TARGETS), 5)) * OF_A_SEED
    figures, training_of = {}, {}
    for i in range(trainings):
        for k in range(tests):
            name = f"{'abcdefgh'[i]}{k}"
            training_of[name] = name[0]
            figures[name] = {
                t: BASELINE[t] + own[i, k, j] * SPREAD[t] + shared[j] for j, t in enumerate(TARGETS)
            }
    first = [f"{letter}0" for letter in "abcdefgh"[:trainings]]
    primary = [*zip(first[1:], first, strict=False), (f"b{tests - 1}", f"a{tests - 1}")]
    return study_of(figures, primary, training_of=training_of)


def study_of(figures, primary=(), margin=None, training_of=None):
    """A study in memory of one table.

    Args:
        figures: by arm and target, one of each seed.
        training_of: the training that an arm tests, where several arms test one; default: its own.
    """
    arms = []
    for name, of_targets in figures.items():
        training = (training_of or {}).get(name, name)
        planned, results = {}, {}
        for target, of_seeds in of_targets.items():
            for s, value in enumerate(of_seeds):
                key = ("art_painting", target, s)
                planned[key] = f"{training}-{target}-s{s}/{name}"
                results[key] = SimpleNamespace(summary={FIGURE: float(value)})
        arms.append(Arm(name, planned, results))
    by_name = {arm.name: arm for arm in arms}
    table = Table("shaping", "", arms, baseline=arms[0])
    pairs = [(by_name[a], by_name[b]) for a, b in primary]
    return Study(Path(), "simulated", "", [table], {}, [], [], primary=pairs, margin=margin)


def claimed(study, **claim):
    """What becomes of a claim about a study in memory, whose arms nothing confounds."""
    nothing = {table.name: comparisons.Matchups([], []) for table in study.tables}
    with mock.patch.object(claims, "confounds_of", lambda *_: []):
        outcome, why = claims.decision(
            study, Comparisons(study, nothing, {}), ClaimIndex(says="x", **claim)
        )
    return outcome, why


def compared(study):
    """The primary comparisons of a study in memory."""
    nothing = {table.name: comparisons.Matchups([], []) for table in study.tables}
    return Comparisons(study, nothing, {}).primary


def accuracy_of(seed=0, effects=EFFECTS):
    """For `made_records.write_suite`: the accuracy of a run by its switches, with these effects."""
    values = draws(seed)

    def arm(config):
        options = config.options
        if config.mode == "random":
            p = options.p_zero[0]
            return "binarize-conv1" if p == 0 else f"random-conv{options.layers[0]}-p{p:g}"
        if config.mode == "da":
            return f"da-conv{options.layers[0]}" if options.apply_maps else "bn-only"
        return config.mode

    def accuracy(config, test, share):
        name = arm(config)
        i, j = ARMS.index(name), TARGETS.index(test.domain)
        wave = 2.0 * np.sin(37 * share + config.seed) * (name.startswith("random") + 0.3)
        late = values[i, j, config.seed] + effects.get(name, {}).get(test.domain, 0.0)
        return float(late - 8 * (1 - share) + wave * (share < 1))

    return accuracy


if __name__ == "__main__":
    from made_records import write_suite

    write_suite(Path(sys.argv[1]), SUITE, accuracy_of())
