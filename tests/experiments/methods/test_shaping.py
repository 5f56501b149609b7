"""Random and target maps: how they are attached, tested and described, and what is refused."""

import pytest
import torch
from domainshift import distributed
from domainshift.config import Test
from domainshift.errors import ConfigError
from domainshift.methods import METHODS, masks
from domainshift.methods.shaping import RandomMaps, TargetMaps, attach_method
from small_networks import SOURCE, TARGET, config_of, images, method_with, net, outputs
from torch import nn

import fastshape

LABELS = torch.arange(6)


# --- which layers ---


def test_layers_of_a_configuration_are_those_of_its_network():
    def names(mode, **values):
        return METHODS[mode].layer_names(config_of(mode, **values))

    assert names("baseline") == names("adabn") == names("dann") == ()
    assert names("random") == names("dropout2d") == ("layer2.1.conv2",)  # conv 10
    assert names("mixstyle") == names("mixstyle", model="resnet50") == ("layer1", "layer2")
    assert names("da") == ("layer1.1.conv1",)  # conv 4
    assert names("da", layers=(1, "layer4.*.conv2")) == (
        "conv1",
        "layer4.0.conv2",
        "layer4.1.conv2",
    )
    assert len(names("random", layers=("all",))) == 20
    assert names("random", layers=("all",), every=10) == ("layer2.1.conv2", "layer4.1.conv2")
    assert names("random", layers=(1,), after="bn") == ("bn1",)
    assert names("da", layers=(4,), model="resnet50") == ("layer1.0.conv3",)
    assert names("da", apply_maps=False) == ()  # nothing is shaped


@pytest.mark.parametrize("mode", ["random", "da", "dropout2d", "mixstyle"])
def test_layers_that_are_not_there_are_refused(mode):
    with pytest.raises(
        ConfigError, match=r"layers: there is no conv 21; this model has convs 1 to 20"
    ):
        METHODS[mode].layer_names(config_of(mode, layers=(21,)))
    with pytest.raises(ConfigError, match=r"layers: there is no module 'layer9'"):
        METHODS[mode].layer_names(config_of(mode, layers=("layer9",)))
    with pytest.raises(ConfigError, match=r"layers: there is no conv 3"):
        method_with(mode=mode, layers=(3,))


@pytest.mark.parametrize("mode", ["random", "da", "dropout2d", "random-rescaled", "mixstyle"])
def test_a_method_shapes_the_layers_that_it_names(mode):
    method = method_with(mode=mode, layers=(1, 2))
    assert method.layers == ("0", "3")
    method.update(SOURCE, LABELS, TARGET if method.uses_target else None)
    assert method.fired() == {"0": 1, "3": 1}


def test_one_p_zero_or_one_per_layer():
    def warnings(p_zero):
        config = config_of("random", layers=(1, 2, 3), p_zero=p_zero)
        return RandomMaps.check(config, refuse)

    def refuse(name, why):
        raise ConfigError(f"{name}: {why}")

    assert warnings((0.5,)) == warnings((0.1, 0.2, 0.3)) == []
    with pytest.raises(
        ConfigError, match="p_zero: has 2 values for 3 layers; allowed: one value, "
    ):
        warnings((0.1, 0.2))


# --- which way ---


def test_auto_replaces_where_one_op_shapes_a_convolution(monkeypatch):
    def way(**values):
        return attach_method(config_of("random", layers=(1,), **values))

    assert way() == ("auto" if fastshape.backend_info()["cpu"] == "native" else "hooks")
    monkeypatch.setattr(fastshape, "backend_info", lambda: {"cpu": "native"})
    assert way() == "auto"
    assert way(after="bn") == way(binarize=False) == way(attach="hooks") == "hooks"
    assert way(binarize=False, attach="replace") == "replace"
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert way() == way(attach="replace") == "hooks"
    monkeypatch.undo()
    monkeypatch.setattr(fastshape, "backend_info", lambda: {"cpu": "reference"})
    assert way() == "hooks"


