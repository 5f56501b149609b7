"""The suites of the study: what they ask, and that every published row is among it."""

import csv
import math
import re

import pytest
from domainshift.config import REPOSITORY
from domainshift.report import published
from domainshift.setup import set_up, training_key
from domainshift.sweep.estimate import work_of
from domainshift.sweep.plan import expand
from domainshift.sweep.schema import known_suites, read_suite
from paper_data import DATA, arms, cells, plan_of, switches, table_of

SUITES = ["answer", "controls", "report-a", "report-b", "study"]  # on PACS, in two sizes

COUNTS = {  # evaluations and trainings
    ("answer", "full"): (345, 85),
    ("answer", "mini"): (138, 34),
    ("report-b", "full"): (580, 500),
    ("report-b", "mini"): (206, 178),
    ("controls", "full"): (495, 225),
    ("controls", "mini"): (132, 72),
    ("study", "full"): (810, 280),
    ("study", "mini"): (168, 60),
    ("report-a", "full"): (135, 45),
    ("report-a", "mini"): (54, 18),
}


def test_the_suites():
    assert sorted(known_suites()) == [*SUITES, "toy"]


def test_the_suite_of_the_toy():
    """Its arms share trainings as their methods allow: two of them are one training, da is one a target."""
    plan = expand(read_suite("toy").in_profile("full"), {}, "cpu")
    assert (len(plan.evaluations(plan.jobs)), len(plan.jobs)) == (60, 25)


@pytest.mark.parametrize("name, profile", COUNTS)
def test_evaluations_and_trainings(name, profile):
    plan = plan_of(name, profile)
    assert (len(plan.evaluations(plan.jobs)), len(plan.jobs)) == COUNTS[name, profile]
    assert len({job.key for job in plan.jobs}) == len({job.name for job in plan.jobs}) == len(plan.jobs)  # fmt: skip
    seeds = [job.setup.config.seed for job in plan.jobs]
    assert seeds == sorted(seeds)  # a suite that is cut short has whole tables of fewer seeds


@pytest.mark.parametrize("name, profile", COUNTS)
def test_the_switches_of_a_training_are_all_it_takes(name, profile):
    for job in plan_of(name, profile).jobs:
        setup = set_up(job.values | {"device": "cpu"}, DATA)
        assert training_key(setup) == job.key
        assert set(setup.config.tests()) <= set(job.tests)
        assert job.tests[0].domain in setup.config.target


@pytest.mark.parametrize("name", SUITES)
def test_mini_is_a_miniature_of_full(name):
    full, mini = plan_of(name), plan_of(name, "mini")
    assert [(t.name, [a.name for a in t.arms]) for t in full.tables] == [
        (t.name, [a.name for a in t.arms]) for t in mini.tables
    ]
    assert {job.setup.config.seed for job in full.jobs} == {0, 1, 2, 3, 4}
    assert {job.setup.config.seed for job in mini.jobs} == {0, 1}
    pixels = 112 if name == "answer" else 224
    assert {(j.setup.config.limit, j.setup.config.image_size) for j in full.jobs} == {
        (None, pixels)
    }
    assert {(j.setup.config.limit, j.setup.config.image_size) for j in mini.jobs} == {(8, 64)}
    works = [sum(sum(work_of(j.setup, j.tests)) for j in plan.jobs) for plan in (full, mini)]
    assert works[0] > 40 * works[1]


@pytest.mark.parametrize("name", SUITES)
def test_learning_curves_are_measured_where_they_were_published(name):
    evaluate = {job.setup.config.evaluate for job in plan_of(name).jobs}
    assert evaluate == {
        "each" if name.startswith("report") else "5" if name == "answer" else "last"
    }


@pytest.mark.parametrize("name", SUITES)
def test_titles_and_notes_are_true_in_every_profile(name):
    """The report counts what a profile changes; nobody writes it by hand."""
    for table in plan_of(name).tables:
        words = f"{table.title} {table.note or ''}"
        numbers = re.findall(
            r"(?i)[\d,]+ (?:updates|images|epochs|seeds)|batch(?: size)? \d+", words
        )
        assert not numbers, (table.name, numbers)


def test_the_study_says_how_its_layers_were_chosen():
    note = table_of(plan_of("study"), "methods").note
    assert "target labels" in note and "an oracle" in note


