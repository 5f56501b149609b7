"""Networks by name: which there are, their initial weights, their layers and their features."""

import hashlib
import os
import re
import socket
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from domainshift import models
from domainshift.errors import ConfigError, WeightsError
from domainshift.models import (
    FeatureTap,
    bare_model,
    build_model,
    classifier_name,
    layer_lines,
    layer_table,
    weights_digest,
)
from torch import nn
from torchvision.models import ResNet18_Weights, densenet121, resnet18, resnet34, resnet50

import fastshape

TIMM = "timm:resnet10t"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches the network, or finds what was downloaded earlier."""

    def refuse(*_args, **_kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(5)
    return resnet18(weights=None).state_dict()


@pytest.fixture(scope="module")
def slim_state():
    return build_model("resnet18-slim", "none", 1000, seed=5)[0].state_dict()


def saved(content, path):
    torch.save(content, path)
    return str(path)


def equal_backbones(model, state, classifier="fc."):
    own = model.state_dict()
    return all(torch.equal(own[n], t) for n, t in state.items() if not n.startswith(classifier))


# --- networks ---------------------------------------------------------------------------------


def test_none_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    first, weights = build_model("resnet18", "none", 7, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the maps' stream is not touched
    torch.manual_seed(99)
    again, _ = build_model("resnet18", "none", 7, seed=1)
    other, _ = build_model("resnet18", "none", 7, seed=2)
    assert equal_backbones(again, first.state_dict(), classifier="-")
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert first.fc.weight.shape == (7, 512)
    assert (weights.source, weights.sha256, weights.warnings) == ("none", None, [])


def test_resnet18_is_initialized_as_torchvision_does_it():
    torch.manual_seed(3)
    expected = resnet18(weights=None)
    expected.fc = nn.Linear(512, 7)
    model, _ = build_model("resnet18", "none", 7, seed=3)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert equal_backbones(model, expected.state_dict(), classifier="-")


@pytest.mark.parametrize(
    ("name", "classifier", "features"),
    [
        ("resnet50", "fc", 2048),
        ("mobilenet_v3_small", "classifier.3", 1024),
        ("resnet18-slim", "fc", 96),
        ("vit_b_16", "heads.head", 768),
        ("regnet_y_400mf", "fc", 440),
        (TIMM, "fc", 512),
        ("timm:test_vit", "head", 64),
    ],
)
def test_the_classifier_is_replaced(name, classifier, features, request):
    if name.startswith("timm:"):
        request.getfixturevalue("timm")
    model, _ = build_model(name, "none", 7, seed=0)
    assert classifier_name(model) == classifier == classifier_name(bare_model(name))
    assert model.training
    assert model.get_submodule(classifier).weight.shape == (7, features)
    before = bare_model(name).state_dict()
    after = model.state_dict()
    assert list(before) == list(after)
    assert {n for n in after if after[n].shape != before[n].shape} == {
        f"{classifier}.weight",
        f"{classifier}.bias",
    }


def test_the_last_of_several_linear_layers_is_the_classifier():
    vgg = bare_model("vgg11_bn")
    assert sum(isinstance(module, nn.Linear) for module in vgg.modules()) == 3
    assert classifier_name(vgg) == "classifier.6"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("squeezenet1_1", r"'squeezenet1_1' has no linear classifier; allowed: networks with one"),
        ("googlenet", r"'googlenet' has 3 linear classifiers \(aux1\.fc2, aux2\.fc2, fc\)"),
        ("timm:deit_tiny_distilled_patch16_224", r"has 2 linear classifiers \(head, head_dist\)"),
        ("timm:resnetv2_50x1_bit", "has no linear classifier"),
        ("resnet81", r"'resnet81' is not allowed; .*torchvision\.models has resnet18"),
        ("fcn_resnet50", "'fcn_resnet50' is not allowed"),  # segmentation
        ("timm:resnet10", r"'timm:resnet10' is not allowed; .*timm has .*resnet10t"),
        ("timm:resnet10t.gone", r"'timm:resnet10t\.gone' is not allowed"),
        ("timm:hf-hub:timm/resnet10t", "is not allowed"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_other_networks_are_refused(name, message, request):
    if name.startswith("timm:"):
        request.getfixturevalue("timm")
    with pytest.raises(ConfigError, match="^model: .*" + message) as caught:
        bare_model(name)
    assert "\n" not in str(caught.value)


def test_without_timm_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="'timm:resnet26' needs timm: pip install timm"):
        build_model("timm:resnet26", "none", 7, seed=0)


def test_a_network_without_linear_layers_has_no_classifier():
    with pytest.raises(ConfigError, match="model: Sequential has no linear classifier"):
        classifier_name(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_bare_models_hold_no_memory_and_draw_nothing():
    before = torch.get_rng_state()
    for name in ("resnet34", "regnet_x_400mf"):
        assert {p.device.type for p in bare_model(name).parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)
    assert bare_model("resnet34") is bare_model("resnet34")


def test_the_slim_network_is_a_narrow_resnet18():
    slim = build_model("resnet18-slim", "none", 7, seed=0)[0]
    names = [(name, type(module)) for name, module in bare_model("resnet18").named_modules()]
    assert [(name, type(module)) for name, module in slim.named_modules()] == names
    assert models.SLIM_WIDTH == 12
    first = 3 * 12 * 7**2 + 4 * 12**2 * 3**2  # conv1 and layer1
    stages = sum(c // 2 * c * 3**2 + 3 * c**2 * 3**2 + c // 2 * c for c in (24, 48, 96))
    norms = 2 * (5 * 12 + 5 * (24 + 48 + 96))
    classifier = 96 * 7 + 7
    assert sum(p.numel() for p in slim.parameters()) == first + stages + norms + classifier
    for name, module in slim.named_modules():
        if isinstance(module, nn.Conv2d):
            own = bare_model("resnet18").get_submodule(name)
            assert (module.stride, module.padding) == (own.stride, own.padding)
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            spread = module.weight.std().item()
            assert spread == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
    assert slim(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


# --- weights ----------------------------------------------------------------------------------


def test_a_file_gives_all_but_the_classifier(state, tmp_path):
    path = saved(state, tmp_path / "r18.pth")
    model, weights = build_model("resnet18", path, 7, seed=1)
    fresh, _ = build_model("resnet18", "none", 7, seed=1)
    assert equal_backbones(model, state)
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert weights.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert weights.source == "r18.pth"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3, "origin": {"targets": []}},
        lambda state: {"epoch": 90, "state_dict": state},
        lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}},
        lambda state: {f"module.{n}": t for n, t in state.items()},
    ],
    ids=["plain", "model", "state_dict", "state_dict of DataParallel", "DataParallel"],
)
def test_a_state_dict_may_be_in_a_checkpoint(wrap, slim_state, tmp_path):
    path = saved(wrap(slim_state), tmp_path / "checkpoint.pt")
    model, _ = build_model("resnet18-slim", path, 7, seed=0)
    assert equal_backbones(model, slim_state)


def test_weights_of_a_network_with_another_classifier(tmp_path):
    trained, _ = build_model("mobilenet_v3_small", "none", 31, seed=4)
    path = saved(trained.state_dict(), tmp_path / "mobile.pt")
    model, _ = build_model("mobilenet_v3_small", path, 7, seed=0)
    assert equal_backbones(model, trained.state_dict(), classifier="classifier.3.")
    assert model.classifier[3].weight.shape == (7, 1024)


def test_half_precision_is_converted(state, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    model, _ = build_model("resnet18", saved(half, tmp_path / "half.pth"), 7, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.conv1.weight, state["conv1.weight"].half().float())


def test_files_without_batch_counters_load(slim_state, tmp_path):
    old = {k: v for k, v in slim_state.items() if not k.endswith("num_batches_tracked")}
    model, _ = build_model("resnet18-slim", saved(old, tmp_path / "old.pth"), 7, seed=0)
    assert torch.equal(model.conv1.weight, slim_state["conv1.weight"])


def test_old_names_of_densenet_load(tmp_path):
    state = densenet121(weights=None).state_dict()
    number = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    old = {number.sub(r"\1.\2", name): tensor for name, tensor in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    model, _ = build_model("densenet121", saved(old, tmp_path / "dense.pth"), 7, seed=0)
    assert equal_backbones(model, state, classifier="classifier.")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet34(weights=None).state_dict(), r"unexpected layer1\.2\.conv1\.weight"),
        (lambda: resnet50(weights=None).state_dict(), r"has shape \(64, 64, 1, 1\), not \(64, 64"),
        (lambda: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, r"missing bn1\.weight"),
        (lambda: {"epoch": 3, "model": {}}, r"missing conv1\.weight \(100 keys\)"),
        (lambda: {"epoch": 3, "head": {}}, r"no state dict of tensors; it holds epoch, head"),
        (lambda: [torch.zeros(1)], r"no state dict of tensors; it holds a list"),
        (lambda: {"conv1.weight": os.system}, r"not a readable state dict"),
    ],
)
def test_other_architectures_are_named(make, message, tmp_path):
    path = saved(make(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"weights: .*other\.pth .*" + message) as caught:
        build_model("resnet18", path, 7, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use", [lambda path: build_model("resnet18", path, 7, 0),
                                 lambda path: weights_digest(path, "resnet18")])  # fmt: skip
def test_no_such_file(use, tmp_path):
    with pytest.raises(WeightsError, match=r"no file .*gone\.pth; allowed: imagenet \| none"):
        use(str(tmp_path / "gone.pth"))


def test_a_text_file(tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("hello")
    with pytest.raises(WeightsError, match="not a readable state dict"):
        build_model("resnet18", str(path), 7, seed=0)


# --- ImageNet weights -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [None, URLError("no route"), RuntimeError("invalid hash value")], ids=str
)
def test_no_network_names_the_alternatives(monkeypatch, tmp_path, error):
    if error is not None:

        def fail(*_args, **_kwargs):
            raise error

        monkeypatch.setattr(type(ResNet18_Weights.IMAGENET1K_V1), "get_state_dict", fail)
    with pytest.raises(WeightsError) as caught:
        build_model("resnet18", "imagenet", 7, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert "--weights PATH" in message
    assert "--weights none" in message
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in message


def test_no_network_for_timm(timm, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it tries for long
    with pytest.raises(WeightsError) as caught:
        build_model(TIMM, "imagenet", 7, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert "could not be downloaded for timm:resnet10t" in message
    assert "--weights PATH" in message and "--weights none" in message


def test_imagenet_weights_of_torchvision_come_from_its_file(state, tmp_path):
    """A stand-in for the file lies where a download would put it."""
    path = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir()
    torch.save(state, path)
    model, weights = build_model("resnet18", "imagenet", 7, seed=1)
    fresh, _ = build_model("resnet18", "none", 7, seed=1)
    assert equal_backbones(model, state)
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert weights == ("imagenet", hashlib.sha256(path.read_bytes()).hexdigest(), [])


def test_imagenet_weights_of_timm(timm, monkeypatch):
    create, pretrained = timm.create_model, timm.create_model("resnet10t")
    with torch.no_grad():
        pretrained.conv1[0].weight.fill_(0.5)

    def stand_in(name, pretrained_weights=pretrained, pretrained=False):
        return pretrained_weights if pretrained else create(name)

    monkeypatch.setattr(timm, "create_model", stand_in)
    before = torch.get_rng_state()
    model, weights = build_model(TIMM, "imagenet", 7, seed=1)
    fresh, _ = build_model(TIMM, "none", 7, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal_backbones(model, pretrained.state_dict())
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert (weights.source, weights.warnings) == ("imagenet", [])
    assert weights.sha256 == models.state_digest(pretrained.state_dict())


def test_the_slim_network_has_no_imagenet_weights():
    for use in (
        lambda: build_model("resnet18-slim", "imagenet", 7, seed=0),
        lambda: weights_digest("imagenet", "resnet18-slim"),
    ):
        with pytest.raises(WeightsError, match="no 'imagenet' weights for resnet18-slim; allowed"):
            use()


def test_digests_are_known_before_anything_is_downloaded(tmp_path):
    path = tmp_path / "some.pth"
    path.write_bytes(b"content")
    assert weights_digest("none", "resnet18") == "none"
    assert weights_digest("imagenet", "resnet18") == "imagenet ResNet18_Weights.IMAGENET1K_V1"
    assert weights_digest("imagenet", "resnet50") == "imagenet ResNet50_Weights.IMAGENET1K_V1"
    assert weights_digest(str(path), "resnet18") == hashlib.sha256(b"content").hexdigest()
    with pytest.raises(ConfigError, match="model: 'resnet81' is not allowed"):
        weights_digest("imagenet", "resnet81")


def test_the_digest_of_timm_names_the_tag(timm):
    assert weights_digest("imagenet", TIMM) == "imagenet timm:resnet10t.c3_in1k"


# --- caveats ----------------------------------------------------------------------------------


def test_a_readme_beside_the_file_is_a_caveat(slim_state, tmp_path):
    path = saved(slim_state, tmp_path / "slim.pth")
    assert "README" not in build_model("resnet18-slim", path, 7, seed=0)[1].warnings[0]
    (tmp_path / "README.md").write_text("what this is")
    (warning,) = build_model("resnet18-slim", path, 7, seed=0)[1].warnings
    assert 'not checked to be "torchvision V1"' in warning
    assert "README.md" in warning


def test_a_reconstruction_is_a_caveat(state, tmp_path):
    path = saved(state, tmp_path / "r18_reconstructed.pth")
    (warning,) = build_model("resnet18", path, 7, seed=0)[1].warnings
    assert 'not with "torchvision V1" but with a reconstruction' in warning
    assert "layer4.0.conv1, layer4.0.conv2, layer4.1.conv1, layer4.1.conv2" in warning


def test_real_weights_load(imagenet_weights):
    model, weights = build_model("resnet18", str(imagenet_weights), 7, seed=0)
    # a trained first layer has filters of very different strength; an initialized one has not
    strength = model.conv1.weight.flatten(1).norm(dim=1)
    assert strength.max() / strength.min() > 5
    assert len(weights.sha256) == 64


# --- layers -----------------------------------------------------------------------------------


def test_convolutions_of_resnet18_are_numbered_as_in_the_reports():
    rows = layer_table("resnet18", 224)
    assert [row.number for row in rows] == list(range(1, 21))
    names = {row.number: row.name for row in rows}
    assert names[1] == "conv1" and names[20] == "layer4.1.conv2"
    assert {n for n, name in names.items() if "downsample" in name} == {8, 13, 18}
    assert rows[0].shapes == ((64, 112, 112),)
    assert rows[7] == (8, "layer2.0.downsample.0", "Conv2d", ((128, 28, 28),))


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small", TIMM])
@pytest.mark.parametrize("after", ["conv", "bn", "relu"])
def test_tables_of_layers_agree_with_a_true_forward(name, after, request):
    if name.startswith("timm:"):
        request.getfixturevalue("timm")
    model = build_model(name, "none", 7, seed=0)[0].eval()
    with fastshape.attach(model, "all", mode="binarize", after=after) as attachment:
        names = attachment.names
    shapes = {}
    for layer in names:
        model.get_submodule(layer).register_forward_hook(
            lambda m, args, y, layer=layer: shapes.setdefault(layer, []).append(tuple(y.shape[1:]))
        )
    with torch.no_grad():
        model(torch.zeros(1, 3, 96, 96))
    rows = layer_table(name, 96, after)
    assert [(row.number, row.name) for row in rows] == list(enumerate(names, 1))
    for row in rows:
        assert list(row.shapes) == list(dict.fromkeys(shapes[row.name]))
        assert row.kind == type(model.get_submodule(row.name)).__name__


def test_lines_of_layers_show_number_name_and_shape():
    heading, *lines = layer_lines("resnet18", 64)
    assert heading == "resnet18, conv layers, output for one image of 64 x 64 pixels"
    assert len(lines) == 20
    assert lines[0].split() == "1 conv1 Conv2d 64 x 32 x 32".split()
    assert lines[7].split() == "8 layer2.0.downsample.0 Conv2d 128 x 8 x 8".split()
    # a block of ResNet-50 calls its ReLU three times
    line = layer_lines("resnet50", 64, "relu")[5]
    assert line.split(maxsplit=3)[1:] == [
        "layer2.0.relu",
        "ReLU",
        "128 x 16 x 16 | 128 x 8 x 8 | 512 x 8 x 8",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_b_16", 112), "^image_size: 112 is not allowed for model vit_b_16: .*224.*112"),
        (("vgg11", 64, "bn"), "0 modules of kind bn"),
        (("resnet18", 64, "pool"), "after='pool': allowed are conv, bn, relu"),
        (("resnet81", 64), "model: 'resnet81' is not allowed"),
    ],
)
def test_layers_that_are_not_there(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        layer_lines(*arguments)
    assert "\n" not in str(caught.value)


def test_a_table_of_layers_leaves_the_network_as_it_was():
    for size in (48, 8):  # in 8 pixels nothing of VGG is left to pool
        try:
            models.output_shapes("vgg13", size)
        except ConfigError:
            assert size == 8
    model = bare_model("vgg13")
    assert all(module.training and not module._forward_hooks for module in model.modules())


# --- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18-slim", "mobilenet_v3_small", TIMM])
def test_features_are_the_input_of_the_classifier(name, request):
    if name.startswith("timm:"):
        request.getfixturevalue("timm")
    model, _ = build_model(name, "none", 7, seed=0)
    model.eval()
    tap = FeatureTap(model)
    assert tap.features is None
    logits = model(torch.randn(3, 3, 64, 64))
    classifier = model.get_submodule(classifier_name(model))
    assert tap.features.shape == (3, classifier.in_features)
    assert tap.features.requires_grad
    assert torch.equal(classifier(tap.features), logits)


def test_features_of_resnet_are_pooled_maps():
    model, _ = build_model("resnet18-slim", "none", 7, seed=0)
    maps = []
    model.layer4.register_forward_hook(lambda m, args, y: maps.append(y))
    tap = FeatureTap(model.eval())
    model(torch.randn(3, 3, 64, 64))
    assert torch.equal(tap.features, maps[0].mean((2, 3), keepdim=True).flatten(1))


@pytest.mark.parametrize("method", ["hooks", "replace"])
def test_features_with_shaping_in_place(method):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model, _ = build_model("resnet18-slim", "none", 7, seed=0)
    tap = FeatureTap(model)
    model.eval()(images)
    plain = tap.features.detach()
    with fastshape.attach(
        model, [4, 8, 20], mode="binarize", at_eval="on", method=method
    ) as attachment:
        logits = model(images)
        assert set(attachment.fired.values()) == {1}
        assert set(attachment.method_of.values()) == {method}
    assert isinstance(tap.features, torch.Tensor) and not torch.equal(tap.features, plain)
    assert torch.equal(model.fc(tap.features), logits)


def test_a_removed_tap_keeps_nothing():
    model, _ = build_model("resnet18-slim", "none", 7, seed=0)
    tap = FeatureTap(model)
    tap.remove()
    tap.remove()
    model(torch.randn(2, 3, 64, 64))
    assert tap.features is None and not model.fc._forward_pre_hooks
