"""What the pictures of a report draw."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from domainshift.report import figures
from domainshift.report.comparisons import Verdict, with_interval
from domainshift.report.study import Arm, Study, Table
from made_records import EXACT, exact, report_of, write_suite
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from simulated import EFFECTS, PRIMARY, TARGETS, compared, study_in_memory

SWEEP = """
title: sweep
defaults: {preset: report-b, weights: imagenet, epochs: 2, limit: 50}
sources: [art_painting]
targets: [cartoon]
seeds: [0, 1]
tables:
  p-zero:
    title: sweep of p0
    published: [report-B report T3]
    baseline: baseline
    switches: {mode: random, layers: [1]}
    grid: {p_zero: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9]}
    name: "p{p_zero}"
  places:
    title: places
    baseline: baseline
    switches: {mode: random, p_zero: 0.7}
    grid: {layers: [1, 4, 7]}
    name: "conv{layers}"
  baselines:
    title: baselines
    arms: {baseline: {mode: baseline}}
profiles: {full: {}}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return report_of(write_suite(tmp_path_factory.mktemp("f") / "small", EXACT, exact))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    def accuracy(config, test, share):
        p_zero = getattr(config.options, "p_zero", None)
        return 40 if p_zero is None else 50 - 10 * p_zero[0] + 2 * config.seed

    return report_of(write_suite(tmp_path_factory.mktemp("s") / "s", SWEEP, accuracy))


def picture(report, title, section=0):
    return next(p for p in report.sections[section].pictures if p.title.startswith(title))


def drawn(figure):
    """Label -> (x, y) of every line of the first panel."""
    axes = figure.axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    bars = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    return lines | bars


def test_accuracy_over_p_zero(sweep):
    lines = drawn(picture(sweep, "Accuracy over p0").figure)
    ours = lines["ours, mean and spread over seeds"]
    assert [x for x, _ in ours] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9]
    assert ours[0][1] == pytest.approx(51) and ours[-1][1] == pytest.approx(42, abs=0.01)
    assert lines["published"] == [[0, 54.78], [0.2, 54.69], [0.4, 57.42], [0.5, 58], [0.9, 51.88]]
    assert lines["published, no run"] == [[0.1, 54.82], [0.3, 55.82]]  # and in no fit
    fit = dict(lines["fit to ours"])
    assert fit[0.0] == pytest.approx(51, abs=0.3) and fit[0.9] == pytest.approx(42, abs=0.3)
    assert "fit to published" not in lines  # five points are too few for a curve of degree 4
    assert lines["ours: baseline"][0][1] == pytest.approx(40)


def test_a_fit_goes_through_a_polynomial_of_its_degree():
    axes = Figure().subplots()
    points = [(x / 10, 50 + x - 0.02 * x**4) for x in range(7)]
    assert figures.draw_fit(axes, points, "black", "fit")
    for x, y in axes.lines[0].get_xydata():
        assert y == pytest.approx(50 + 10 * x - 200 * x**4, abs=1e-9)
    assert not figures.draw_fit(axes, points[:5], "black", "fit")


def test_accuracy_by_position(sweep):
    by_position = picture(sweep, "Accuracy by position", section=1)
    ours = drawn(by_position.figure)["ours, mean and spread over seeds"]
    assert [x for x, _ in ours] == [1, 4, 7]
    assert [y for _, y in ours] == pytest.approx([44, 44, 44])
    label = by_position.figure.axes[-1].get_xlabel()
    assert label == "convolution (8, 13, 18 are downsample layers)"


def test_learning_curves(built):
    figure = picture(built, "Learning").figure
    assert drawn(figure)["baseline"] == [[1, 46], [2, 46], [3, 40]]
    assert len(figure.axes) == 2  # a panel a target


def bands(axes):
    """Lowest and highest values, by epoch, of every band of a panel."""
    found = []
    for band in axes.collections:
        assert band.get_alpha() == 0.15
        by_epoch = {}
        for x, y in band.get_paths()[0].vertices.tolist():
            by_epoch.setdefault(x, []).append(y)
        found.append({x: (min(ys), max(ys)) for x, ys in by_epoch.items()})
    return found


