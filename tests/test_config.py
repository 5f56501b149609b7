"""The switches of a run: presets, what overrides what, and what is refused."""

import pytest
from config import PROBABILITY, SWITCHES, Config, ConfigError, differing, resolve

PACS = {"data": "some/folder", "device": "cpu"}  # resolve does not look into the folder


def config_of(**said):
    return resolve(PACS | said)[0]


COMMON = {
    "batch_size": 128,
    "lr": 1e-3,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "step_fraction": 0.8,
    "gamma": 0.1,
    "epochs": 30,
    "seed": 0,
    "image_size": 224,
    "weights": "imagenet",
    "accumulate": 1,
    "holdout": 0.0,
    "source": "art_painting",
    "test_set": "target",
}


def test_course_template_is_the_common_protocol():
    config = config_of(preset="course-template", mode="baseline")
    for name, value in COMMON.items():
        assert getattr(config, name) == value, name
    assert (config.layers, config.p_zero) == ((), None)


# What each report's code ran, as read in it.
PRESETS = [
    ("report-a", "baseline", {"batch_size": 64, "test_set": "target"}),
    (
        "report-a",
        "random",
        {"batch_size": 64, "layers": ("all",), "every": 3, "p_zero": (0.2,), "after": "conv"}
        | {"at_eval": "on", "binarize": True, "gradient": "zero", "test_set": "source-train"},
    ),
    (
        "report-b",
        "random",
        {"batch_size": 128, "layers": (1,), "p_zero": (0.7,), "gradient": "zero"}
        | {"at_eval": "on", "binarize": True},
    ),
    (
        "report-b",
        "da",
        {"batch_size": 256, "layers": (4,), "product": True, "binarize": False}
        | {"record_mode": "train", "pairing": "modulo", "at_eval": "off", "p_zero": None},
    ),
    (
        "fastshape",
        "da",
        {"layers": (4,), "product": False, "binarize": True, "record_mode": "eval"}
        | {"pairing": "random", "gradient": "straight_through", "at_eval": "off", "holdout": 0.1},
    ),
    ("fastshape", "random", {"layers": (10,), "gradient": "straight_through", "at_eval": "off"}),
]


@pytest.mark.parametrize(("preset", "mode", "expected"), PRESETS)
def test_presets(preset, mode, expected):
    config = config_of(preset=preset, mode=mode)
    unlike_common = {name: v for name, v in expected.items() if name not in COMMON} | expected
    for name, value in unlike_common.items():
        assert getattr(config, name) == value, name
    for name in set(COMMON) - set(expected) - {"holdout"}:
        assert getattr(config, name) == COMMON[name], name


def test_what_is_said_overrides_the_preset():
    config = config_of(preset="report-b", mode="random", p_zero=["0.3"], at_eval="off", lr="0.01")
    assert (config.p_zero, config.at_eval, config.lr) == ((0.3,), "off", 0.01)
    assert config.gradient == "zero"  # what was not said stays the preset's


def test_named_layers_end_a_presets_every():
    assert config_of(preset="report-a", mode="random", layers=["4"]).every == 1
    assert config_of(preset="report-a", mode="random", layers=["all"]).every == 3


def test_invalid_test_set_is_said_loudly():
    _, warnings = resolve(PACS | {"preset": "report-a", "mode": "random"})
    assert any(warning.startswith("INVALID") for warning in warnings)
    _, warnings = resolve(PACS | {"preset": "report-a", "mode": "random", "test_set": "target"})
    assert not any(warning.startswith("INVALID") for warning in warnings)


def test_toy_defaults_give_way_to_what_is_said():
    config, warnings = resolve({"data": "toy", "epochs": "3", "device": "cpu"})
    assert (config.image_size, config.weights, config.epochs) == (64, "none", 3)
    assert any("not PACS" in warning for warning in warnings)
    changed = next(warning for warning in warnings if "toy defaults" in warning)
    assert "image_size 64" in changed
    assert "epochs" not in changed