@pytest.mark.filterwarnings("error")
def test_auto_is_silent_about_layers_that_cannot_be_replaced(monkeypatch):
    monkeypatch.setattr(fastshape, "backend_info", lambda: {"cpu": "native"})
    model = net()
    with RandomMaps.attach(model, config_of("random", layers=(1, "fc"))) as attachment:
        model(SOURCE)
        assert attachment.method_of == {"0": "replace", "fc": "hooks"}
    config = config_of("random", layers=("fc",), attach="replace")
    with RandomMaps.attach(model, config), pytest.raises(UserWarning, match="hooks serve fc"):
        model(SOURCE)


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "random", "epsilon": 0.1},
        {"mode": "random-rescaled"},
        {"mode": "da", "top_k": 0.5, "product": True, "binarize": False},
        {"mode": "da", "mask_sources": ("photo",)},
        {"mode": "da", "apply_maps": False},
    ],
)
def test_options_that_the_package_lacks_are_served_by_own_hooks(values):
    config = config_of(layers=(1,), **values)
    with METHODS[config.mode].attach(net(), config) as attachment:
        assert isinstance(attachment, masks.Maps)
    with METHODS[config.mode].attach(net(), config_of(values["mode"], layers=(1,))) as attachment:
        own = config.mode == "random-rescaled"  # which has no form in the package
        assert isinstance(attachment, masks.Maps if own else fastshape.Attachment)


@pytest.mark.parametrize("mode", ["random", "da"])
def test_hooks_and_replacement_train_alike(mode):
    """In float64, where rounding does not grow into another map: weights, statistics, predictions."""
    results = []
    for way in ("hooks", "replace"):
        method = method_with(net().double(), mode, layers=(1, 2), attach=way)
        assert set(method.attachment.method_of.values()) == {way}
        for step in range(5):
            torch.manual_seed(step)
            target = images(seed=10 + step).double() if mode == "da" else None
            method.update(images(seed=step).double(), LABELS, target)
        method.recalibrate([images(seed=20).double(), images(seed=21).double()])
        logits = method.predict(images(seed=30).double()).logits
        results.append([*method.model.state_dict().values(), logits])
    assert not torch.equal(results[0][0], net().double()[0].weight)  # they did move
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 1e-9, atol=1e-9)


# --- tests of one training ---


def forward(model, x, shape):
    """Logits in evaluation mode of a network without hooks, `shape` being applied after each conv."""
    for module in model:
        x = module(x)
        if isinstance(module, nn.Conv2d):
            x = shape(x)
    return x


def random_map(shape):
    return fastshape.BitMask.random(shape, 0.5, rng_state=fastshape.rng_state()).to_bool()


SHAPES = {
    "off": lambda x: x,
    "binarize": lambda x: (x > 0).to(x.dtype),
    "on": lambda x: (x > 0).to(x.dtype) * random_map(x.shape),
}

WAYS = {"hooks": {"attach": "hooks"}, "replace": {"attach": "replace"}, "own": {"epsilon": 1e-300}}


@pytest.mark.parametrize("way", WAYS)
def test_one_training_is_tested_with_all_shapings_and_keeps_no_trace(way):
    def trained():
        method = method_with(net().double(), "random", layers=(1, 2), **WAYS[way])
        torch.manual_seed(1)
        for _ in range(3):
            method.update(SOURCE.double(), LABELS)
        return method

    method, twin = trained(), trained()
    plain = net().double().eval()
    plain.load_state_dict(method.model.state_dict())
    x = TARGET.double()
    outside = method.predict(x).logits
    logits = {}
    for at_eval, shape in SHAPES.items():
        torch.manual_seed(5)
        with torch.no_grad():
            expected = forward(plain, x, shape).float()
        fired = method.fired()
        torch.manual_seed(5)
        with method.testing(Test(domain="sketch", at_eval=at_eval)):
            logits[at_eval] = method.predict(x).logits
        torch.testing.assert_close(logits[at_eval], expected, rtol=1e-5, atol=1e-6)
        times = int(at_eval != "off")
        assert method.fired() == {name: count + times for name, count in fired.items()}
    assert torch.equal(logits["off"], outside)
    assert not torch.equal(logits["off"], logits["binarize"])
    assert not torch.equal(logits["on"], logits["binarize"])
    assert torch.equal(method.predict(x).logits, outside)
    for one in (method, twin):
        torch.manual_seed(6)
        one.update(SOURCE.double(), LABELS)
    for a, b in zip(method.model.state_dict().values(), twin.model.state_dict().values(),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_a_test_that_fails_ends_its_shaping_too():
    method = method_with(mode="random", layers=(1,))
    outside = method.predict(TARGET).logits
    with pytest.raises(ZeroDivisionError):
        with method.testing(Test(domain="sketch", at_eval="binarize")):
            raise ZeroDivisionError
    assert torch.equal(method.predict(TARGET).logits, outside)


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.5}])
@pytest.mark.parametrize("at_eval", ["off", "binarize"])
def test_a_test_of_target_maps(at_eval, options):
    method = method_with(mode="da", layers=(1,), attach="hooks", **options)
    with method.testing(Test(domain="sketch", at_eval=at_eval)):
        method.model.eval()
        (y,) = outputs(method.model, "0", SOURCE)
    assert method.fired() == {"0": int(at_eval == "binarize")}
    method.close()
    raw = method.model[0](SOURCE)
    assert torch.equal(y, raw if at_eval == "off" else (raw > 0).float())