def test_learning_curves_have_bands_of_one_standard_deviation(built):
    learning = picture(built, "Learning")
    baseline, random, _ = bands(learning.figure.axes[0])
    assert baseline[3] == (40, 40)
    sd = math.sqrt(4 / 3)  # of 44, 44 and 46
    assert random[3] == pytest.approx((134 / 3 - sd, 134 / 3 + sd))
    assert "one standard deviation over seeds" in learning.caption


def test_learning_curves_of_one_seed_have_no_band(tmp_path):
    text = EXACT.replace("seeds: [0, 1, 2]", "seeds: [0]")
    learning = picture(report_of(write_suite(tmp_path / "m", text, exact)), "Learning")
    assert all(not axes.collections for axes in learning.figure.axes)
    assert "No line has a band" in learning.caption


def test_a_mean_curve_spreads_as_the_seeds_means_over_pairs_do():
    """Seeds that are high on one pair and low on another have no spread."""
    one, other = {0: {1: 10.0, 2: 20.0}, 1: {1: 14.0, 2: 20.0}}, {0: {1: 14.0}, 1: {1: 10.0}}
    assert figures.mean_curve([one, other]) == ([1], [12], [0])
    assert figures.mean_curve([one])[2] == pytest.approx([math.sqrt(8), 0])
    assert figures.mean_curve([one, {0: {1: 14.0}}]) == ([1], [13], None)  # unlike seeds
    assert figures.mean_curve([{0: {1: 14.0}}]) == ([1], [14], None)
    assert figures.mean_curve([]) == ([], [], None)


def test_no_learning_curves_where_only_the_last_epoch_was_tested(sweep):
    assert not any(p.title.startswith("Learning") for p in sweep.sections[0].pictures)


def test_learning_curves_of_many_pairs_are_their_mean(tmp_path):
    """Six pairs, of which da lacks one: the mean is over the other five."""
    text = EXACT.replace("[art_painting]", "[art_painting, sketch]").replace(
        "[cartoon, sketch]", "[art_painting, cartoon, photo, sketch]"
    )
    gone = [("da", "photo", seed, "sketch") for seed in range(3)]
    built = report_of(write_suite(tmp_path / "m", text, exact, without=gone))
    learning = picture(built, "Learning")
    (axes,) = learning.figure.axes
    assert axes.get_title(loc="left") == "mean over 5 source-target pairs"
    curves = drawn(learning.figure)
    # one of the five is sketch, which is ten points above
    assert curves["baseline"] == [[1, 48], [2, 48], [3, 42]]
    assert curves["random"][-1] == pytest.approx([3, 42 + 14 / 3])
    assert learning.caption.endswith("every arm here has a run, 5 of 6.")


def test_the_matrix_of_pairs(tmp_path):
    text = EXACT.replace("[art_painting]", "[art_painting, sketch]")
    gone = [("da", "sketch", seed) for seed in range(3)]
    built = report_of(write_suite(tmp_path / "m", text, exact, without=gone))
    matrix = built.sections[0].pictures[0]
    assert matrix.title == "Source-target pairs: Random maps and target maps"
    texts = {
        axes.get_title(): {(t.get_position(), t.get_text()) for t in axes.texts}
        for axes in matrix.figure.axes
    }
    # rows art_painting, sketch; columns cartoon, sketch; sketch to itself is no pair
    places = [(0.5, 0.5), (1.5, 0.5), (0.5, 1.5)]
    assert texts["baseline, %"] == set(zip(places, ["40.0", "50.0", "40.0"], strict=True))
    assert texts["random minus baseline"] == {(place, "+4.7") for place in places}
    assert len(texts["da minus baseline"]) == 2  # a pair without runs is empty


def test_density_by_layer(built, sweep):
    results = list(built.study.results.values())
    # one network a target and seed
    (layers,) = figures.densities(results).values()
    assert layers == {"layer1.1.conv1": pytest.approx([0.4] * 6)}
    assert "layer1.1.conv1 (4)" in figures.density(results).svg
    of_random = list(sweep.study.results.values())
    assert figures.density(of_random) is None
    assert max(figures.random_densities(of_random)) < 1e-6  # of whole elements