def test_no_data_means_the_pacs_folder_or_the_toy(tmp_path, monkeypatch):
    monkeypatch.setattr("config.REPOSITORY", tmp_path)
    config, warnings = resolve({"device": "cpu"})
    assert config.data == "toy"
    assert any("no --data" in warning for warning in warnings)
    (tmp_path / "data" / "PACS").mkdir(parents=True)
    config, warnings = resolve({"device": "cpu"})
    assert config.data == str(tmp_path / "data" / "PACS")
    assert not warnings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["4", "7"], (4, 7)),
        (["4,7"], (4, 7)),
        ([4, 7], (4, 7)),
        (4, (4,)),
        (["layer1.*", "20"], ("layer1.*", 20)),
        (["all"], ("all",)),
    ],
)
def test_ways_to_write_layers(given, expected):
    assert config_of(mode="da", layers=given).layers == expected


def test_yaml_numbers_written_as_text_are_numbers():
    assert config_of(lr="1e-3").lr == 1e-3  # yaml 1.1 reads 1e-3 as text
    assert config_of(amp=False).amp == "off"  # and off as false


def test_a_configuration_survives_its_own_record():
    config = config_of(mode="random", layers=[1, "layer2.*"], p_zero=0.25, limit=3)
    again, _ = resolve(config.as_dict())
    assert again == config


def test_updates_take_the_place_of_epochs():
    config = config_of(updates=50, batch_size=128)
    assert (config.epochs, config.updates) == (None, 50)
    assert resolve(config.as_dict())[0] == config
    assert config.length(2048) == (4, 50)  # 16 an epoch: three whole epochs and two updates
    assert config_of(updates=50, batch_size=64).length(2048) == (2, 50)
    assert config_of(epochs=30).length(2048) == (30, 480)
    assert config_of(epochs=30, batch_size=100).length(2048) == (30, 630)
    toy, warnings = resolve({"data": "toy", "updates": 7})
    assert (toy.epochs, toy.updates) == (None, 7)
    assert not any("epochs" in warning for warning in warnings)


# A control of the study each; what would undo it gives way.
ARMS = [
    ({"mode": "random", "p_zero": 0}, {"p_zero": (0.0,), "binarize": True}),  # binarize only
    ({"mode": "da", "apply_maps": False, "record_mode": "train"}, {"bn_recalibration": False}),
    ({"mode": "da", "product": True}, {"binarize": False}),
    ({"mode": "da", "binarize": False}, {"product": False}),
    ({"mode": "da", "mask_sources": "photo,art_painting"}, {"layers": (4,)}),
    ({"mode": "dropout2d"}, {"layers": (10,), "drop_rate": 0.5, "bn_recalibration": True}),
    ({"mode": "dann"}, {"dann_weight": 0.5, "dann_lr_factor": 1.0, "layers": ()}),
    ({"mode": "adabn"}, {"layers": (), "bn_recalibration": False}),
    ({"mode": "random", "mask_unit": "block", "block_size": 3}, {"layers": (10,)}),
]


@pytest.mark.parametrize(("given", "expected"), ARMS)
def test_arms(given, expected):
    config = config_of(**given)
    for name, value in expected.items():
        assert getattr(config, name) == value, name
    assert resolve(config.as_dict())[0] == config


def test_recalibration_after_a_pass_in_train_mode_is_said():
    _, warnings = resolve(PACS | {"mode": "da", "record_mode": "train"})
    assert any("what record_mode train moves is not in the figures" in w for w in warnings)


def test_one_hash_on_every_machine():
    here = config_of(data="/some/where", weights="/a/r18.pth")
    there = config_of(data="/else/where", weights="/b/r18.pth")
    assert here.hash() == there.hash()
    assert here.hash() != config_of(weights="/a/r50.pth").hash()
    assert here.hash() != config_of(data="toy", weights="/a/r18.pth").hash()


