"""Methods by name, and a stranger's method in a file: the worked example, and each way to get it wrong."""

import textwrap

import domainshift.methods as methods
import pytest
import torch
from domainshift.config import allowed_words
from domainshift.errors import ConfigError
from domainshift.methods import METHODS, Method, load_method_file, method_named, method_of
from small_networks import CPU, SOURCE, config_of, net
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))
    monkeypatch.setattr(methods, "_loaded", {})
    return methods.METHODS


@pytest.fixture
def file_of(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def example():
    """The worked example in the documentation of the package."""
    lines = methods.__doc__.split("label-smoothing`:\n")[1].split("\nA method that trains")[0]
    return textwrap.dedent(lines)


# --- names ---


def test_a_method_by_its_names():
    assert method_named("baseline") is Method
    assert method_named("da") is method_named("target") is METHODS["da"]
    assert method_of(config_of("dann")) is METHODS["dann"]
    everything = " \\| ".join(METHODS) + "$"
    with pytest.raises(ConfigError, match=f"mode: 'ada' is not allowed; allowed: {everything}"):
        method_named("ada")


@pytest.mark.parametrize("mode", METHODS)
def test_every_switch_has_help_a_role_and_a_default_that_obeys_it(mode):
    options = METHODS[mode].Options
    assert options(**{n: options.model_fields[n].default for n in options.names()}) == options()
    for name in options.names():
        assert options.model_fields[name].description, name
        assert allowed_words(options, name), name
        role = {"at_eval": "testing", "attach": "place"}.get(name, "training")
        assert options.model_fields[name].json_schema_extra["role"] == role


# --- a file ---


def test_the_worked_example_trains(file_of, registry):
    path = file_of(example(), "label_smoothing.py")
    method = load_method_file(path)
    assert registry["label-smoothing"] is method is method_named("label-smoothing")
    config = config_of("label-smoothing", smoothing=0.3, method_file=str(path), momentum=0.0,
                       nesterov=False, weight_decay=0.0)  # fmt: skip
    assert method_of(config) is method
    labels = torch.arange(6)
    step = method(net(), config, CPU).update(SOURCE, labels)
    expected = F.cross_entropy(net()(SOURCE), labels, label_smoothing=0.3)
    assert step.loss_sum.item() == pytest.approx(6 * expected.item())


def test_a_file_is_imported_again_only_if_it_has_changed(file_of):
    path = file_of(example())
    method = load_method_file(path)
    assert load_method_file(path) is method
    path.write_text(example().replace("0.1", "0.2"))  # of the same size, within the same second
    changed = load_method_file(path)
    assert (method.Options().smoothing, changed.Options().smoothing) == (0.1, 0.2)
    assert method_named("label-smoothing") is changed
    assert not (path.parent / "__pycache__").exists()


def test_a_relative_path_and_a_renamed_method(file_of, monkeypatch, registry):
    path = file_of(example())
    monkeypatch.chdir(path.parent)
    method = load_method_file(path.relative_to(path.parent))
    assert load_method_file(path) is method
    path.write_text(example().replace("label-smoothing", "soft"))
    load_method_file(path)
    assert "soft" in registry and "label-smoothing" not in registry


HEAD = "from domainshift.methods import Method, TargetOptions\n" \
       "from domainshift.config import Switches, switch\n"  # fmt: skip
MINE = HEAD + "class Mine(Method):\n    name = 'mine'\n    title = 'mine'\n"
WRONG = {
    "raises": ("x = 1\ny = 1 / 0\n", r"ZeroDivisionError on line 2: division by zero$"),
    "exits": ("import sys\n\nsys.exit(3)\n", r"SystemExit on line 3: 3$"),
    "is no Python": ("x = 1\nclass Mine(:\n", r"SyntaxError on line 2: invalid syntax"),
    "imports what is not there": ("import nowhere\n", r"ModuleNotFoundError on line 1: No module"),
    "has options that pydantic refuses": (
        MINE + "    Options = Switches(lr=1)\n",
        r"ValidationError on line 6: 1 validation error",
    ),
    "is empty": ("", r"defines no subclass of domainshift.methods.Method$"),
    "only imports methods": (HEAD, r"defines no subclass of domainshift.methods.Method$"),
    "has a class that lacks update": (
        "class Mine:\n    name = 'mine'\n    def loss(self, x, y, t): ...\n",
        r"defines no subclass of .*Method; class Mine is none and lacks `update`, `predict`",
    ),
    "unmakes update": (MINE + "    update = None\n", r"class Mine lacks `update`$"),
    "has two": (
        MINE + "class Other(Mine):\n    name = 'other'\n",
        r"defines 2 subclasses of Method \(Mine, Other\); allowed: one$",
    ),
    "lacks a name": (
        HEAD + "class Mine(Method):\n    title = 'mine'\n",
        r"class Mine lacks `name`",
    ),
    "lacks a title": (
        HEAD + "class Mine(Method):\n    name = 'mine'\n",
        r"class Mine lacks `title`",
    ),
    "has a name that no folder can have": (
        MINE.replace("name = 'mine'", "name = '../mine'"),
        r"name '../mine' is not allowed; allowed: a-z, 0-9",
    ),
    "shadows a method": (
        MINE.replace("name = 'mine'", "name = 'random'"),
        r"name 'random' is that of an existing method; choose another$",
    ),
    "shadows an alias": (
        MINE + "    aliases = ('other', 'target')\n",
        r"name 'target' is that of an existing method",
    ),
    "shadows a common switch": (
        MINE + "    class Options(Switches):\n        lr: float = switch(0.1, 'rate')\n",
        r"option 'lr' is a switch of every method; choose another name$",
    ),
    "has an option without help": (
        MINE + "    class Options(Switches):\n        strength: float = 0.1\n",
        r"option 'strength' is not made by switch\(default, help\)$",
    ),
    "has other options": (MINE + "    Options = dict\n", r"class Mine lacks `Options`, a subclass"),
    "uses the target without its switches": (
        MINE + "    uses_target = True\n",
        r"uses_target needs Options that derive from TargetOptions$",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that(what, file_of, registry):
    text, message = WRONG[what]
    path, known = file_of(text), dict(registry)
    with pytest.raises(ConfigError, match=f"^method_file: {path}: {message}") as caught:
        load_method_file(path)
    assert "\n" not in str(caught.value)
    assert registry == known


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="method_file: cannot read .*none.py: No such file"):
        load_method_file(tmp_path / "none.py")
    with pytest.raises(ConfigError, match="method_file: cannot read .*: Is a directory"):
        load_method_file(tmp_path)


def test_a_file_that_is_repaired(file_of):
    path = file_of("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_method_file(path)
    path.write_text(MINE)
    assert load_method_file(path).name == "mine"