def test_pictures_take_the_pages_colour(built):
    primary = built.comparisons.primary
    every = [*built.sections[0].pictures, figures.forest(primary), figures.cost(built.study)]
    for p in [*every, *figures.confusions(built.study, primary)]:
        assert "currentColor" in p.svg and figures.INK not in p.svg
        assert p.svg == p.svg and "<metadata>" not in p.svg


def test_two_figures_of_the_same_records_are_the_same_bytes(built):
    primary = built.comparisons.primary
    for draw in (
        lambda: figures.forest(primary),
        lambda: figures.confusions(built.study, primary)[0],
        lambda: figures.cost(built.study),
    ):
        assert draw().svg == draw().svg


def test_no_text_is_too_small_to_read(built, sweep, tmp_path):
    text = EXACT.replace("[art_painting]", "[art_painting, sketch]")
    many = report_of(write_suite(tmp_path / "m", text, exact))
    results = list(built.study.results.values())
    every = [p for report in (built, sweep, many) for s in report.sections for p in s.pictures]
    every += [figures.density(results), figures.cost(built.study)]
    every += figures.confusions(built.study, built.comparisons.primary)
    every.append(figures.forest(built.comparisons.primary))
    for p in every:
        texts = re.findall(r"<text[^>]*style=\"[^\"]*\"", p.svg)
        sizes = [float(size) for text in texts for size in re.findall(r"font(?:-size)?:[^;]*?([\d.]+)px", text)]  # fmt: skip
        assert len(sizes) == len(texts) > 0
        assert min(sizes) >= figures.SMALLEST > 10, p.title


# --- primary comparisons ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def primary():
    """Eighteen comparisons with every verdict that an interval can have."""
    return compared(study_in_memory(0, EFFECTS, margin=4.0))


def words(figure):
    """(words, place) of the headings, the targets, the numbers and the verdicts of a forest plot."""
    texts = [(t.get_text(), *t.xy) for t in figure.axes[0].texts]
    return [
        [(text, y) for text, x, y in sorted(texts, key=lambda t: t[2]) if x == at]
        for at in (0, 0.02, figures.NUMBERS, 1)
    ]


def points(axes):
    """Place -> (mean, colour, marker) of the points."""
    lines = [line for line in axes.lines if line.get_marker() != "None"]
    return {
        line.get_ydata()[0]: (line.get_xdata()[0], line.get_color(), line.get_marker())
        for line in lines
    }


def intervals(axes):
    """Place -> (low, high) of the lines at the points."""
    found = {}
    for lines in axes.collections:
        if hasattr(lines, "get_segments"):
            (((low, y), (high, _)),) = lines.get_segments()
            found[y] = low, high
    return found


def margins(axes):
    """The band's limits in each group."""
    found = [c for c in axes.collections if not hasattr(c, "get_segments")]
    extents = [c.get_paths()[0].get_extents() for c in found]
    return [(e.x0, e.x1) for e in extents]


def test_a_forest_keeps_the_order_of_the_suite(primary):
    headings, targets, numbers, verdicts = words(figures.forest(primary).figure)
    assert [text for text, _ in headings] == [f"{a} minus {b}" for a, b in PRIMARY]
    assert [text for text, _ in targets] == list(TARGETS) * len(PRIMARY)
    assert [text for text, _ in numbers] == [with_interval(c.estimate) for c in primary]
    assert [text for text, _ in verdicts] == [str(c.verdict).split()[0] for c in primary]
    means = [c.estimate.mean for c in primary]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_a_forest_has_each_mean_and_interval_in_its_row(primary):
    figure = figures.forest(primary).figure
    axes, (_, targets, *_) = figure.axes[0], words(figure)
    for c, (_, y) in zip(primary, targets, strict=True):
        assert points(axes)[y][0] == c.estimate.mean
        assert intervals(axes)[y] == (c.estimate.low, c.estimate.high)
    zero = [line for line in axes.lines if line.get_marker() == "None"]
    assert [list(line.get_xdata()) for line in zero] == [[0, 0]] * len(PRIMARY)


