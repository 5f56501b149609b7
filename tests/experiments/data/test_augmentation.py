"""data.py augmentation: a picture of what epochs see, by both pipelines."""

import re

import numpy as np
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