def test_hash_ignores_where_and_sees_what():
    config = config_of(mode="da")
    assert config_of(mode="da", workers=2, out="x", cache="y").hash() == config.hash()
    assert config_of(mode="da", seed=1).hash() != config.hash()
    assert config_of(mode="da", seed=1).run_name != config.run_name
    assert config.run_name.startswith("da-art_painting-sketch-4-s0-")


def test_the_same_run_where_data_and_weights_lie_elsewhere():
    here = config_of(data="/some/where", weights="/a/r18.pth").as_dict()
    there = config_of(data="/else/where", weights="/b/r18.pth").as_dict()
    assert differing(here, there) == []
    assert differing(here, there | {"weights": "/b/r50.pth"}) == [
        "weights: '/a/r18.pth' -> '/b/r50.pth'"
    ]
    assert differing(here, there | {"data": "toy"}) == ["data: '/some/where' -> 'toy'"]
    for odd in (3, None, [1]):  # what a broken config.yaml may hold
        assert differing(here | {"weights": odd}, here) == [f"weights: {odd!r} -> '/a/r18.pth'"]


def test_differing_names_old_and_new():
    old, new = config_of(epochs=3).as_dict(), config_of(epochs=5, workers=2).as_dict()
    assert differing(old, new) == ["epochs: 3 -> 5"]


def test_every_switch_has_a_rule_help_and_a_default_that_obeys_it():
    for name, switch in SWITCHES.items():
        assert switch.metadata["help"], name
        value = switch.metadata["rule"].convert(switch.default)
        assert value == switch.default, name
    assert Config() == Config(**{name: f.default for name, f in SWITCHES.items()})


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "inf", "1.5", "x", True, None])
def test_p_zero_below_one(value):
    with pytest.raises((ValueError, TypeError)):
        PROBABILITY.convert(value)


