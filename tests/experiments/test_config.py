"""The switches of a run: types, presets, which value wins, and what is refused."""

from types import SimpleNamespace

import pytest
from domainshift.config import (
    Config,
    Test,
    allowed_words,
    choices,
    differing,
    preset_values,
    resolve,
    role,
)
from domainshift.errors import ConfigError
from domainshift.methods import METHODS, method_named

PACS = SimpleNamespace(
    name="PACS",
    domains=("art_painting", "cartoon", "photo", "sketch"),
    defaults={},
    remarks=(),
)
TOY = SimpleNamespace(
    name="toy",
    domains=PACS.domains,
    defaults={"image_size": 64, "weights": "none", "epochs": 10},
    remarks=("toy data: drawn images, not PACS",),
)


def resolved(data_set=PACS, **given):
    place = {"data": "some/folder", "device": "cpu"}
    return resolve(place | given, method_named(given.get("mode", "baseline")), data_set)


def config_of(data_set=PACS, **given):
    return resolved(data_set, **given).config


def value_of(config, name):
    return getattr(config, name) if name in Config.names() else getattr(config.options, name)


def again(config, data=PACS):
    return resolve(config.as_dict(), method_named(config.mode), data).config


# --- presets ---

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
    "model": "resnet18",
    "weights": "imagenet",
    "accumulate": 1,
    "holdout": 0.0,
    "source": "art_painting",
    "test_set": "target",
    "bn_at_test": "trained",
}

# What each report's code ran, as read in it.
PRESETS = [
    ("course-template", "baseline", {}),
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
        | {"record_mode": "train", "pairing": "modulo", "at_eval": "off"},
    ),
    (
        "fastshape",
        "da",
        {"layers": (4,), "product": False, "binarize": True, "record_mode": "eval"}
        | {"pairing": "random", "gradient": "straight_through", "at_eval": "off"}
        | {"holdout": 0.1, "bn_at_test": "source"},
    ),
    (
        "fastshape",
        "random",
        {"layers": (10,), "p_zero": (0.5,), "gradient": "straight_through", "at_eval": "off"}
        | {"holdout": 0.1, "bn_at_test": "source"},
    ),
]


@pytest.mark.parametrize(("preset", "mode", "expected"), PRESETS)
def test_presets(preset, mode, expected):
    config = config_of(preset=preset, mode=mode)
    for name, value in (COMMON | expected).items():
        assert value_of(config, name) == value, name


def test_preset_fastshape_treats_batchnorm_alike_in_every_mode_but_adabn():
    modes = {mode: config_of(mode=mode).bn_at_test for mode in METHODS}
    assert modes.pop("adabn") == "target"
    assert set(modes.values()) == {"source"}


def test_a_preset_gives_its_values_to_the_modes_that_it_ran():
    assert preset_values("report-a", "baseline")["batch_size"] == 64
    with pytest.raises(ConfigError, match=r"mode: 'dann' is not in preset report-a; allowed: base"):
        preset_values("report-a", "dann")


def test_values_of_the_user_override_the_preset():
    config = config_of(preset="report-b", mode="random", p_zero=["0.3"], at_eval="off", lr="0.01")
    assert (config.options.p_zero, config.options.at_eval, config.lr) == ((0.3,), "off", 0.01)
    assert config.options.gradient == "zero"  # others stay the preset's


def test_named_layers_end_the_every_of_a_preset():
    assert config_of(preset="report-a", mode="random", layers=["4"]).options.every == 1
    assert config_of(preset="report-a", mode="random", layers=["all"]).options.every == 3


def test_an_invalid_test_set_is_among_the_warnings():
    invalid = [w for w in resolved(preset="report-a", mode="random").warnings if "INVALID" in w]
    assert len(invalid) == 1
    sound = resolved(preset="report-a", mode="random", test_set="target").warnings
    assert not any("INVALID" in warning for warning in sound)


