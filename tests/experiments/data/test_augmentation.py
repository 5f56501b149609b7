"""data.py augmentation: a picture of what epochs see, by both pipelines."""

import re

import numpy as np
import pytest
import torch
from domainshift.data.command import main
from PIL import Image


def test_the_picture_shows_both(tmp_path, capsys):
    path = tmp_path / "augmentation.png"
    assert main(["augmentation", str(path), "--source", "cartoon", "--image-size", "64"]) == 0
    with Image.open(path) as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 20
    (largest,) = re.findall(r"largest difference of a pixel (\S+) of 255", capsys.readouterr().out)
    assert float(largest) < 1.01


def test_a_domain_that_is_not_there(tmp_path, capsys):
    assert main(["augmentation", str(tmp_path / "a.png"), "--source", "Art"]) == 2
    assert "data.py: error: domain: 'Art' is not a domain of toy" in capsys.readouterr().err


def test_defaults_of_torch_in_the_caller_change_no_pixel(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    words = ["--source", "cartoon", "--image-size", "64"]
    assert main(["augmentation", str(paths[0]), *words]) == 0
    with torch.device("meta"):
        assert main(["augmentation", str(paths[1]), *words]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", ["a.xyz", "a", "missing/a.png"])
def test_a_picture_that_cannot_be_written_is_bad_input(tmp_path, capsys, name):
    assert main(["augmentation", str(tmp_path / name), "--source", "cartoon"]) == 2
    assert name in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