def test_a_test_image_has_no_recorded_map():
    method = method_with(mode="da", layers=(1,))
    message = r"at_eval: 'on' is not for mode da; allowed: off \| binarize"
    with pytest.raises(ConfigError, match=message):
        with method.testing(Test(domain="sketch", at_eval="on")):
            pass


@pytest.mark.parametrize("options", [{"attach": "hooks"}, {"mask_unit": "block", "block_size": 2}])
def test_a_part_of_a_test_batch_gets_its_part_of_the_maps(options):
    method = method_with(net().double(), mode="random", layers=(1,), **options)
    with method.testing(Test(domain="sketch", at_eval="on")):
        torch.manual_seed(3)
        whole = method.predict(TARGET.double()).logits
        torch.manual_seed(3)
        part = method.predict(TARGET.double()[4:], start=4).logits
    torch.testing.assert_close(part, whole[4:])


def test_random_maps_of_the_classifier_are_refused_with_several_processes(monkeypatch):
    config = {"mode": "random", "layers": ("fc",)}
    assert method_with(**config).layers == ("fc",)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "parallel", lambda loss, *_, **__: loss)
    with pytest.raises(
        ConfigError, match="layers: 'fc' gives 7 elements per image; random maps of 2"
    ):
        method_with(**config)
    assert method_with(**config, mask_unit="channel").layers == ("fc",)


# --- what is special to target maps ---