def test_defaults_of_a_data_set_give_way_to_the_user():
    config, warnings = resolved(TOY, data="toy", epochs="3")
    assert (config.image_size, config.weights, config.epochs) == (64, "none", 3)
    assert "toy data: drawn images, not PACS" in warnings
    changed = next(warning for warning in warnings if "replace" in warning)
    assert "image_size 64" in changed
    assert "epochs" not in changed
    toy, warnings = resolved(TOY, data="toy", updates=7)
    assert (toy.epochs, toy.updates) == (None, 7)
    assert not any("epochs" in warning for warning in warnings)


# --- values ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["4", "7"], (4, 7)),
        (["4,7"], (4, 7)),
        ([4, 7], (4, 7)),
        (4, (4,)),
        ("4", (4,)),
        (["layer1.*", "20"], ("layer1.*", 20)),
        (["all"], ("all",)),
    ],
)
def test_ways_to_write_layers(given, expected):
    assert config_of(mode="da", layers=given).options.layers == expected


def test_yaml_values():
    assert config_of(lr="1e-3").lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert config_of(amp=False).amp == "off"  # and off as false
    assert config_of(mode="random", at_eval=True).options.at_eval == "on"


def test_a_configuration_survives_its_own_record():
    config = config_of(mode="random", layers=[1, "layer2.*"], p_zero=0.25, limit=3)
    assert again(config) == config


def test_updates_take_the_place_of_epochs():
    config = config_of(updates=50, batch_size=128)
    assert (config.epochs, config.updates) == (None, 50)
    assert again(config) == config
    assert config.length(2048) == (4, 50)  # 16 an epoch: three whole epochs and two updates
    assert config_of(updates=50, batch_size=64).length(2048) == (2, 50)
    assert config_of(epochs=30).length(2048) == (30, 480)
    assert config_of(epochs=30, batch_size=100).length(2048) == (30, 630)


# A control of the study each; a value that would undo it gives way.
ARMS = [
    ({"mode": "random", "p_zero": 0}, {"p_zero": (0.0,), "binarize": True}),  # binarize only
    ({"mode": "da", "apply_maps": False, "record_mode": "train"}, {"bn_at_test": "trained"}),
    ({"mode": "da", "product": True}, {"binarize": False}),
    ({"mode": "da", "binarize": False}, {"product": False}),
    ({"mode": "da", "mask_sources": "photo,art_painting"}, {"layers": (4,)}),
    ({"mode": "dropout2d"}, {"layers": (10,), "drop_rate": 0.5, "bn_at_test": "source"}),
    ({"mode": "dann"}, {"dann_weight": 0.5, "dann_lr_factor": 1.0}),
    ({"mode": "adabn"}, {"bn_at_test": "target"}),
    ({"mode": "random", "mask_unit": "block", "block_size": 3}, {"layers": (10,)}),
]


@pytest.mark.parametrize(("given", "expected"), ARMS)
def test_arms(given, expected):
    config = config_of(**given)
    for name, value in expected.items():
        assert value_of(config, name) == value, name
    assert again(config) == config


def test_statistics_of_the_source_after_a_pass_in_train_mode_are_warned_of():
    warnings = resolved(mode="da", record_mode="train").warnings
    assert any("what record_mode train moves is not in the figures" in w for w in warnings)


# --- roles ---


def test_every_switch_has_a_role_help_and_a_default_that_it_allows():
    kinds = {Config, *(method.Options for method in METHODS.values())}
    for kind in kinds:
        for name in kind.names():
            assert role(kind, name) in ("training", "testing", "place"), name
            assert kind.model_fields[name].description, name
            assert allowed_words(kind, name), name
        assert kind.model_validate(kind().model_dump()) == kind()


def test_no_switch_of_a_method_has_the_name_of_a_common_one():
    for method in METHODS.values():
        assert not set(method.Options.names()) & set(Config.names()), method.name


def test_training_values_leave_tests_and_places_out():
    values = config_of(mode="random", at_eval="on", bn_at_test="source").training_values()
    assert {"mode", "layers", "p_zero", "lr", "seed", "source"} <= set(values)
    assert not {"target", "at_eval", "bn_at_test", "evaluate", "device", "out", "data"} & set(
        values
    )


def test_differing_names_old_and_new():
    old, new = config_of(epochs=3).training_values(), config_of(epochs=5).training_values()
    assert differing(old, new) == ["epochs: 3 -> 5"]


