"""What a run leaves in its folder, field by field.

    config.yaml          every switch; `run.py --config` runs it again
    metrics.jsonl        one line per epoch (`Row`)
    checkpoint.pt        what a killed run goes on from; after the last epoch, what tests read
    training.json        the record of the training (`TrainingRecord`), sealed
    evaluations/         one record per test (`EvaluationRecord`), sealed, and beside it what the
                         network said of each image: NAME.npz and NAME-features.npz
    summary.json         for people: the figures of the first target (`summary`); nothing reads it
    curves.png maps.png  pictures

A training is known by its key, the hash of everything that decides its weights. An evaluation names
the key of its training and the digest of the weights that it tested.

A run draws an identity when it starts. Its epochs and its record carry it, so that the parts of two
runs cannot pass for one.

A seal is a hash over a record and the files that it summarizes. It shows that a file was edited, cut
or exchanged. It is no signature: whoever runs this code can seal anything.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from domainshift.config import Test
from domainshift.records.claims import different_pairs, rules_of

VERSION = 4  # of the records; raised when a reader of older ones would err

CONFIG, METRICS, CHECKPOINT = "config.yaml", "metrics.jsonl", "checkpoint.pt"
TRAINING, EVALUATIONS, SUMMARY = "training.json", "evaluations", "summary.json"
SUITE, FAILURE = "suite.json", "failure.json"  # of a suite: its plan; how a training of it failed


BATCH_LOSS = (
    "sum of the mean losses of batches of batch_size images, over the number of images: the unit of "
    "the published reports"
)
SKIPPED = "of these steps, those that moved no weight because a float16 gradient was not finite"
Versions = dict[str, str | int | None]


class Record(BaseModel):
    """A frozen set of fields; unknown ones, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Count(Record):
    """One test set at one epoch."""

    correct: int = Field(description="images classified right")
    total: int = Field(description="images tested")
    loss: float = Field(description="mean cross-entropy")
    batch_loss: float = Field(description=BATCH_LOSS)


class Row(Record):
    """One epoch: a line of metrics.jsonl."""

    epoch: int = Field(description="number of the epoch, from 1")
    train_loss: float = Field(description="mean loss of the epoch's training images")
    source_train_correct: int = Field(description="training images classified right while training")
    source_train_total: int = Field(description="training images seen")
    lr: float = Field(description="learning rate at the start of the epoch")
    train_seconds: float = Field(description="seconds of training, tests left out")
    seconds: float = Field(description="seconds of the whole epoch")
    updates: int = Field(description="optimizer steps, skipped ones included")
    skipped: int = Field(description=SKIPPED)
    passes: int = Field(description="training passes; accumulation makes several per update")
    fired: dict[str, int] = Field(description="how often each shaped layer was shaped in training")
    density: dict[str, float] = Field(description="share of ones in each layer's last map")
    bn_untouched: bool | None = Field(
        description="whether images of other domains left BatchNorm's statistics alone; null: none came"
    )
    run: str = Field(description="identity of the run that the epoch belongs to")
    versions: Versions = Field(description="what computed the epoch")
    tests: dict[str, Count] = Field(description="tests after this epoch, by name; often none")


class DomainData(Record):
    """The images of one domain that a run could read."""

    digest: str = Field(description="hash of the images' names and content")
    counts: list[int] = Field(description="images per class, in the order of `classes`")


class WeightsRecord(Record):
    """Where the initial weights came from."""

    source: str = Field(description="imagenet, none, or the name of a file")
    sha256: str | None = Field(description="of the file; null for none")


class TrainingRecord(Record):
    """training.json: what was trained, on what, by which code, and how it went."""

    version: int = Field(description="of this schema")
    key: str = Field(description="hash of everything that decides the weights; evaluations name it")
    run: str = Field(
        description="identity of the run, drawn when it started; its epochs have it too"
    )
    mode: str = Field(description="the method")
    source: str = Field(description="labelled domain")
    targets: list[str] = Field(description="domains whose unlabelled images training saw")
    seed: int = Field(description="of weights, data order, augmentation and maps")
    data: str = Field(description="name of the data set")
    classes: list[str] = Field(description="names of the classes, in the order of the labels")
    domains: dict[str, DomainData] = Field(description="what training read, by domain")
    held_out: list[int] = Field(description="source images held out, per class")
    switches: dict[str, Any] = Field(description="every switch that decides the weights")
    places: dict[str, Any] = Field(description="switches that decide where and how it was computed")
    layers: list[str] = Field(description="names of the shaped modules")
    epochs: int = Field(description="passes over the source; the last one may be cut short")
    updates: int = Field(description="optimizer steps, skipped ones included")
    skipped: int = Field(description=SKIPPED)
    passes: int = Field(description="training passes; accumulation makes several per update")
    train_loss: float = Field(description="of the last epoch")
    source_train_accuracy: float = Field(description="percent, of the last epoch, while training")
    fired: dict[str, int] = Field(description="how often each shaped layer was shaped in training")
    density: dict[str, float] = Field(description="share of ones in each layer's last map")
    bn_untouched: bool | None = Field(
        description="whether images of other domains left BatchNorm's statistics alone; null: none came"
    )
    seconds: float = Field(description="of training, tests left out")
    images_per_second: float = Field(description="of training")
    weights: WeightsRecord = Field(description="initial weights")
    weights_digest: str = Field(description="hash of the trained weights; evaluations name it")
    versions: Versions = Field(description="what computed the last epoch")
    warnings: list[str] = Field(description="what a reader must know")
    seal: str = Field("", description="hash of this record and of metrics.jsonl")