def test_a_forests_colours_and_shapes_say_the_verdict(primary):
    assert {c.verdict for c in primary} >= {Verdict.HIGHER, Verdict.LOWER, Verdict.EQUAL, Verdict.UNDECIDED}  # fmt: skip
    confounded = [c._replace(confounds=["bn"]) if i == 0 else c for i, c in enumerate(primary)]
    figure = figures.forest(confounded).figure
    axes, (_, targets, *_) = figure.axes[0], words(figure)
    looks = {}
    for c, (_, y) in zip(confounded, targets, strict=True):
        looks.setdefault(c.verdict, set()).add(points(axes)[y][1:])
    assert all(len(found) == 1 for found in looks.values())
    grey = looks.pop(Verdict.CONFOUNDED)
    assert grey == looks[Verdict.UNDECIDED]
    found = [look for (look,) in looks.values()]
    assert len({colour for colour, _ in found}) == len({shape for _, shape in found}) == 4
    assert looks[Verdict.HIGHER] == {("#2f7fc1", "^")}
    assert looks[Verdict.LOWER] == {("#d1495b", "v")}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["higher", "lower"] and len(labels) == 5


def test_a_forest_shows_the_margin_if_there_is_one(primary):
    drawn = figures.forest(primary)
    assert margins(drawn.figure.axes[0]) == [(-4, 4)] * len(PRIMARY)
    assert "margin of 4 points" in drawn.caption
    without = figures.forest(compared(study_in_memory(0, EFFECTS)))
    assert margins(without.figure.axes[0]) == []
    assert "margin" not in without.caption


def test_a_forest_of_one_seed_has_points_alone():
    one = compared(study_in_memory(0, EFFECTS, seeds=1))
    figure = figures.forest(one).figure
    assert intervals(figure.axes[0]) == {}
    assert len(points(figure.axes[0])) == len(one)
    assert all("\N{PLUS-MINUS SIGN}" not in text for text, _ in words(figure)[2])


def test_a_forest_has_a_row_for_what_is_not_there_yet(primary):
    some = [primary[0]._replace(estimate=None), *primary[1:3]]
    figure = figures.forest(some).figure
    assert [text for text, _ in words(figure)[1]] == list(TARGETS)
    assert words(figure)[2][0][0] == "no result yet"
    assert len(points(figure.axes[0])) == 2
    assert figures.forest([c._replace(estimate=None) for c in some]) is None
    assert figures.forest([]) is None


def test_a_forest_names_the_sources_if_there_are_several(primary):
    two = [primary[0], primary[0]._replace(pairs=[("photo", "cartoon")])]
    rows = [text for text, _ in words(figures.forest(two).figure)[1]]
    assert rows == ["art_painting to cartoon", "photo to cartoon"]


# --- confusions -------------------------------------------------------------------------------


def bars_in(axes):
    return [c for c in axes.containers if isinstance(c, BarContainer)]


def test_confusions_are_percent_of_the_true_class(built):
    random, da = figures.confusions(built.study, built.comparisons.primary)
    assert [random.title, da.title] == ["Confusions of random", "Confusions of da"]
    matrix, bars, *others = random.figure.axes
    assert matrix.get_title(loc="left") == "art_painting to cartoon" and len(others) == 2
    # 44, 44 and 46 of a hundred are right, and the others are taken for the class after theirs
    cells = {t.get_position(): t.get_text() for t in matrix.texts}
    assert cells == {
        (j + 0.5, i + 0.5): "45" if i == j else "55" for i in range(7) for j in (i, (i + 1) % 7)
    }
    names = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    assert [t.get_text() for t in matrix.get_yticklabels()] == names
    assert matrix.get_ylim() == bars.get_ylim() == (7, 0)


def test_accuracy_by_class_stands_beside_the_references(built):
    random, _ = figures.confusions(built.study, built.comparisons.primary)
    arm, reference = bars_in(random.figure.axes[1])
    assert [arm.get_label(), reference.get_label()] == ["random", "baseline"]
    assert [bar.get_width() for bar in arm] == pytest.approx([134 / 3] * 7)
    assert [bar.get_width() for bar in reference] == pytest.approx([40] * 7)
    sd = math.sqrt(4 / 3)
    for (low, _), (high, _) in arm.errorbar.lines[2][0].get_segments():
        assert (low, high) == pytest.approx((134 / 3 - sd, 134 / 3 + sd))


