"""What the pictures of a report draw."""

import pytest
from domainshift.report import figures
from made_records import EXACT, exact, report_of, write_suite
from matplotlib.figure import Figure

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
    for p in built.sections[0].pictures:
        assert "currentColor" in p.svg and figures.INK not in p.svg
        assert p.svg == p.svg and "<metadata>" not in p.svg