class EvaluationRecord(Record):
    """evaluations/NAME.json: one test of a training's last weights."""

    version: int = Field(description="of this schema")
    name: str = Field(description="the test's name, also of its files")
    training: str = Field(description="key of the training")
    weights_digest: str = Field(description="hash of the weights that were tested")
    epoch: int = Field(description="after which they were tested")
    domain: str = Field(description="the tested domain")
    images: Literal["all", "holdout", "train"] = Field(
        description="all of the domain; the held-out part of the source; its training images, as "
        "report A tested by mistake (no result)"
    )
    at_eval: str = Field(description="shaping while testing: off, binarize or on")
    bn: str = Field(description="BatchNorm as trained, measured on the source, or on the target")
    digest: str = Field(description="hash of the domain's images")
    counts: list[int] = Field(description="images of the domain per class, tested or not")
    classes: list[str] = Field(description="names of the classes, in the order of the labels")
    confusion: list[list[int]] = Field(description="images, [true class][predicted class]")
    correct: int = Field(description="images classified right")
    total: int = Field(description="images tested")
    accuracy: float = Field(description="percent")
    macro_accuracy: float = Field(description="percent, mean over the classes that occur")
    per_class: dict[str, dict[str, float | int | None]] = Field(
        description="correct, total and accuracy (percent) of each class"
    )
    majority_rate: float = Field(
        description="percent that the largest true class alone would score"
    )
    collapsed: bool = Field(description="whether every prediction is one class")
    collapsed_to: str | None = Field(description="that class")
    loss: float = Field(description="mean cross-entropy")
    batch_loss: float = Field(description=BATCH_LOSS)
    predictions: str = Field(description="sha256 of NAME.npz: labels, predicted, logits (float16)")
    features: str = Field(description="sha256 of NAME-features.npz: pooled features (float16)")
    seconds: float = Field(description="of the test")
    versions: Versions = Field(description="what computed the test")
    seal: str = Field("", description="hash of this record")


# --- suite.json -------------------------------------------------------------------------------


class Cell(Record):
    """One evaluation of an arm: which test of which training it is."""

    source: str = Field(description="labelled domain")
    target: str = Field(description="tested domain")
    seed: int = Field(description="of the training")
    training: str = Field(description="folder of the training, beside suite.json")
    test: str = Field(description="name of the evaluation in that folder")


class ArmIndex(Record):
    """One way to train and test, over domains and seeds."""

    name: str = Field(description="of the arm, unique in the suite")
    cells: list[Cell] = Field(description="its evaluations, by source, target and seed")


class TableIndex(Record):
    """A table of the report."""

    name: str = Field(description="for --only and for links")
    title: str = Field(description="heading")
    note: str | None = Field(None, description="text under the heading")
    published: list[str] = Field(default=[], description="rows of published.csv it repeats")
    baseline: str | None = Field(None, description="the arm that the others are compared with")
    compare: list[tuple[str, str]] = Field(default=[], description="further (arm, reference)")
    arms: list[ArmIndex] = Field(description="in the order of the table")


class ClaimIndex(Record):
    """A published claim, and the rule that decides it; see `domainshift.report.claims`."""

    says: str = Field(description="the claim in a sentence")
    rules: list[str] = Field(default=[], description="what must hold, such as `arm > other`")
    figure: Literal["accuracy", "unsteadiness"] = Field(
        "accuracy", description="what the rules are about: accuracy or unsteadiness"
    )
    targets: list[str] | None = Field(None, description="null: every target of the arms")
    margin: float | None = Field(None, gt=0, description="points within which a rule with = holds")
    trend: tuple[str, str] | None = Field(
        None, description="(arm, reference) whose difference rises with the reference's error"
    )
    collapse: list[str] = Field(
        default=[], description="arms that call nearly everything one class"
    )
    undecidable: str | None = Field(None, description="why no run of the suite can decide it")
    note: str | None = Field(None, description="what a reader must know of it")

    @model_validator(mode="after")
    def _one_sound_rule(self) -> ClaimIndex:
        given = [n for n in ("rules", "trend", "collapse", "undecidable") if getattr(self, n)]
        if len(given) != 1:
            rules = " and ".join(given) or "none"
            raise ValueError(f"{rules} given; allowed: one of rules, trend, collapse, undecidable")
        rules_of(self)
        return self


class TrainingIndex(Record):
    """One training with all its tests."""

    key: str = Field(description="of the training that the folder must hold")
    switches: dict[str, Any] = Field(description="what run.py is given")
    tests: list[Test] = Field(description="every evaluation that an arm asks for")


class SuiteIndex(Record):
    """suite.json: the plan of a suite, written when it starts. What is done, the folders say."""

    format: Literal[2] = Field(2, description="of this file")
    suite: str = Field(description="name of the suite")
    profile: str = Field(description="full, mini or another of the suite")
    title: str = Field(description="heading of the report")
    command: str = Field(description="what runs the whole suite")
    primary: Annotated[list[tuple[str, str]], AfterValidator(different_pairs)] = Field(
        default=[], description="(arm, reference): the comparisons that get verdicts"
    )
    margin: float | None = Field(
        None,
        gt=0,
        description="points within which the arms of a primary comparison pass for equal",
    )
    claims: dict[str, ClaimIndex] = Field(default={}, description="published claims by number")
    tables: list[TableIndex] = Field(description="in the order of the report")
    trainings: dict[str, TrainingIndex] = Field(description="by folder")
