"""The command run.py: what a user types, and what is refused in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from domainshift import command, files
from domainshift.command import parser, request, setups_of
from domainshift.config import Config
from domainshift.errors import ConfigError
from domainshift.methods import METHODS
from domainshift.training import pictures

EXPERIMENTS = Path(command.__file__).parents[1]
TINY = (
    "--data toy --limit 3 --image-size 32 --epochs 1 --batch-size 8 --device cpu --weights none"
).split()


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "curves", lambda *_: None)
    monkeypatch.setattr(pictures, "maps", lambda *_: None)


# --- reading the command line ---


def test_only_given_switches_are_values():
    words = ["--mode", "da", "--layers", "4", "7", "--lr", "0.1", "--no-nesterov", "--p-zero", ".3"]
    assert request(words).values == {
        "mode": "da",
        "layers": ["4", "7"],
        "lr": "0.1",
        "nesterov": False,
        "p_zero": [".3"],
    }


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("mode: da\nlayers: [4]\nbatch-size: 8\nlr: 1e-3\nout: elsewhere\n")
    asked = request(["--config", str(path), "--layers", "7", "9", "--data", "toy"])
    config = setups_of(asked.values)[0].config
    assert (config.mode, config.options.layers, config.batch_size) == ("da", (7, 9), 8)
    assert (config.lr, config.out) == (1e-3, None)


def test_help_shows_every_switch_its_default_and_the_presets():
    text = " ".join(parser("random", "report-b").format_help().split())
    for method in METHODS.values():
        for name in (*Config.names(), *method.Options.names()):
            assert f"--{name.replace('_', '-')}" in text, name
    assert "learning rate of SGD (default: 0.001)" in text
    assert "preset report-b: 0.7" in text
    for title in ("data:", "testing:", "optimization:", "switches of method dann:"):
        assert title in text


def test_resume_without_a_folder_is_refused():
    with pytest.raises(ConfigError, match="resume: needs --out FOLDER"):
        request(["--resume", "--mode", "da"])


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run to resume"):
        request(["--resume", "--out", str(tmp_path)])


def test_resume_takes_all_switches_from_the_folder_but_those_that_are_given(tmp_path):
    saved = {"mode": "da", "layers": [4], "lr": 0.5, "epochs": 3, "tests": [], "warnings": ["w"]}
    files.write_yaml(tmp_path / "config.yaml", saved)
    asked = request(["--resume", "--out", str(tmp_path), "--epochs", "4"])
    assert asked.resume
    assert asked.values == {
        "mode": "da", "layers": [4], "lr": 0.5, "epochs": "4", "out": str(tmp_path)
    }  # fmt: skip


def test_several_targets_are_one_training_where_the_method_allows_it():
    values = {"data": "toy", "limit": 2, "device": "cpu", "target": ["sketch", "photo"]}
    (setup,) = setups_of(values | {"mode": "random"})
    assert setup.config.target == ("sketch", "photo")
    each = setups_of(values | {"mode": "da", "out": "runs/x"})
    assert [(s.config.target, s.config.out) for s in each] == [
        (("sketch",), "runs/x/sketch"),
        (("photo",), "runs/x/photo"),
    ]


# --- whole runs ---


def test_one_line_trains_and_tests(tmp_path, no_pictures, capsys):
    folder = tmp_path / "r"
    assert command.main([*TINY, "--target", "sketch", "photo", "--out", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    needed = (
        "source target mode layers seed epochs target_correct target_total target_accuracy "
        "macro_accuracy per_class majority_rate collapsed source_accuracy seconds "
        "images_per_second versions warnings"
    )
    assert set(needed.split()) <= set(summary)
    assert (summary["target"], summary["target_total"]) == ("sketch", 21)
    out = capsys.readouterr().out
    assert "sketch" in out and "photo" in out and "\x1b" not in out

    again = ["--config", str(folder / "config.yaml"), "--out", str(tmp_path / "again")]
    assert command.main(again) == 0
    keys = [
        files.read_json(f / "training.json")["weights_digest"] for f in (folder, tmp_path / "again")
    ]
    assert keys[0] == keys[1]
    switches = set(yaml.safe_load((folder / "config.yaml").read_text()))
    assert switches == {*Config.names(), "warnings", "tests"}

    assert command.main(["--resume", "--out", str(folder), "--target", "cartoon"]) == 0
    names = {path.stem for path in (folder / "evaluations").glob("*.json")}
    assert {"sketch-bn-source", "photo-bn-source", "cartoon-bn-source"} <= names
    assert files.read_json(folder / "training.json")["weights_digest"] == keys[0]


def test_layers_are_listed_with_numbers_and_shapes(capsys):
    assert command.main(["--layers", "list", "--model", "resnet18", "--data", "toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"\s*8\s+layer2\.0\.downsample\.0\s", line) for line in lines)


def test_it_works_from_any_directory(tmp_path):
    words = [sys.executable, str(EXPERIMENTS / "run.py"), *TINY, "--out", "here"]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "summary.json").is_file()


REFUSED = [
    (["--layer", "4"], r"unrecognized arguments: --layer"),
    (["--target", "art_painting"], r"target: 'art_painting' is also the source"),
    (["--mode", "nothing"], r"mode: 'nothing' is not allowed; allowed: baseline"),
    (["--mode", "da", "--layers", "21"], r"layers: there is no conv 21"),
    (["--mode", "da", "--layers", "layer9.*"], r"layers: pattern 'layer9\.\*' matches no conv"),
    (
        ["--mode", "random", "--layers", "1", "2", "--p-zero", ".1", ".2", ".3"],
        r"p_zero: .* has 3 values for 2 layers",
    ),
    (["--epochs", "none"], r"epochs: 'none' is not allowed"),
    (["--epochs", "1", "2"], r"unrecognized arguments: 2"),
    (["--weights", "gone.pth"], r"weights: no file .*gone\.pth"),
    (["--data", "nowhere"], r"data: .nowhere. is not a folder"),
    (["--model", "resnet19"], r"model: 'resnet19'"),
    (["--model", "squeezenet1_0"], r"squeezenet1_0"),
    (["--method-file", "gone.py"], r"gone\.py"),
    (["--resume"], r"resume: "),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = [] if words == ["--resume"] else ["--out", "r"]
    assert command.main([*TINY, *out, *words]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "r").exists()