REFUSED = [
    ({"mode": "ada"}, r"mode: 'ada' is not allowed; allowed: baseline \| random \| da \| adabn"),
    ({"target": "clipart"}, r"target: 'clipart' .*art_painting \| cartoon \| photo \| sketch"),
    ({"target": "art_painting"}, r"target: 'art_painting' is also the source; .*cartoon"),
    ({"mode": "random", "p_zero": ["1"]}, r"p_zero: '1' is not allowed; allowed: 0 <= p_zero < 1"),
    ({"mode": "random", "p_zero": ["nan"]}, r"p_zero: 'nan' is not allowed; .*< 1"),
    ({"mode": "random", "p_zero": ["0.1", "-1"]}, r"p_zero: .*'-1'.* is not allowed"),
    ({"mode": "da", "p_zero": ["0.5"]}, r"p_zero: .*for mode random"),
    ({"layers": ["4"]}, r"layers: \(4,\) is for modes random and da and dropout2d, not for mode b"),
    ({"mode": "da", "layers": []}, r"layers: .*is empty"),
    ({"mode": "da", "every": 0}, r"every: 0 is not allowed; allowed: a whole number from 1"),
    ({"mode": "da", "product": True, "gradient": "clipped"}, r"gradient: 'clipped' .*zero"),
    ({"mode": "random", "product": True}, r"product: .*for mode da"),
    ({"mode": "da", "product": True, "binarize": True}, r"product: .*no binarization"),
    ({"mode": "da", "at_eval": "on"}, r"at_eval: 'on' .*off \| binarize"),
    ({"mode": "da", "preset": "report-a"}, r"mode: 'da' is not in preset report-a"),
    ({"mode": "dann", "preset": "report-b"}, r"mode: 'dann' .*allowed: baseline \| random \| da"),
    (
        {"mode": "random", "top_k": 0.5},
        r"top_k: 0.5 is for mode da, not for .*; allowed here: None",
    ),
    ({"mode": "da", "top_k": 0}, r"top_k: 0 is not allowed; allowed: 0 < top_k <= 1"),
    ({"mode": "random", "apply_maps": False}, r"apply_maps: False is for mode da"),
    ({"mode": "da", "mask_unit": "channel"}, r"mask_unit: 'channel' is for mode random"),
    ({"mode": "random", "mask_unit": "block"}, r"block_size: None with mask_unit block; .*from 1"),
    ({"mode": "random", "block_size": 2}, r"block_size: 2 with mask_unit element"),
    ({"mode": "dann", "epsilon": 0.1}, r"epsilon: 0.1 is for modes random and da"),
    ({"mode": "da", "epsilon": "-1"}, r"epsilon: '-1' is not allowed; allowed: a number from 0"),
    ({"mode": "da", "product": True, "epsilon": 0.1}, r"epsilon: 0.1 is not for --product"),
    ({"mode": "da", "mask_sources": ["clipart"]}, r"mask_sources: 'clipart' .*art_painting \| car"),
    ({"mode": "da", "mask_sources": ["sketch"]}, r"mask_sources: .*has the target in it; .*photo$"),
    ({"mode": "da", "mask_sources": ["photo", "photo"]}, r"mask_sources: .*names a domain twice"),
    ({"mode": "adabn", "mask_sources": ["photo"]}, r"mask_sources: .*is for mode da"),
    ({"mode": "dropout2d", "drop_rate": 1}, r"drop_rate: 1 is not allowed; .*0 <= drop_rate < 1"),
    ({"drop_rate": 0.5}, r"drop_rate: 0.5 is for mode dropout2d, not for mode baseline"),
    ({"mode": "da", "dann_weight": 1}, r"dann_weight: 1.0 is for mode dann"),
    ({"mode": "dann", "dann_lr_factor": 0}, r"dann_lr_factor: 0 is not allowed; .*above 0"),
    (
        {"mode": "adabn", "bn_recalibration": True},
        r"bn_recalibration: True is for modes baseline and random an",
    ),
    ({"gradient": "zero"}, r"gradient: 'zero' is for modes random and da, not for mode baseline"),
    ({"epochs": 5, "updates": 5}, r"epochs: 5 and updates 5: one of them .*null for the other"),
    ({"epochs": None}, r"epochs: None and updates None: one of them"),
    ({"updates": 0}, r"updates: 0 is not allowed; allowed: a whole number from 1"),
    ({"epochs": "0"}, r"epochs: '0' is not allowed; allowed: a whole number from 1"),
    ({"epochs": "2.5"}, r"epochs: '2.5' is not allowed"),
    ({"batch_size": "many"}, r"batch_size: 'many' is not allowed"),
    ({"image_size": 16}, r"image_size: 16 .*from 32 to 1024"),
    ({"lr": "nan"}, r"lr: 'nan' is not allowed; allowed: a number above 0"),
    ({"holdout": 0.9}, r"holdout: 0.9 .*0 <= holdout <= 0.5"),
    ({"accumulate": 300}, r"accumulate: 300 is more than batch_size 128"),
    ({"momentum": 0, "nesterov": True}, r"nesterov: True needs a momentum"),
    ({"nesterov": "maybe"}, r"nesterov: 'maybe' is not allowed; allowed: true \| false"),
    ({"device": "tpu"}, r"device: 'tpu' is not allowed; allowed: auto \| cpu \| cuda"),
    ({"seed": -1}, r"seed: -1 is not allowed"),
    ({"lerning_rate": 1}, r"lerning_rate: no such switch; there are mode, preset"),
    ({"data": ""}, r"data: '' is not allowed; allowed: toy or a folder"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**wrong)


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: 'cuda' asked for, but torch sees no CUDA GPU"):
        config_of(device="cuda")
    assert config_of(device="auto").device == "cpu"


def test_auto_precision_follows_the_device(monkeypatch):
    assert config_of(amp="auto").amp == "off"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert config_of(device="cuda", amp="auto").amp == "float16"
    assert config_of(device="cuda", amp="off").amp == "off"