@pytest.mark.parametrize("name, profile", COUNTS)
def test_arms_are_compared_at_equal_updates_and_batches(name, profile):
    """The arms of a table and its baseline see as many updates, of as many images."""
    plan = plan_of(name, profile)
    configs = {job.name: job.setup.config for job in plan.jobs}
    of_arm = {arm.name: arm.cells for table in plan.tables for arm in table.arms}
    for table in plan.tables:
        budgets = {}
        for arm in [*(arm.cells for arm in table.arms), of_arm.get(table.baseline, [])]:
            for cell in arm:
                config = configs[cell.training]
                images = sum(DATA.counts(config.source, config.limit))
                budget = (config.batch_size, config.length(images)[1], config.holdout)
                budgets.setdefault(cell.source, set()).add(budget)
        assert all(len(values) == 1 for values in budgets.values()), (table.name, budgets)


# --- published rows ---------------------------------------------------------------------------

MODES = {"baseline": "baseline", "random": "random", "DA": "da"}
CONVS = (
    "conv1 layer1.0.conv1 layer1.0.conv2 layer1.1.conv1 layer1.1.conv2 layer2.0.conv1 "
    "layer2.0.conv2 layer2.0.downsample.0 layer2.1.conv1 layer2.1.conv2 layer3.0.conv1 "
    "layer3.0.conv2 layer3.0.downsample.0 layer3.1.conv1 layer3.1.conv2 layer4.0.conv1 "
    "layer4.0.conv2 layer4.0.downsample.0 layer4.1.conv1 layer4.1.conv2"
).split()
KINDS = {"Conv2d": "conv", "BatchNorm2d": "bn", "ReLU": "relu"}

# Rows whose p_zero cannot be known: (source, what p_zero says, how the note begins) -> the p_zero of
# their arm, and why.
NOT_RECORDED = {
    ("report-A", "", "log final"): (0.2, "the log does not say; 0.2 is what the text says"),
    ("report-B", "const 0.7?", "report T9"): (0.7, "not stated; where the falling p0 begins"),
    ("report-B", "const (value not recorded)", "training log"): (0.7, "the log of that row"),
}


def published_rows():
    path = REPOSITORY / "experiments" / "published.csv"
    rows = csv.DictReader(path.read_text().splitlines())
    return [row for row in rows if row["source"] in ("report-A", "report-B")]


def begins(about, label):
    return re.match(rf"{re.escape(label)}(?!\w)", about)  # report T1 does not begin report T10


def asked(row):
    """(mode, layers, p_zero) of a published row."""
    layers = row["layers"]
    if every := re.fullmatch(r"every (\d)(?:rd|th|nd) (\w+)", layers):
        layers = (KINDS[every[2]], "all", int(every[1]))
    else:
        layers = tuple(layers.split("+")) if layers else ()
    p_zero = row["p_zero"]
    for (source, words, note), (value, _) in NOT_RECORDED.items():
        if row["method"] == "random" and (row["source"], p_zero) == (source, words):
            assert row["note"].startswith(note)
            p_zero = str(value)
    return MODES[row["method"]], layers, tuple(float(p) for p in p_zero.split("|") if p)


def ours(values):
    """The same of an arm. Every third convolution is what the published rows list by name."""
    layers = values.get("layers", [])
    if layers and layers != ["all"]:
        layers = tuple(CONVS[number - 1] for number in layers)
    elif layers and (values["after"], values["every"]) == ("conv", 3):
        layers = tuple(CONVS[2::3])
    else:
        layers = (values["after"], "all", values["every"]) if layers else ()
    return values["mode"], layers, tuple(values.get("p_zero", ()))


@pytest.mark.parametrize("row", published_rows(), ids=lambda r: f"{r['source']} {r['note'][:24]}")
def test_every_published_row_has_its_evaluation(row):
    preset, mode = row["source"].lower(), MODES[row["method"]]
    plan = plan_of(preset)
    about = f"{row['source']} {row['note']}"
    claiming = [t for t in plan.tables if any(begins(about, label) for label in t.published)]
    batch_size = set_up({"preset": preset, "mode": mode} | ({"layers": 4} if mode == "da" else {}),
                        DATA).config.batch_size  # fmt: skip
    matching = [
        values
        for table in claiming
        for _, cell in cells(plan, table.name)
        if (cell.source, cell.target, cell.seed) == ("art_painting", row["target"], 0)
        for values in [switches(plan, cell)]
        if ours(values) == asked(row) and values["batch_size"] == batch_size
    ]
    names = [table.name for table in claiming]
    assert matching, f"no arm of {names} is {asked(row)} on {row['target']}"
    for values in matching:
        assert values["preset"] == preset and values["epochs"] == 30
        invalid = "source-train" if row["status"] == "invalid" else "target"
        assert values["test_set"] == invalid
        if mode == "da":
            assert values["product"] and values["record_mode"] == "train"
            assert values["pairing"] == "modulo"