def test_allowed_words_follow_from_the_types():
    assert allowed_words(Config, "momentum") == "0 <= momentum < 1"
    assert allowed_words(Config, "holdout") == "0 <= holdout <= 0.5"
    assert allowed_words(Config, "lr") == "a number above 0"
    assert allowed_words(Config, "limit") == "a whole number from 1"
    assert allowed_words(Config, "amp") == "auto | off | float16 | bfloat16"
    assert choices(Config.model_fields["bn_at_test"].annotation) == ("trained", "source", "target")


# --- tests of a run ---


def test_the_tests_that_switches_ask_for():
    config = config_of(target=["sketch", "photo"], holdout=0.1, bn_at_test="source")
    assert [test.name for test in config.tests()] == [
        "sketch-bn-source",
        "photo-bn-source",
        "art_painting-holdout-bn-source",
    ]
    shaped = config_of(mode="random", preset="report-a", target="cartoon")
    assert [test.name for test in shaped.tests()] == [
        "cartoon-shaping-on",
        "art_painting-train-shaping-on",
    ]


def test_statistics_of_a_target_never_serve_the_source():
    tests = config_of(mode="adabn", holdout=0.1).tests()
    assert tests == [
        Test(domain="sketch", bn="target"),
        Test(domain="art_painting", images="holdout"),
    ]


@pytest.mark.parametrize(
    ("evaluate", "epochs"), [("last", [7]), ("each", [1, 2, 3, 4, 5, 6, 7]), ("3", [3, 6, 7])]
)
def test_epochs_that_are_followed_by_tests(evaluate, epochs):
    config = config_of(evaluate=evaluate)
    assert [epoch for epoch in range(1, 8) if config.tests_after(epoch, 7)] == epochs


# --- refused ---