def test_confusions_are_of_the_seeds_that_both_arms_have(tmp_path):
    gone = [("baseline", target, 2) for target in ("cartoon", "sketch")]
    report = report_of(write_suite(tmp_path / "m", EXACT, exact, without=gone))
    random, _ = figures.confusions(report.study, report.comparisons.primary)
    widths = {c.get_label(): c[0].get_width() for c in bars_in(random.figure.axes[1])}
    assert widths == pytest.approx({"random": 44, "baseline": 40})


def test_an_arm_of_several_primary_comparisons_is_drawn_once(tmp_path):
    text = EXACT.replace("[da, baseline]]", "[da, baseline], [random, da]]")
    report = report_of(write_suite(tmp_path / "m", text, exact))
    drawn = figures.confusions(report.study, report.comparisons.primary)
    assert [p.title for p in drawn] == ["Confusions of random", "Confusions of da"]
    assert "of random and baseline" in drawn[0].caption


def test_a_class_without_images_has_no_share():
    result = SimpleNamespace(evaluation=SimpleNamespace(confusion=[[1, 3], [0, 0]]))
    shares = figures.confusion_of([result, result])
    assert shares[0].tolist() == [25, 75] and np.isnan(shares[1]).all()


def test_a_matrix_of_many_classes_has_no_numbers():
    axes = Figure().subplots()
    names = [f"class {i}" for i in range(65)]
    figures.draw_confusion(axes, 100 * np.eye(65), names)
    assert not axes.texts and len(axes.get_xticks()) == 0
    assert [t.get_text() for t in axes.get_yticklabels()] == names


# --- cost -------------------------------------------------------------------------------------


def timed(folder, seconds, device="a GPU", threads=None, processes=1):
    versions = {"device": device, "threads": threads, "processes": processes}
    training = SimpleNamespace(versions=versions, images_per_second=10.0 * seconds)
    return SimpleNamespace(folder=Path(folder), summary={"seconds": seconds}, training=training)


def study_of(baseline=None, **arms):
    """A study of arms with these results."""
    made = []
    for name, results in arms.items():
        by_key = {("photo", "sketch", seed): result for seed, result in enumerate(results)}
        made.append(Arm(name, dict.fromkeys(by_key, ""), by_key))
    results = {f"{arm.name}{i}": r for arm in made for i, r in enumerate(arm.results.values())}
    base = next((arm for arm in made if arm.name == baseline), None)
    return Study(Path(), "s", "", [Table("t", "", made, baseline=base)], results, [], [])


def bars_of(picture):
    (axes,) = picture.figure.axes
    names = [t.get_text().replace("\n", " ") for t in axes.get_yticklabels()]
    return dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True))


def test_cost_is_the_mean_over_trainings():
    a, b, slow = timed("a", 10.0), timed("b", 20.0), timed("c", 50.0)
    # two tests of one training are one training
    drawn = figures.cost(study_of(plain=[a, b, a], shaped=[slow]))
    assert bars_of(drawn) == {"plain": 15, "shaped": 50}
    texts = [t.get_text() for t in drawn.figure.axes[0].texts]
    assert texts == ["15 s, 150 images/s", "50 s, 500 images/s"]
    assert drawn.caption.endswith("All on a GPU.")


def test_cost_is_beside_the_baselines():
    drawn = figures.cost(study_of("plain", plain=[timed("a", 10.0)], shaped=[timed("b", 13.0)]))
    texts = [t.get_text() for t in drawn.figure.axes[0].texts]
    assert texts == ["10 s, 100 images/s", "13 s, 130 images/s, 1.30 x plain"]


def test_arms_of_the_same_trainings_share_a_bar():
    a, b = timed("a", 10.0), timed("b", 20.0)
    assert bars_of(figures.cost(study_of(one=[a, b], other=[b, a], third=[a]))) == {
        "one, other": 15, "third": 10
    }  # fmt: skip


@pytest.mark.parametrize("other", [{"device": "a CPU"}, {"threads": 4}, {"processes": 2}])
def test_cost_compares_no_times_of_unlike_devices(other):
    a, b, c = timed("a", 10.0), timed("b", 20.0), timed("c", 90.0, **other)
    drawn = figures.cost(study_of(plain=[a, c], shaped=[b], third=[c]))
    assert bars_of(drawn) == {"plain": 10, "shaped": 20}
    assert drawn.caption.endswith("do not compare: 1 training.")


def test_no_cost_without_results():
    assert figures.cost(study_of(plain=[])) is None