def test_all_published_rows_are_looked_at_and_no_assumption_is_idle():
    rows = published_rows()
    assert len(rows) == 134
    unknown = [r for r in rows if r["method"] == "random" and not r["p_zero"][:3].strip("const ")]
    assert len(unknown) == 9 + 1 + 1
    words = {(r["source"], r["p_zero"]) for r in unknown}
    assert words == {(source, p_zero) for source, p_zero, _ in NOT_RECORDED}


@pytest.mark.parametrize("name", SUITES)
def test_every_label_of_a_table_is_of_published_rows(name):
    rows = published.rows()
    for table in plan_of(name).tables:
        for label in table.published:
            assert any(published.is_called(row, label) for row in rows), (table.name, label)


def test_decreasing_p_zero_is_the_reports_formula():
    values = arms(plan_of("report-b"), "decreasing-p-zero")["random-conv1to7-falling"]
    assert values["p_zero"] == [round(0.9682 * math.exp(-0.324 * k), 2) for k in range(1, 8)]
    assert values["layers"] == [1, 2, 3, 4, 5, 6, 7]


def test_report_b_adapts_to_every_target():
    plan = plan_of("report-b")
    for table in ("da-positions", "da-combinations"):
        targets = {}
        for arm, cell in cells(plan, table):
            targets.setdefault(arm, set()).add(cell.target)
        assert all(names == {"cartoon", "sketch", "photo"} for names in targets.values())


def test_target_maps_by_the_text_are_at_several_positions():
    values = arms(plan_of("report-b"), "as-the-text-says")
    as_code = values.pop("da-conv4")
    assert as_code["layers"] == [4] and as_code["product"] and not as_code["binarize"]
    assert [v["layers"] for v in values.values()] == [[1], [4], [7], [9]]
    for v in values.values():
        assert v["binarize"] and not v["product"] and v["record_mode"] == "eval"


def test_report_a_has_the_rates_that_fail_and_compares_neighbours():
    plan = plan_of("report-a")
    rates = [v["p_zero"] for v in arms(plan, "rates").values()]
    assert rates == [[0.05], [0.1], [0.2], [0.6]]
    for table, count in (("hook-place", 3), ("every", 3), ("rates", 3)):
        pairs, values = table_of(plan, table).compare, arms(plan, table)
        assert len(pairs) == count
        for arm, reference in pairs:
            assert len(differing(values[arm], values[reference])) == 1


def test_report_a_trains_once_for_all_targets():
    for job in plan_of("report-a").jobs:
        domains = [test.domain for test in job.tests if test.images == "all"]
        assert domains == ["cartoon", "sketch", "photo"]
        invalid = [test.domain for test in job.tests if test.images == "train"]
        assert invalid == (["art_painting"] if job.setup.config.mode == "random" else [])


def test_controls_change_one_thing_each():
    plan = plan_of("controls")
    base = arms(plan, "template")["baseline"]
    assert (base["preset"], base["batch_size"], base["epochs"]) == ("course-template", 128, 30)

    record = arms(plan, "record")
    assert not record["bn-only"]["apply_maps"] and record["bn-only"]["record_mode"] == "train"
    assert record["da-conv4-record-train"]["record_mode"] == "train"
    assert record["da-conv4"]["record_mode"] == "eval"
    binarize = arms(plan, "binarize-only")
    assert binarize["binarize-conv1"]["p_zero"] == binarize["binarize-conv10"]["p_zero"] == [0.0]
    for table in ("gradient-random", "gradient-da"):
        gradients = [v["gradient"] for v in arms(plan, table).values() if v["layers"] == [4]]
        assert sorted(gradients) == ["clipped", "straight_through", "zero"]
    for size in (64, 128, 256):
        for arm in table_of(plan, f"batch-{size}").arms:
            for cell in arm.cells:
                (job,) = [job for job in plan.jobs if job.name == cell.training]
                config = job.setup.config
                assert (config.batch_size, config.length(2048)[1]) == (size, 480)


def differing(a, b):
    """Names of the switches in which two evaluations differ; of one without a switch it is None."""
    return {name for name in {*a, *b} if a.get(name) != b.get(name)}


def test_clipping_is_asked_for_where_activations_exceed_1():
    """After conv 10 nearly none does: clipped would be straight through."""
    plan = plan_of("controls")
    values = [switches(plan, arm.cells[0]) for table in plan.tables for arm in table.arms]
    assert {tuple(v["layers"]) for v in values if v.get("gradient") == "clipped"} == {(4,)}


