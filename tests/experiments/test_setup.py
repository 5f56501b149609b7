"""From values to a checked setup, and what decides the key of a training."""

import numpy as np
import pytest
import torch
from domainshift.config import Test
from domainshift.errors import ConfigError
from domainshift.models import build_model, state_digest
from domainshift.setup import NO_DATA, run_name, set_up, training_key

TINY = {
    "data": "toy",
    "limit": 2,
    "image_size": 32,
    "device": "cpu",
    "weights": "none",
    "amp": "off",
}


def key(**values):
    return training_key(set_up(TINY | values))


def test_switches_of_testing_and_of_place_do_not_change_the_training():
    baseline = key()
    for values in (
        {"target": "photo"},
        {"target": ["photo", "sketch"]},
        {"bn_at_test": "target"},
        {"test_set": "source-train"},
        {"evaluate": "each"},
        {"mode": "adabn"},
        {"workers": 2, "out": "x", "pipeline": "device", "memory_format": "channels_last"},
    ):
        assert key(**values) == baseline, values
    assert key(mode="random", at_eval="on") == key(mode="random")


def test_everything_else_does():
    keys = [
        key(),
        key(seed=1),
        key(epochs=3),
        key(source="photo"),
        key(limit=3),
        key(amp="bfloat16"),
        key(model="resnet18"),
        key(mode="random"),
        key(mode="random", p_zero=0.3),
        key(mode="da"),
        key(mode="da", target="photo"),
        key(mode="da", apply_maps=False, record_mode="train"),
    ]
    assert len(set(keys)) == len(keys)


def test_a_target_that_training_does_not_see_is_not_in_its_key():
    """Maps of other domains stand in the target's place: one training serves both targets."""
    sources = {"mode": "da", "mask_sources": ["art_painting", "photo"]}
    assert key(**sources, target="sketch") == key(**sources, target="cartoon")


def test_weights_enter_by_their_content(tmp_path):
    import torch
    from domainshift.models import build_model

    state = build_model("resnet18-slim", "none", 7, 0)[0].state_dict()
    paths = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    for path in paths[:2]:
        torch.save(state, path)
    paths[1].write_bytes(paths[0].read_bytes())
    torch.save({name: tensor + 1 for name, tensor in state.items()}, paths[2])
    first, same, other = (key(weights=str(path)) for path in paths)
    assert first == same != other


def test_a_name_reads_well_and_differs_with_the_training():
    name = run_name(set_up(TINY | {"mode": "da"}))
    assert name.startswith("da-art_painting-sketch-4-s0-")
    assert run_name(set_up(TINY | {"mode": "da", "seed": 1})) != name
    assert run_name(set_up(TINY)).startswith("baseline-art_painting-s0-")


def test_no_data_means_the_pacs_folder_or_the_toy(monkeypatch, tmp_path):
    monkeypatch.setattr("domainshift.setup.REPOSITORY", tmp_path)
    setup = set_up({"device": "cpu"})
    assert (setup.data.name, setup.config.data) == ("toy", "toy")
    assert NO_DATA in setup.warnings
    (tmp_path / "data" / "PACS").mkdir(parents=True)
    with pytest.raises(Exception, match="PACS"):  # the folder is taken, and it is empty
        set_up({"device": "cpu"})


def test_layers_that_the_network_lacks_are_refused():
    with pytest.raises(
        ConfigError, match="layers: there is no conv 21; this model has convs 1 to 20"
    ):
        set_up(TINY | {"mode": "da", "layers": 21})


# --- what the caller's program has set --------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    values = {"epochs": np.int64(3), "lr": np.float32(0.5), "layers": np.array([1, 4])}
    config = set_up({"data": "toy", "mode": "random", **values}).config
    assert (config.epochs, config.lr, config.options.layers) == (3, 0.5, (1, 4))
    assert type(config.epochs) is int and type(config.lr) is float


def test_yaml_reads_a_bare_on_as_true():
    for value, word in ((True, "on"), (False, "off")):
        assert Test.model_validate({"domain": "sketch", "at_eval": value}).at_eval == word


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_in_the_caller_are_as_if_they_were_not_there(device):
    before = state_digest(build_model("resnet18-slim", "none", 7, 0)[0].state_dict())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):
            model, _ = build_model("resnet18-slim", "none", 7, 0)
            assert torch.get_default_device().type == device
            setup = set_up({"data": "toy", "mode": "random", "layers": [1]})
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert state_digest(model.state_dict()) == before
    assert setup.method.layer_names(setup.config) == ("conv1",)


@pytest.mark.parametrize("name", ["data", "cache", "weights", "out"])
@pytest.mark.parametrize("path", ["", "runs/\udcff", "runs/\0"])
def test_a_path_that_config_yaml_cannot_hold_is_refused(name, path):
    """A run in such a folder could not be resumed, and an empty --data would mean the current folder."""
    with pytest.raises(ConfigError, match=f"^{name}: .* is not allowed; allowed: a path in UTF-8"):
        set_up({"data": "toy", name: path})


def test_a_seed_beyond_64_bits_is_refused():
    assert set_up({"data": "toy", "seed": 2**64 - 1}).config.seed == 2**64 - 1
    with pytest.raises(
        ConfigError, match=r"^seed: .* allowed: a whole number from 0 to 2\*\*64 - 1"
    ):
        set_up({"data": "toy", "seed": 2**64})
