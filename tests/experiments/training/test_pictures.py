"""The pictures of a run."""

import io

import numpy as np
import pytest
import torch
from domainshift.records import results
from domainshift.training import loop, pictures
from domainshift.training.run import build
from PIL import Image
from tiny_runs import run, setup_of


def built(tmp_path, **switches):
    setup = setup_of(**switches)
    experiment = build(setup, setup.config.tests(), None, tmp_path)
    experiment.method.close()
    return experiment.method, experiment.images


@pytest.fixture
def figures(monkeypatch):
    """Figures in place of files."""
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    return drawn


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_curves_show_each_test_where_it_was_made(tmp_path, figures, no_pictures):
    folder = run(tmp_path / "r", epochs=3, evaluate="2", target=["sketch", "photo"], holdout=0.1)
    method, _ = built(tmp_path, epochs=3)
    rows = results.read_rows(folder)
    names = ["sketch-bn-source", "photo-bn-source", "art_painting-holdout-bn-source"]
    pictures.curves(
        tmp_path, rows, method, [results.read_evaluation(folder, name) for name in names]
    )
    accuracy, loss = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.get_lines()}
    for name, label in zip(names, [*names[:2], "art_painting (held out)"], strict=True):
        counts = [(row.epoch, row.tests[name]) for row in rows[1:]]
        assert lines[label] == [[epoch, 100 * c.correct / c.total] for epoch, c in counts]
    assert len(lines["art_painting (training images)"]) == 3
    assert loss.get_lines()[0].get_ydata().tolist() == [row.train_loss for row in rows]


@pytest.mark.parametrize(
    ("switches", "domains", "formula"),
    [
        ({"mode": "random", "layers": [1, 4]}, [], "y = 1[x > 0] · m"),
        ({"mode": "random", "layers": ["fc"]}, [], "y = 1[x > 0] · m"),
        ({"mode": "da", "layers": [4]}, ["maps of sketch"], "y = 1[x > 0] · m"),
        ({"mode": "da", "layers": [4], "product": True}, ["maps of sketch"], "y = x · m"),
        (
            {"mode": "da", "layers": [4], "mask_sources": ["photo", "cartoon"]},
            ["maps of photo", "maps of cartoon"],
            "y = 1[x > 0] · m",
        ),
    ],
)
def test_maps_show_the_images_and_the_layers(tmp_path, figures, switches, domains, formula):
    method, images = built(tmp_path, **switches)
    before = {name: t.clone() for name, t in method.model.state_dict().items()}
    pictures.maps(tmp_path, method, images)
    words = titles(figures[0])
    domains = [f"{domain},\npaired as in epoch 1 of training" for domain in domains]
    assert words[: 1 + len(domains)] == ["source: art_painting", *domains]
    assert words[1 + len(domains) :].count("before: x") == len(method.layers)
    texts = [text.get_text() for axes in figures[0].axes for text in axes.texts]
    assert texts[0].startswith(formula)
    after = method.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def pairs_in_training(monkeypatch, config, images):
    """Image of the source -> image of each other domain, as epoch 1 of a training reads them."""
    read, own_batches = [], loop.own_batches

    def recorded(dataset, order, config):
        read.append(dataset.indices[order].tolist())
        return own_batches(dataset, order, config)

    monkeypatch.setattr(loop, "own_batches", recorded)
    list(images.epoch(config, 1))
    source, *others = read
    return [dict(zip(source, other, strict=True)) for other in others]


@pytest.mark.parametrize("pairing", ["random", "modulo"])
@pytest.mark.parametrize("mask_sources", [[], ["photo", "cartoon"]])
def test_maps_pair_images_as_training_does(tmp_path, figures, monkeypatch, pairing, mask_sources):
    switches = {"mode": "da", "layers": [4], "pairing": pairing, "holdout": 0.3, "seed": 5}
    method, images = built(tmp_path, **switches, mask_sources=mask_sources)
    drawn, network_input = [], pictures.network_input

    def recorded(of, rows, *more):
        drawn.append(list(rows))
        return network_input(of, rows, *more)

    monkeypatch.setattr(pictures, "network_input", recorded)
    pictures.maps(tmp_path, method, images)
    source, *others = drawn
    pairs = pairs_in_training(monkeypatch, method.config, images)
    assert [[partner[row] for row in source] for partner in pairs] == others
    shown = [axes.images[0].get_array() for axes in figures[0].axes[: 1 + len(pairs)]]
    assert np.array_equal(shown[0], images.source.images[source[0]])
    for picture, (other, _), partner in zip(shown[1:], images.others, pairs, strict=True):
        assert np.array_equal(picture, other[partner[source[0]]])


def test_what_is_drawn_is_what_shaping_does(tmp_path):
    """y = 1[x > 0] m, of one and the same map."""
    method, images = built(tmp_path, mode="random", layers=[1], p_zero=0.5)
    inputs = pictures.network_input(images.source.images, [0, 1, 2], method.config)
    before, after = pictures.activations(method, ["conv1"], inputs, [], ones=False)
    _, masks = pictures.activations(method, ["conv1"], inputs, [], ones=True)
    x, m, y = before["conv1"], masks["conv1"], after["conv1"]
    assert torch.equal(y, (x > 0).float() * m)
    assert 0.45 < m.mean() < 0.55


def test_many_layers_are_thinned_out(tmp_path, figures):
    method, images = built(tmp_path, mode="random", layers="all")
    pictures.maps(tmp_path, method, images)
    assert len(method.layers) > pictures.MOST_LAYERS
    assert titles(figures[0]).count("before: x") == pictures.MOST_LAYERS


def test_pictures_are_png_without_loss_on_any_backend(tmp_path, monkeypatch):
    """Each pixel of a figure is a pixel of the file, whatever backend is set."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    figure = pictures.Figure(figsize=(1, 1), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(np.eye(2), cmap="gray", interpolation="nearest", aspect="auto")
    pictures.save(figure, tmp_path / "p.png")
    image = Image.open(io.BytesIO((tmp_path / "p.png").read_bytes()))
    assert image.format == "PNG"
    assert set(np.unique(np.asarray(image.convert("L")))) == {0, 255}