def test_controls_of_density_differ_from_target_maps_in_the_maps_alone():
    values = arms(plan_of("controls"), "density")
    target = values["da-conv4"]
    assert differing(target, values["source-maps-conv4"]) == {"mask_sources"}
    assert differing(target, values["da-conv4-shuffled"]) == {"target_transform"}
    assert differing(target, values["da-conv4-top0.29"]) == {"top_k"}
    random = values["random-conv4-p0.71"]
    assert 1 - random["p_zero"][0] == pytest.approx(values["da-conv4-top0.29"]["top_k"])
    assert all(random[name] == target[name] for name in ("layers", "binarize", "gradient"))


def test_dropout_is_compared_with_random_maps_one_factor_at_a_time():
    """dropout2d is not binarized, per channel and rescaled (`test_dropout` shows that it is)."""
    table = table_of(plan_of("controls"), "dropout")
    values = arms(plan_of("controls"), "dropout")

    def factors(name):
        v = values[name]
        if v["mode"] == "dropout2d":
            return False, "channel", True
        return v["binarize"], v["mask_unit"], v["mode"] == "random-rescaled"

    assert len(table.compare) == 5
    for pair in table.compare:
        a, b = map(factors, pair)
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1, pair


def test_the_best_arm_of_report_b_varies_in_one_switch_at_a_time():
    table, values = (f(plan_of("report-b"), "best-arm") for f in (table_of, arms))
    best = values["random-conv1-p0.7"]
    assert (best["layers"], best["p_zero"]) == ([1], [0.7])
    assert (best["gradient"], best["at_eval"]) == ("zero", "on")
    assert {name for name, _ in table.compare} == {*values} - {"random-conv1-p0.7"}
    changes = [differing(values[arm], values[reference]) for arm, reference in table.compare]
    assert changes == [{"at_eval"}, {"at_eval"}, {"gradient"}, {"gradient"}]


def test_shaping_while_testing_is_six_tests_of_one_training():
    plan = plan_of("controls")
    at_test = [(arm, cell) for arm, cell in cells(plan, "at-test") if arm != "baseline-recal"]
    how = {
        (s["at_eval"], s["bn_at_test"])
        for name, s in arms(plan, "at-test").items()
        if name != "baseline-recal"
    }
    assert how == {(at, bn) for at in ("off", "binarize", "on") for bn in ("trained", "source")}
    assert len({cell.training for _, cell in at_test}) == 5  # seeds
    assert len({(cell.training, cell.test) for _, cell in at_test}) == len(at_test) == 6 * 3 * 5
    recal = arms(plan, "at-test")["baseline-recal"]
    assert (recal["mode"], recal["bn_at_test"]) == ("baseline", "source")
    measured = {arm for arm, _ in at_test if "recal" in arm}
    assert set(table_of(plan, "at-test").compare) == {(arm, "baseline-recal") for arm in measured}


def test_study_is_all_pairs_all_methods_five_seeds():
    plan = plan_of("study")
    methods = cells(plan, "methods")
    assert len(methods) == 13 * 12 * 5 == len({(cell.training, cell.test) for _, cell in methods})
    assert len({(cell.source, cell.target) for _, cell in methods}) == 12
    values = arms(plan, "methods")
    statistics = {name: (s["mode"], s["bn_at_test"]) for name, s in values.items()}
    assert statistics == {
        "baseline": ("baseline", "trained"),
        "random-conv10-p0.5": ("random", "source"),
        "da-conv4": ("da", "source"),
        "da-conv4-no-recal": ("da", "trained"),
        "adabn": ("baseline", "target"),  # the baseline's training
        "dropout2d-conv10-p0.5": ("dropout2d", "source"),
        "dann": ("dann", "trained"),
        "dann-weight0": ("dann", "trained"),
        "mixstyle": ("mixstyle", "trained"),
        "mixstyle-recal": ("mixstyle", "source"),
        "random-conv10-p0.5-adabn": ("random", "target"),
        "da-conv4-adabn": ("da", "target"),
        "baseline-recal": ("baseline", "source"),
    }
    assert differing(values["dann"], values["dann-weight0"]) == {"dann_weight"}
    trainings = {
        arm.name: {cell.training for cell in arm.cells} for arm in table_of(plan, "methods").arms
    }
    assert trainings["baseline"] == trainings["baseline-recal"] == trainings["adabn"]
    assert trainings["da-conv4"] == trainings["da-conv4-no-recal"] == trainings["da-conv4-adabn"]
    assert trainings["random-conv10-p0.5"] == trainings["random-conv10-p0.5-adabn"]
    assert trainings["mixstyle"] == trainings["mixstyle-recal"]
    tuned = arms(plan, "dann-tuned")["dann-tuned"]
    assert (tuned["mode"], tuned["updates"], tuned["dann_lr_factor"]) == ("dann", 5000, 10.0)
