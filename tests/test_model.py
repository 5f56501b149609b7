"""Initial weights: what is loaded, what is said about it, and what is refused."""

import hashlib
import os
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from model import WeightsError, build_model
from torchvision.models import ResNet18_Weights, resnet18, resnet34, resnet50


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(5)
    return resnet18(weights=None).state_dict()


def saved(state, path):
    torch.save(state, path)
    return str(path)


def test_none_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    first, weights = build_model("none", 7, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the maps' stream is not touched
    torch.manual_seed(99)
    again, _ = build_model("none", 7, seed=1)
    other, _ = build_model("none", 7, seed=2)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert first.fc.weight.shape == (7, 512)
    assert (weights.source, weights.sha256, weights.warnings) == ("none", None, [])


def test_a_file_gives_all_but_the_classifier(state, tmp_path):
    path = saved(state, tmp_path / "r18.pth")
    model, weights = build_model(path, 7, seed=1)
    fresh, _ = build_model("none", 7, seed=1)
    loaded = model.state_dict()
    for name, tensor in state.items():
        if not name.startswith("fc."):
            assert torch.equal(loaded[name], tensor), name
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert weights.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert weights.source == "r18.pth"


def test_half_precision_is_converted(state, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    model, _ = build_model(saved(half, tmp_path / "half.pth"), 7, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.conv1.weight, state["conv1.weight"].half().float())


def test_files_without_batch_counters_load(state, tmp_path):
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    model, _ = build_model(saved(old, tmp_path / "old.pth"), 7, seed=0)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet34(weights=None).state_dict(), r"unexpected layer1\.2\.conv1\.weight"),
        (lambda: resnet50(weights=None).state_dict(), r"has shape \(64, 64, 1, 1\), not \(64, 64"),
        (lambda: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, r"missing bn1\.weight"),
        (lambda: {"epoch": 3, "model": {}}, r"no state dict of tensors; it holds epoch, model"),
        (lambda: [torch.zeros(1)], r"no state dict of tensors"),
        (lambda: {"conv1.weight": os.system}, r"not a readable state dict"),
    ],
)
def test_other_architectures_are_named(make, message, tmp_path):
    path = saved(make(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"weights: .*other\.pth .*" + message):
        build_model(path, 7, seed=0)


def test_no_such_file(tmp_path):
    with pytest.raises(WeightsError, match=r"no file .*gone\.pth; allowed: imagenet \| none"):
        build_model(str(tmp_path / "gone.pth"), 7, seed=0)


def test_a_text_file(tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("hello")
    with pytest.raises(WeightsError, match="not a readable state dict"):
        build_model(str(path), 7, seed=0)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("invalid hash value")])
def test_no_network_names_the_alternatives(monkeypatch, tmp_path, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(type(ResNet18_Weights.IMAGENET1K_V1), "get_state_dict", fail)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        build_model("imagenet", 7, seed=0)
    message = str(caught.value)
    assert "--weights PATH" in message
    assert "--weights none" in message
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in message


def test_a_readme_beside_the_file_is_a_caveat(state, tmp_path):
    path = saved(state, tmp_path / "r18.pth")
    assert "README" not in build_model(path, 7, seed=0)[1].warnings[0]
    (tmp_path / "README.md").write_text("what this is")
    (warning,) = build_model(path, 7, seed=0)[1].warnings
    assert 'not checked to be "torchvision V1"' in warning
    assert "README.md" in warning


def test_a_reconstruction_is_a_caveat(state, tmp_path):
    path = saved(state, tmp_path / "r18_reconstructed.pth")
    (warning,) = build_model(path, 7, seed=0)[1].warnings
    assert 'not with "torchvision V1" but with a reconstruction' in warning
    assert "layer4.0.conv1, layer4.0.conv2, layer4.1.conv1, layer4.1.conv2" in warning


def weights_file():
    place = Path(os.environ.get("FASTSHAPE_WEIGHTS", "") or "missing")
    return next(iter(sorted(place.glob("*.pth"))), None) if place.is_dir() else place


@pytest.mark.skipif(
    not (weights_file() and weights_file().is_file()),
    reason="set FASTSHAPE_WEIGHTS to a file of ResNet-18 weights, or to its folder",
)
def test_real_weights_load():
    model, weights = build_model(str(weights_file()), 7, seed=0)
    # a trained first layer has filters of very different strength; an initialized one has not
    strength = model.conv1.weight.flatten(1).norm(dim=1)
    assert strength.max() / strength.min() > 5
    assert len(weights.sha256) == 64