def test_a_pass_that_is_not_applied_and_moves_nothing_is_the_baseline():
    results = []
    for values in ({}, {"mode": "da", "layers": (1,), "apply_maps": False}):
        method = method_with(**values)
        for seed in range(3):
            torch.manual_seed(seed)
            target = images(seed=9) if method.uses_target else None
            method.update(images(seed=seed), LABELS, target)
        results.append(method.model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


# --- controls and words ---


def values_of(mode="baseline", **values):
    return config_of(mode, **values).as_dict()


RANDOM = {"mode": "random", "layers": (1,)}
CONTROLS = [
    ({**RANDOM, "p_zero": (0.0,)}, RANDOM, True),
    ({**RANDOM, "p_zero": (0.0,)}, {**RANDOM, "mask_unit": "channel"}, True),
    ({**RANDOM, "p_zero": (0.0,)}, {**RANDOM, "layers": (2,)}, False),
    ({**RANDOM, "p_zero": (0.0,)}, {**RANDOM, "gradient": "zero"}, False),
    ({**RANDOM, "p_zero": (0.0,)}, {**RANDOM, "at_eval": "on"}, False),
    ({**RANDOM, "p_zero": (0.0,)}, {**RANDOM, "bn_at_test": "source"}, False),
    ({**RANDOM, "p_zero": (0.0,)}, {**RANDOM, "attach": "hooks"}, True),
    ({**RANDOM, "p_zero": (0.1,)}, RANDOM, False),
    (RANDOM, {**RANDOM, "p_zero": (0.0,)}, False),
    ({"mode": "da", "apply_maps": False, "record_mode": "train"}, {"mode": "da"}, True),
    ({"mode": "da", "apply_maps": False}, {"mode": "da"}, False),
    ({"mode": "da"}, {"mode": "da"}, False),
    ({"bn_at_test": "source"}, {"mode": "da", "bn_at_test": "source"}, True),
    ({"bn_at_test": "source"}, {**RANDOM, "bn_at_test": "source"}, True),
    ({"bn_at_test": "source"}, {"mode": "dann", "bn_at_test": "source"}, True),
    ({"bn_at_test": "source"}, {"mode": "da"}, False),
    ({"bn_at_test": "source"}, {"bn_at_test": "source"}, False),
    ({}, RANDOM, False),
    ({"mode": "dann", "dann_weight": 0}, {"mode": "dann"}, True),
    ({"mode": "dann", "dann_weight": 0}, {"mode": "dann", "dann_lr_factor": 10}, False),
    ({"mode": "dann", "dann_weight": 0}, {"mode": "dann", "bn_at_test": "source"}, False),
    ({"mode": "dann", "dann_weight": 0}, {"mode": "dann", "dann_weight": 0}, False),
    ({"mode": "dann"}, {"mode": "dann", "dann_weight": 0}, False),
    ({"mode": "adabn", "bn_at_test": "target"}, {"mode": "da", "bn_at_test": "target"}, False),
]


@pytest.mark.parametrize(("control", "own", "expected"), CONTROLS)
def test_what_is_a_control_of_what(control, own, expected):
    method = METHODS[own.get("mode", "baseline")]
    assert method.is_control(values_of(**control), values_of(**own)) is expected


WORDS = [
    ({}, "no shaping"),
    ({"mode": "adabn"}, "no shaping, BatchNorm measured on the target"),
    ({"mode": "random"}, "random maps after conv 10, p_zero 0.5"),
    ({**RANDOM, "p_zero": (0.0,)}, "binarization alone after conv 1"),
    (
        {"mode": "random", "layers": ("all",), "every": 3, "gradient": "zero", "epsilon": 0.1},
        "random maps after one in 3 conv layers, 0.1 in place of 0, gradient zero, p_zero 0.5",
    ),
    (
        {**RANDOM, "mask_unit": "channel", "p_zero": (0.1, 0.2), "layers": (1, "fc")},
        "random maps per channel after conv 1, fc, p_zero 0.1, 0.2",
    ),
    ({"mode": "da"}, "binarized maps of the target after conv 4"),
    (
        {"mode": "da", "binarize": False},
        "binarized maps of the target after conv 4, activation not binarized",
    ),
    (
        {"mode": "da", "product": True, "binarize": False, "record_mode": "train"},
        "real-valued maps of the target after conv 4, recorded in train mode",
    ),
    (
        {"mode": "da", "mask_sources": ("photo", "cartoon"), "top_k": 0.3},
        "binarized maps of photo and cartoon after conv 4, top 0.3",
    ),
    (
        {"mode": "da", "apply_maps": False, "record_mode": "train"},
        "images of the target through BatchNorm in train mode, no maps",
    ),
    (
        {"mode": "da", "target_transform": "shuffled"},
        "binarized maps of shuffled images of the target after conv 4",
    ),
    (
        {"mode": "da", "target_transform": "shuffled", "apply_maps": False},
        "shuffled images of the target through BatchNorm in eval mode, no maps",
    ),
    (
        {"mode": "random-rescaled"},
        "random maps after conv 10, p_zero 0.5, rescaled by 1 / (1 - p_zero)",
    ),
    ({"mode": "random-rescaled", "p_zero": (0.0,)}, "binarization alone after conv 10"),
    (
        {"mode": "mixstyle"},
        "mixed channel statistics after layer1, layer2, probability 0.5, alpha 0.1",
    ),
    ({"mode": "dann", "dann_weight": 0}, "source and target images in one batch, no domain loss"),
    ({"mode": "dropout2d"}, "dropout of channels after conv 10, rate 0.5"),
    ({"mode": "dann"}, "domain-adversarial training, weight 0.5"),
]


@pytest.mark.parametrize(("values", "words"), WORDS)
def test_a_method_in_words(values, words):
    assert METHODS[values.get("mode", "baseline")].words(values_of(**values)) == words


def test_what_an_activation_is_multiplied_by():
    words = {name: method.map_words for name, method in METHODS.items() if method.map_words}
    drawn = "map drawn at random"
    assert words == {"random": drawn, "random-rescaled": drawn, "da": "map of the target image"}
    assert TargetMaps.aliases == ("target",)
