"""The command run.py: what a user types, and what is refused in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from domainshift import command, files, methods
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


# --- resuming what is not there, and what must stay whole ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished baseline of one epoch."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "curves", lambda *_: None)
        assert command.main([*TINY, "--out", str(folder)]) == 0
    return folder


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("words", [["--target", "photo"], TINY, ["--config", "some.yaml"]])
def test_a_mistyped_folder_starts_no_run(words, tmp_path, capsys):
    assert command.main(["--resume", "--out", str(tmp_path / "typo"), *words]) == 2
    assert re.search("holds no run to resume|config: not with --resume", capsys.readouterr().err)
    assert not (tmp_path / "typo").exists()


def test_a_refused_resume_leaves_the_folder_as_it_was(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for words in (
        ["--epochs", "9", "--step-fraction", "0.1"],
        ["--mode", "da", "--target", "cartoon", "sketch"],
        ["--seed", "1"],
    ):
        assert command.main(["--resume", "--out", str(folder), *words]) == 2, words
    (folder / "checkpoint.pt").unlink()
    assert command.main(["--resume", "--out", str(folder), "--target", "photo"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 4
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert after == {p: b for p, b in before.items() if p.name != "checkpoint.pt"}
    assert command.main(["--resume", "--out", str(folder)]) == 0


def test_runs_of_several_targets_are_resumed_from_their_common_folder(tmp_path, no_pictures):
    folder = tmp_path / "r"
    words = ["--mode", "da", "--layers", "4", "--target", "sketch", "photo", "--out", str(folder)]
    assert command.main([*TINY, *words]) == 0
    for target in ("sketch", "photo"):
        names = {path.stem for path in (folder / target / "evaluations").glob("*.json")}
        assert names == {f"{target}-bn-source", "art_painting-holdout-bn-source"}
    (folder / "photo" / "training.json").unlink()
    assert command.main(["--resume", "--out", str(folder)]) == 0
    assert (folder / "photo" / "training.json").is_file()


BROKEN = {
    "checkpoint.pt": b"PK\x03\x04",
    "training.json": b'{"version"',
    "config.yaml": b"",
    "metrics.jsonl": b"{}\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name, finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    if name in ("checkpoint.pt", "metrics.jsonl"):
        (folder / "training.json").unlink()
    (folder / name).write_bytes(BROKEN[name])
    assert command.main(["--resume", "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and name in error, error


MINE = """
from domainshift.methods import Method
class Mine(Method):
    name, title = "mine", "mine"
    def {function}:
        {body}
"""
FAULTS = [
    ("loss(self, images, labels, target_images)", "return self.model(images).boo, 1", "line 6"),
    ("loss(self, images, labels, target_images)", "return 3", "loss returned int"),
    ("loss(self, images)", "return 3", "too many positional arguments"),
    ("loss(self, images, labels, target_images)", "raise ZeroDivisionError('x')", "line 6: x"),
]


@pytest.fixture
def registry():
    """The methods as they are, again after the test."""
    with mock.patch.dict(methods.METHODS), mock.patch.dict(methods._loaded):
        yield


@pytest.mark.parametrize(("function", "body", "message"), FAULTS)
def test_a_faulty_method_is_one_line(function, body, message, tmp_path, capsys, registry):
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(function=function, body=body))
    words = ["--method-file", str(path), "--mode", "mine", "--out", str(tmp_path / "r")]
    assert command.main([*TINY, *words]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and message in error, error


@pytest.mark.parametrize("text", ["data: 3", "method_file: 3", "tests: 3", "- a", "a: b: c"])
def test_odd_files_of_switches(text, tmp_path, capsys):
    (tmp_path / "odd.yaml").write_text(text)
    words = [*TINY[2:], "--config", str(tmp_path / "odd.yaml"), "--out", str(tmp_path / "r")]
    assert command.main(words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_switch_of_another_method_names_the_methods(capsys):
    assert command.main(["--layers", "4"]) == 2
    assert "layers: mode baseline has no such switch; it is of mode random | da" in (
        capsys.readouterr().err
    )


def test_an_image_size_that_the_network_refuses(tmp_path, capsys):
    words = [*TINY, "--model", "vit_b_16", "--out", str(tmp_path / "r")]
    assert command.main(words) == 2
    assert "image_size: 32 is not allowed for model vit_b_16" in capsys.readouterr().err