REFUSED = [
    (
        {"target": "clipart"},
        r"target: 'clipart' is no domain of data set PACS; allowed: cartoon \|",
    ),
    ({"source": "Art"}, r"source: 'Art' is no domain of data set PACS; allowed: art_painting"),
    ({"target": "art_painting"}, r"target: 'art_painting' is also the source; .*cartoon"),
    ({"target": ["sketch", "sketch"]}, r"target: .*names a domain twice"),
    ({"mode": "random", "p_zero": ["1"]}, r"p_zero: '1' is not allowed; allowed: 0 <= p_zero < 1"),
    ({"mode": "random", "p_zero": ["nan"]}, r"p_zero: 'nan' is not allowed; .*< 1"),
    ({"mode": "random", "p_zero": ["0.1", "-1"]}, r"p_zero: .*'-1'.* is not allowed"),
    ({"mode": "random", "p_zero": True}, r"p_zero: True is not allowed"),
    ({"mode": "da", "p_zero": ["0.5"]}, r"p_zero: mode da has no such switch; it has .*layers"),
    ({"layers": ["4"]}, r"layers: mode baseline has no such switch"),
    ({"mode": "da", "layers": []}, r"layers: .*is empty"),
    ({"mode": "da", "every": 0}, r"every: 0 is not allowed; allowed: a whole number from 1"),
    ({"mode": "da", "product": True, "gradient": "clipped"}, r"gradient: 'clipped' .*zero"),
    ({"mode": "random", "product": True}, r"product: mode random has no such switch"),
    ({"mode": "da", "product": True, "binarize": True}, r"product: .*no binarization"),
    ({"mode": "da", "at_eval": "on"}, r"at_eval: 'on' .*off \| binarize"),
    ({"mode": "da", "preset": "report-a"}, r"mode: 'da' is not in preset report-a"),
    ({"mode": "dann", "preset": "report-b"}, r"mode: 'dann' .*allowed: baseline \| random \| da"),
    ({"preset": "mine"}, r"preset: 'mine' is not allowed; allowed: course-template \| fastshape"),
    ({"mode": "da", "top_k": 0}, r"top_k: 0 is not allowed; allowed: 0 < top_k <= 1"),
    ({"mode": "random", "mask_unit": "block"}, r"block_size: None with mask_unit block; .*from 1"),
    ({"mode": "random", "block_size": 2}, r"block_size: 2 with mask_unit element"),
    ({"mode": "da", "epsilon": "-1"}, r"epsilon: '-1' is not allowed; allowed: a number from 0"),
    ({"mode": "da", "product": True, "epsilon": 0.1}, r"epsilon: 0.1 is not for --product"),
    (
        {"mode": "da", "mask_sources": ["sketch"]},
        r"mask_sources: .*has the target in it; allowed: any domain but sketch$",
    ),
    ({"mode": "da", "mask_sources": ["photo", "photo"]}, r"mask_sources: .*names a domain twice"),
    ({"mode": "dropout2d", "drop_rate": 1}, r"drop_rate: 1 is not allowed; .*0 <= drop_rate < 1"),
    ({"mode": "dann", "dann_lr_factor": 0}, r"dann_lr_factor: 0 is not allowed; .*above 0"),
    (
        {"mode": "da", "target_transform": "shuffled", "image_size": 100},
        r"target_transform: 'shuffled' is not for image_size 100; .*train \| test; .*multiple of 16",
    ),
    ({"mode": "mixstyle", "mix_probability": 0}, r"mix_probability: 0 is not allowed; .*0 < mix"),
    ({"mode": "mixstyle", "mix_alpha": 0}, r"mix_alpha: 0 is not allowed; .*above 0"),
    ({"epochs": 5, "updates": 5}, r"epochs: 5 and updates 5: one of them .*null for the other"),
    ({"epochs": None}, r"epochs: None and updates None: one of them"),
    ({"updates": 0}, r"updates: 0 is not allowed; allowed: a whole number from 1"),
    ({"epochs": "0"}, r"epochs: '0' is not allowed; allowed: a whole number from 1"),
    ({"epochs": "2.5"}, r"epochs: '2.5' is not allowed"),
    ({"batch_size": "many"}, r"batch_size: 'many' is not allowed"),
    ({"image_size": 16}, r"image_size: 16 .*32 <= image_size <= 1024"),
    ({"lr": "nan"}, r"lr: 'nan' is not allowed; allowed: a number above 0"),
    ({"holdout": 0.9}, r"holdout: 0.9 .*0 <= holdout <= 0.5"),
    ({"accumulate": 300}, r"accumulate: 300 is more than batch_size 128"),
    ({"momentum": 0, "nesterov": True}, r"nesterov: True needs a momentum"),
    ({"nesterov": "maybe"}, r"nesterov: 'maybe' is not allowed; allowed: true \| false"),
    ({"device": "tpu"}, r"device: 'tpu' is not allowed; allowed: auto \| cpu \| cuda"),
    ({"device": "cpu:"}, r"device: 'cpu:' is not allowed"),
    ({"seed": -1}, r"seed: -1 is not allowed; allowed: a whole number from 0"),
    ({"evaluate": "0"}, r"evaluate: '0' is not allowed; allowed: last \| each \| a whole number"),
    ({"evaluate": "often"}, r"evaluate: 'often' is not allowed"),
    ({"lerning_rate": 1}, r"lerning_rate: mode baseline has no such switch; it has .*lr"),
    ({"data": ""}, r"data: '' is not allowed"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_refused(wrong, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config_of(**wrong)
    assert "\n" not in str(caught.value)


def test_an_unknown_method_is_refused_with_the_list_of_all():
    with pytest.raises(ConfigError, match=r"mode: 'ada' is not allowed; allowed: baseline \|"):
        method_named("ada")


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: 'cuda' needs a CUDA GPU, and torch sees none"):
        config_of(device="cuda")
    assert config_of(device="auto").device == "cpu"


def test_auto_precision_and_memory_format_follow_the_machine(monkeypatch):
    monkeypatch.setattr("domainshift.config.cpu_has_bfloat16", lambda: False)
    assert (config_of().amp, config_of().memory_format) == ("off", "contiguous")
    monkeypatch.setattr("domainshift.config.cpu_has_bfloat16", lambda: True)
    assert (config_of().amp, config_of().memory_format) == ("bfloat16", "channels_last")
    assert config_of(amp="off").memory_format == "contiguous"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert config_of(device="cuda").amp == "float16"
    assert config_of(device="cuda", amp="off").memory_format == "channels_last"
