"""Reading, caching and sampling PACS; verifying and fetching it."""

import builtins
import io
import json
import os
import shutil
import sys
import types
from pathlib import Path

import data
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

PACS = os.environ.get("FASTSHAPE_PACS")
needs_pacs = pytest.mark.skipif(not PACS, reason="FASTSHAPE_PACS names no PACS folder")


def picture(number, size=(227, 227)):
    """A noisy, hence unique, image."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_pacs(root, per_class=2, domains=data.DOMAINS):
    """A tiny PACS: noise images, JPEG in the first three domains, PNG sketches."""
    number = 0
    for domain in domains:
        for class_name in data.CLASSES:
            folder = root / domain / class_name
            folder.mkdir(parents=True)
            for i in range(per_class):
                suffix = "png" if domain == "sketch" else "jpg"
                picture(number).save(folder / f"pic_{i:03d}.{suffix}")
                number += 1
    return root


@pytest.fixture(scope="session")
def pacs_original(tmp_path_factory):
    return make_pacs(tmp_path_factory.mktemp("original") / "PACS")


@pytest.fixture
def pacs(pacs_original, tmp_path):
    """A tiny PACS that the test may break."""
    return Path(shutil.copytree(pacs_original, tmp_path / "PACS"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------- the reader


def test_domain_holds_the_pixels_in_sorted_order(pacs, cache):
    domain = data.load_domain(pacs, "sketch", cache=cache)
    assert domain.name == "sketch"
    assert domain.images.shape == (14, 227, 227, 3) and domain.images.dtype == np.uint8
    assert domain.labels.dtype == np.int64
    assert domain.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert domain.files[:3] == ("dog/pic_000.png", "dog/pic_001.png", "elephant/pic_000.png")
    for image, file in zip(domain.images, domain.files, strict=True):
        expected = np.asarray(Image.open(pacs / "sketch" / file).convert("RGB"))
        np.testing.assert_array_equal(image, expected)


def test_images_are_a_read_only_memory_map(pacs, cache):
    images = data.load_domain(pacs, "photo", cache=cache).images
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_grey_images_become_rgb(pacs, cache):
    picture(99).convert("L").save(pacs / "sketch" / "dog" / "pic_000.png")
    image = data.load_domain(pacs, "sketch", cache=cache).images[0]
    np.testing.assert_array_equal(image[..., 0], np.asarray(picture(99).convert("L")))
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_suffixes_in_any_case_and_hidden_files(pacs, cache):
    dog = pacs / "photo" / "dog"
    (dog / "pic_000.jpg").rename(dog / "pic_000.JPG")
    (dog / "pic_001.jpg").rename(dog / "pic_001.Jpeg")
    (dog / "._pic_001.jpg").write_bytes(b"left by a file manager")
    (pacs / "photo" / ".git").mkdir()
    domain = data.load_domain(pacs, "photo", cache=cache)
    assert domain.files[:3] == ("dog/pic_000.JPG", "dog/pic_001.Jpeg", "elephant/pic_000.jpg")


def test_limit_takes_the_first_of_each_class(pacs, cache):
    whole = data.load_domain(pacs, "cartoon", cache=cache)
    one = data.load_domain(pacs, "cartoon", limit=1, cache=cache)
    assert one.files == whole.files[::2]
    np.testing.assert_array_equal(one.images, whole.images[::2])
    assert one.labels.tolist() == list(range(7))
    assert data.load_domain(pacs, "cartoon", limit=50, cache=cache).files == whole.files


@pytest.mark.parametrize("limit", [0, -3])
@pytest.mark.parametrize("source", ["toy", "folder"])
def test_limit_below_one(pacs, limit, source):
    with pytest.raises(data.DataError, match=f"limit is {limit}, but must be at least 1"):
        data.load_domain("toy" if source == "toy" else pacs, "photo", limit=limit)


def test_unknown_domain():
    with pytest.raises(data.DataError, match=r"domain 'clipart' is unknown; known are art_p"):
        data.load_domain("toy", "clipart")


@pytest.mark.parametrize("above", ["", "PACS", "kfold", "images", "PACS/kfold", "images/PACS"])
def test_root_is_found(tmp_path, above):
    root = tmp_path / "download" / above
    for domain in data.DOMAINS:
        (root / domain).mkdir(parents=True)
    assert data.find_root(tmp_path / "download") == root
    assert data.find_root(str(root)) == root


def test_root_that_does_not_exist(tmp_path):
    with pytest.raises(data.DataError, match=r"nowhere does not exist"):
        data.find_root(tmp_path / "nowhere")


def test_missing_domain(pacs):
    shutil.rmtree(pacs / "photo")
    shutil.rmtree(pacs / "cartoon")
    with pytest.raises(data.DataError, match=r"has no folder cartoon, photo; looked for") as caught:
        data.load_domain(pacs.parent, "sketch")
    assert str(pacs) in str(caught.value)


def test_missing_class(pacs, cache):
    shutil.rmtree(pacs / "photo" / "horse")
    with pytest.raises(data.DataError, match=r"photo has no class folder horse"):
        data.load_domain(pacs, "photo", cache=cache)


def test_class_too_many(pacs, cache):
    (pacs / "photo" / "zebra").mkdir()
    with pytest.raises(data.DataError, match=r"photo has a class too many: zebra; the classes of"):
        data.load_domain(pacs, "photo", cache=cache)


def test_empty_class(pacs, cache):
    for file in (pacs / "photo" / "guitar").iterdir():
        file.unlink()
    with pytest.raises(data.DataError, match=r"guitar holds no image"):
        data.load_domain(pacs, "photo", cache=cache)


@pytest.mark.parametrize("domain", ["photo", "sketch"])  # JPEG, PNG
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_broken_image_is_named_and_leaves_no_cache(pacs, cache, domain, damage):
    path = sorted((pacs / domain / "horse").iterdir())[1]
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "garbage": b"no image" * 50, "empty": b""}[
            damage
        ]
    )
    with pytest.raises(data.DataError, match=r"unreadable or truncated") as caught:
        data.load_domain(pacs, domain, cache=cache)
    assert str(path) in str(caught.value)
    assert list(cache.iterdir()) == []


def test_image_of_another_size(pacs, cache):
    path = pacs / "photo" / "dog" / "pic_001.jpg"
    picture(1, size=(300, 227)).save(path)
    with pytest.raises(
        data.DataError, match=r"is 300 x 227 pixels, but PACS is 227 x 227"
    ) as caught:
        data.load_domain(pacs, "photo", cache=cache)
    assert str(path) in str(caught.value)
    assert list(cache.iterdir()) == []


def test_toy_needs_no_folder():
    domain = data.load_domain("toy", "photo", limit=1)
    assert isinstance(domain, data.Domain)
    assert domain.images.shape == (7, 64, 64, 3)
    assert domain.labels.tolist() == list(range(7))


@needs_pacs
def test_real_pacs(cache):
    assert sum(map(sum, data.OFFICIAL_COUNTS.values())) == 9991
    totals = [sum(data.OFFICIAL_COUNTS[name]) for name in data.DOMAINS]
    assert totals == [2048, 2344, 1670, 3929]
    for name in data.DOMAINS:
        domain = data.load_domain(PACS, name, limit=2, cache=cache)
        assert domain.images.shape == (14, 227, 227, 3)
        path = data.find_root(PACS) / name / domain.files[-1]
        np.testing.assert_array_equal(
            domain.images[-1], np.asarray(Image.open(path).convert("RGB"))
        )


@needs_pacs
def test_real_pacs_has_the_official_counts():
    root = data.find_root(PACS)
    for name, counts in data.OFFICIAL_COUNTS.items():
        _, labels = data._list_domain(root, name, limit=None)
        assert tuple(np.bincount(labels)) == counts


# -------------------------------------------------------------------------------------- the cache


def test_second_load_decodes_nothing(pacs, cache, monkeypatch):
    first = data.load_domain(pacs, "photo", cache=cache)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(data, "_decode", lambda path: pytest.fail(f"decoded {path} again"))
    again = data.load_domain(pacs, "photo", cache=cache)
    np.testing.assert_array_equal(first.images, again.images)


def test_changed_image_is_decoded_again(pacs, cache):
    data.load_domain(pacs, "sketch", cache=cache)
    picture(1234).save(pacs / "sketch" / "dog" / "pic_000.png")
    changed = data.load_domain(pacs, "sketch", cache=cache)
    np.testing.assert_array_equal(changed.images[0], np.asarray(picture(1234)))


@pytest.mark.parametrize("damage", ["cut", "longer", "garbage", "empty", "other_shape", "pickle"])
def test_damaged_cache_is_rebuilt(pacs, cache, damage):
    expected = np.array(data.load_domain(pacs, "photo", cache=cache).images)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    if damage == "other_shape":
        np.save(file, np.zeros((14, 4, 4, 3), np.uint8))
    elif damage == "pickle":
        np.save(file, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(
            {
                "cut": content[:-1],
                "longer": content + b"x",
                "garbage": b"\0" * len(content),
                "empty": b"",
            }[damage]
        )
    np.testing.assert_array_equal(data.load_domain(pacs, "photo", cache=cache).images, expected)
    assert file.read_bytes() == content
    assert list(cache.iterdir()) == [file]


def test_full_disk_leaves_nothing_behind(pacs, cache, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(data.DataError, match=r"cannot write the image cache .*No space left"):
        data.load_domain(pacs, "photo", cache=cache)
    assert list(cache.iterdir()) == []


def test_cache_folder_that_is_a_file(pacs, cache):
    cache.write_text("in the way")
    with pytest.raises(data.DataError, match=r"cannot write the image cache"):
        data.load_domain(pacs, "photo", cache=cache)


# ---------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def toy_domain():
    return data.load_domain("toy", "art_painting", limit=3)


def test_labelled_images(toy_domain):
    samples = data.LabelledImages(toy_domain, [20, 0, 4], data.test_transform(48))
    assert len(samples) == 3
    tensor, label = samples[0]
    assert tensor.shape == (3, 48, 48) and tensor.dtype == torch.float32
    assert type(label) is int
    assert [label for _, label in samples] == [6, 0, 1]


def test_test_transform_normalizes(toy_domain):
    tensor = data.UnlabelledImages(toy_domain.images, [5], data.test_transform(64))[0]
    pixels = toy_domain.images[5].astype(np.float32) / 255
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    expected = ((pixels - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=1e-6)


def test_train_transform_is_the_protocol(toy_domain):
    resize, crop, flip, *_ = data.train_transform(224).transforms
    assert resize.size == 256
    assert crop.size == (224, 224) and crop.scale == (0.7, 1.0)
    assert flip.p == 0.5
    assert data.train_transform(64).transforms[0].size == 73
    sample = data.UnlabelledImages(toy_domain.images, [0], data.train_transform(64))[0]
    assert sample.shape == (3, 64, 64) and sample.dtype == torch.float32


def test_unlabelled_images_are_images_alone(toy_domain):
    samples = data.UnlabelledImages(toy_domain.images, [1, 2], data.test_transform(32))
    assert isinstance(samples[0], torch.Tensor)
    for name, value in vars(samples).items():
        assert value is not toy_domain and value is not toy_domain.labels, name


def test_augmentation_depends_on_seed_epoch_and_index_only(toy_domain):
    def pixels(indices, i, **where):
        return data.UnlabelledImages(toy_domain.images, indices, data.train_transform(32), **where)[
            i
        ]

    base = pixels([7, 8], 0, seed=1, epoch=2)
    assert torch.equal(base, pixels([3, 8, 7], 2, seed=1, epoch=2))  # another place, same image
    assert not torch.equal(base, pixels([7], 0, seed=2, epoch=2))
    assert not torch.equal(base, pixels([7], 0, seed=1, epoch=3))
    assert not torch.equal(base, pixels([7], 0, seed=2, epoch=1))  # the two are not interchangeable
    # Two equal images at two indices: the index alone makes the difference.
    twins = np.stack([toy_domain.images[0]] * 2)
    left, right = data.UnlabelledImages(twins, [0, 1], data.train_transform(32))
    assert not torch.equal(left, right)


def test_epoch_can_be_set(toy_domain):
    samples = data.LabelledImages(toy_domain, [3], data.train_transform(32), seed=5)
    samples.epoch = 4
    fresh = data.LabelledImages(toy_domain, [3], data.train_transform(32), seed=5, epoch=4)
    assert samples.epoch == 4
    assert torch.equal(samples[0][0], fresh[0][0])


def test_workers_do_not_change_the_pixels(toy_domain):
    samples = data.LabelledImages(toy_domain, range(21), data.train_transform(32), seed=3, epoch=1)
    alone, shared = (
        list(DataLoader(samples, batch_size=4, num_workers=workers)) for workers in (0, 2)
    )
    assert len(alone) == len(shared) == 6
    for (x, y), (other_x, other_y) in zip(alone, shared, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


def test_callers_random_state_is_untouched(toy_domain):
    samples = data.LabelledImages(toy_domain, [0, 1], data.train_transform(32))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    samples[0], samples[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_mix_separates_neighbours():
    values = {data._mix(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(values) == 12**3
    assert len({value & 0xFFFFFFFF for value in values}) == 12**3  # torch uses the low word
    assert all(0 <= value < 2**64 for value in values)
    assert data._mix(-1, 0, 0) == data._mix(2**64 - 1, 0, 0)


@pytest.mark.parametrize("index", [-1, 21])
def test_index_out_of_range(toy_domain, index):
    with pytest.raises(data.DataError, match=rf"index {index} is out of range: .* 0 to 20"):
        data.LabelledImages(toy_domain, [0, index], data.test_transform(32))


def test_images_and_indices_of_another_kind(toy_domain):
    transform = data.test_transform(32)
    with pytest.raises(data.DataError, match=r"images are float32 .* must be uint8"):
        data.UnlabelledImages(np.zeros((2, 8, 8, 3), np.float32), [0], transform)
    with pytest.raises(data.DataError, match=r"indices are float64"):
        data.UnlabelledImages(toy_domain.images, [0.5], transform)
    assert len(data.UnlabelledImages(toy_domain.images, [], transform)) == 0


def test_image_size_below_one():
    for make in (data.train_transform, data.test_transform):
        with pytest.raises(data.DataError, match="image_size is 0, but must be at least 1"):
            make(0)


def make_domain(*counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)
    return data.Domain("photo", images, labels, tuple(map(str, range(len(labels)))))


def test_holdout_is_stratified_and_a_partition():
    domain = make_domain(10, 25, 4, 2)
    train, held_out = data.split_holdout(domain, 0.1, seed=0)
    assert train.dtype == held_out.dtype == np.int64
    assert np.bincount(domain.labels[held_out]).tolist() == [1, 3, 1, 1]
    assert sorted([*train, *held_out]) == list(range(41))
    assert (np.diff(train) > 0).all() and (np.diff(held_out) > 0).all()
    _, nearly_all = data.split_holdout(domain, 0.99, seed=0)
    assert np.bincount(domain.labels[nearly_all]).tolist() == [9, 24, 3, 1]


def test_holdout_depends_on_the_seed_alone():
    domain = make_domain(40, 40)
    _, first = data.split_holdout(domain, 0.25, seed=1)
    torch.manual_seed(99)
    np.random.seed(99)
    np.testing.assert_array_equal(data.split_holdout(domain, 0.25, seed=1)[1], first)
    assert data.split_holdout(domain, 0.25, seed=2)[1].tolist() != first.tolist()
    assert (first[:10] + 40).tolist() != first[10:].tolist()  # classes are drawn independently


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_holdout_fraction_out_of_range(fraction):
    with pytest.raises(data.DataError, match=f"holdout fraction is {fraction}, but must be above"):
        data.split_holdout(make_domain(5, 5), fraction, seed=0)


def test_holdout_bad_seed_and_lone_image():
    with pytest.raises(data.DataError, match="seed is -1, but must be at least 0"):
        data.split_holdout(make_domain(5), 0.5, seed=-1)
    with pytest.raises(data.DataError, match="class elephant of photo has 1 image"):
        data.split_holdout(make_domain(5, 1), 0.5, seed=0)


# ------------------------------------------------------------------------------------------ verify


@pytest.fixture
def two_each(monkeypatch):
    """Makes the tiny PACS the official one."""
    monkeypatch.setattr(data, "OFFICIAL_COUNTS", {name: (2,) * 7 for name in data.DOMAINS})


def run(capsys, *arguments):
    code = data.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    return code, problems, out, err


def test_verify_all_right(pacs, two_each, capsys):
    code, problems, out, err = run(capsys, "verify", pacs)
    assert (code, problems, err) == (0, [], "")
    assert "all right: this is PACS" in out
    assert "2 / 2" in out and "14 / 14" in out
    assert "0 dog, 1 elephant, 2 giraffe, 3 guitar, 4 horse, 5 house, 6 person" in out


def test_verify_prefix_is_usable_but_not_official(pacs, capsys):
    code, problems, out, _ = run(capsys, "verify", pacs)
    assert code == 1
    assert len(problems) == 28
    assert problems[0].endswith("dog: 2 images, officially 379")
    assert "2 / 3929" not in out and "14 / 3929" in out
    assert "the reader can use it" in out


def test_verify_reports_every_problem(pacs, two_each, capsys):
    (pacs / "photo" / "dog" / "pic_000.jpg").write_bytes(b"broken")
    picture(5, size=(64, 64)).save(pacs / "sketch" / "house" / "pic_001.png")
    (pacs / "cartoon" / "zebra").mkdir()
    shutil.rmtree(pacs / "cartoon" / "person")
    (pacs / "cartoon" / "dog" / "pic_000.gif").write_bytes(b"GIF89a")
    shutil.rmtree(pacs / "art_painting")
    code, problems, out, _ = run(capsys, "verify", pacs)
    assert code == 1
    for part in (
        "art_painting: the domain folder is missing",
        "zebra: a class too many",
        "person: the class folder is missing",
        "pic_000.gif: neither JPEG nor PNG, the reader skips it",
        "pic_000.jpg is unreadable or truncated",
        "pic_001.png is 64 x 64 pixels, but PACS is 227 x 227",
    ):
        assert sum(part in line for line in problems) == 1, part
    assert len(problems) == 6
    assert "the reader cannot use this folder as it is" in out


def write_list(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{file} {label}\n" for file, label in entries))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("folder", ["", "splits", "../pacs_label", "../../lists"])
def test_official_lists_from_zero_or_one(tmp_path, pacs_original, two_each, capsys, folder, first):
    pacs = Path(shutil.copytree(pacs_original, tmp_path / "a" / "b" / "kfold"))
    for part in ("train", "crossval", "test"):
        entries = [
            (f"photo/{class_name}/pic_000.jpg", label + first)
            for label, class_name in enumerate(data.CLASSES)
        ]
        write_list(pacs / folder / f"photo_{part}_kfold.txt", entries)
    code, problems, out, _ = run(capsys, "verify", pacs)
    assert (code, problems) == (0, [])
    assert "official lists: 3 found" in out


def test_lists_that_disagree(pacs, two_each, capsys):
    path = pacs / "photo_train_kfold.txt"
    write_list(
        path,
        [
            ("photo/dog/pic_000.jpg", 1),
            ("photo/elephant/pic_000.jpg", 2),
            ("photo/giraffe/pic_000.jpg", 4),  # guitar's
            ("photo/person/pic_999.jpg", 7),  # not there
            ("photo/zebra/pic_000.jpg", 8),
        ],
    )
    path.write_text(path.read_text() + "\nnonsense\n")
    code, problems, _, _ = run(capsys, "verify", pacs)
    assert code == 1
    assert len(problems) == 4
    text = "\n".join(problems)
    assert "line 3: label 4 for photo/giraffe/pic_000.jpg, but giraffe is 3" in text
    assert "line 4: photo/person/pic_999.jpg does not exist" in text
    assert "line 5: unknown domain or class in photo/zebra/pic_000.jpg" in text
    assert "line 7: not '<domain>/<class>/<file> <label>'" in text


def test_verify_bad_folder_is_one_line_on_stderr(tmp_path, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        code, problems, out, err = run(capsys, "verify", folder)
        assert (code, problems, out) == (2, [], "")
        assert err.startswith("error: ") and len(err.splitlines()) == 1
        assert str(folder) in err


# ------------------------------------------------------------------------------------------- fetch


def encoded(number, kind):
    buffer = io.BytesIO()
    picture(number).save(buffer, kind)
    return buffer.getvalue()


def tiny_rows():
    """Two images per class and domain, in the columns of the public data set."""
    rows, number = [], 1000
    for domain in data.DOMAINS:
        for label, _ in enumerate(data.CLASSES):
            for i in range(2):
                kind = "PNG" if domain == "sketch" else "JPEG"
                image = {"bytes": encoded(number, kind), "path": f"pic_{i:03d}.jpg"}
                rows.append({"image": image, "domain": domain, "label": label})
                number += 1
    return rows


@pytest.fixture(scope="module")
def rows():
    return tiny_rows()


def write_parquet(path, rows, names=data.CLASSES):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("domain", pa.string()),
            ("label", pa.int64()),
        ]
    )
    if names is not None:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_fetch_from_a_file_then_read(tmp_path, rows, two_each, capsys, cache):
    source = write_parquet(tmp_path / "pacs.parquet", rows)
    to = tmp_path / "data" / "PACS"
    code, problems, out, err = run(capsys, "fetch", "--from", source, "--to", to)
    assert (code, problems, err) == (0, [], "")
    assert "all right: this is PACS" in out
    written = contents(to)
    assert len(written) == 56
    assert written["photo/dog/pic_001.jpg"] == rows[29]["image"]["bytes"]
    assert written["sketch/dog/pic_000.png"] == rows[42]["image"]["bytes"]  # by content, not name
    assert sorted(written.values()) == sorted(row["image"]["bytes"] for row in rows)
    domain = data.load_domain(to, "sketch", cache=cache)
    np.testing.assert_array_equal(domain.images[13], np.asarray(picture(1055)))


def test_fetch_from_a_folder_of_parts_gives_the_same(tmp_path, rows):
    write_parquet(tmp_path / "parts" / "data" / "train-00000-of-00002.parquet", rows[:20])
    write_parquet(tmp_path / "parts" / "data" / "train-00001-of-00002.parquet", rows[20:])
    data.fetch(tmp_path / "a", tmp_path / "parts")
    data.fetch(tmp_path / "b", write_parquet(tmp_path / "whole.parquet", rows))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_fetch_goes_on_after_an_interruption(tmp_path, rows, monkeypatch):
    source = write_parquet(tmp_path / "pacs.parquet", rows)
    replace, left = os.replace, 10

    def interrupted(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(data.DataError, match=r"cannot write .*No space left"):
        data.fetch(tmp_path / "PACS", source)
    assert len(contents(tmp_path / "PACS")) == 10  # whole files only, no temporary one
    monkeypatch.setattr(os, "replace", replace)

    first = tmp_path / "PACS" / "art_painting" / "dog" / "pic_000.jpg"
    os.utime(first, ns=(10**18, 10**18))
    data.fetch(tmp_path / "PACS", source)
    assert len(contents(tmp_path / "PACS")) == 56
    assert first.stat().st_mtime_ns == 10**18  # kept, not written again


def test_fetch_does_not_overwrite_other_contents(tmp_path, rows):
    source = write_parquet(tmp_path / "pacs.parquet", rows)
    mine = tmp_path / "PACS" / "art_painting" / "dog" / "pic_000.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(data.DataError, match=r"pic_000.jpg is there already with other contents"):
        data.fetch(tmp_path / "PACS", source)
    assert mine.read_bytes() == b"mine"


def test_fetch_names_are_unique_and_stay_inside(tmp_path, rows):
    changed = [{**row, "domain": "photo", "label": 0} for row in rows[:6]]
    paths = ["a.jpg", "a.jpg", "A.jpg", None, "../../../etc/passwd", "some where/.b c.jpg"]
    for row, path in zip(changed, paths, strict=True):
        row["image"] = {**row["image"], "path": path}
    data.fetch(tmp_path / "PACS", write_parquet(tmp_path / "pacs.parquet", changed))
    assert sorted(contents(tmp_path / "PACS")) == sorted(
        f"photo/dog/{name}.jpg" for name in ("a", "a_2", "A_3", "00003", "passwd", "b_c")
    )


def test_fetch_other_label_order(tmp_path, rows):
    source = write_parquet(tmp_path / "p.parquet", rows, names=reversed(data.CLASSES))
    with pytest.raises(data.DataError, match=r"orders its labels person, house.*expected dog, el"):
        data.fetch(tmp_path / "PACS", source)
    assert not (tmp_path / "PACS").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": 7}, r"row 0: label is 7, but must be 0 to 6"),
        ({"label": None}, r"row 0: label is None"),
        ({"domain": "clipart"}, r"domain 'clipart' is unknown; known are"),
        ({"image": {"bytes": None, "path": "a.jpg"}}, r"the image column holds no bytes"),
        ({"image": {"bytes": b"GIF89a", "path": "a.gif"}}, r"neither JPEG nor PNG"),
    ],
)
def test_fetch_bad_row(tmp_path, rows, change, message):
    source = write_parquet(tmp_path / "p.parquet", [{**rows[0], **change}], names=None)
    with pytest.raises(data.DataError, match=message):
        data.fetch(tmp_path / "PACS", source)


def test_fetch_label_against_path(tmp_path, rows):
    image = {**rows[0]["image"], "path": "kfold/photo/horse/pic_000.jpg"}
    source = write_parquet(tmp_path / "p.parquet", [{**rows[0], "image": image}], names=None)
    with pytest.raises(data.DataError, match=r"label 0 is dog, but its path is kfold/photo/horse"):
        data.fetch(tmp_path / "PACS", source)


def test_fetch_other_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [b""], "label": [0]}), tmp_path / "p.parquet")
    with pytest.raises(data.DataError, match=r"has no column domain; it has image, label"):
        data.fetch(tmp_path / "PACS", tmp_path / "p.parquet")


def test_fetch_from_no_parquet(tmp_path):
    with pytest.raises(data.DataError, match=r"no parquet file at .*nowhere"):
        data.fetch(tmp_path / "PACS", tmp_path / "nowhere")
    (tmp_path / "p.parquet").write_bytes(b"PAR0 not at all")
    with pytest.raises(data.DataError, match=r"p.parquet cannot be read as parquet"):
        data.fetch(tmp_path / "PACS", tmp_path / "p.parquet")


def fake_hub(monkeypatch, snapshot_download):
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_fetch_downloads_the_public_data_set(tmp_path, rows, two_each, monkeypatch, capsys):
    asked = {}

    def snapshot_download(**arguments):
        asked.update(arguments)
        write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", rows)
        return str(tmp_path / "hub")

    fake_hub(monkeypatch, snapshot_download)
    code, problems, _, _ = run(capsys, "fetch", "--to", tmp_path / "PACS")
    assert (code, problems) == (0, [])
    assert asked["repo_id"] == "flwrlabs/pacs" and asked["repo_type"] == "dataset"


def test_fetch_without_network(tmp_path, monkeypatch, capsys):
    def snapshot_download(**arguments):
        raise ConnectionError("Network is unreachable\nand a long story")

    fake_hub(monkeypatch, snapshot_download)
    with pytest.raises(data.DataError):
        data.fetch(tmp_path / "PACS")
    code, _, _, err = run(capsys, "fetch", "--to", tmp_path / "PACS")
    assert code == 2
    assert len(err.splitlines()) == 1
    for part in ("Network is unreachable", "--from", "sketchx.eecs.qmul.ac.uk", "--data toy"):
        assert part in err
    assert not (tmp_path / "PACS").exists()


def test_fetch_without_the_packages(tmp_path, rows, monkeypatch):
    source = write_parquet(tmp_path / "p.parquet", rows[:1])
    real_import = builtins.__import__

    def no_package(name, *arguments, **keywords):
        if name.split(".")[0] in ("huggingface_hub", "pyarrow"):
            raise ImportError(f"No module named {name}")
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_package)
    for where in (None, source):
        with pytest.raises(data.DataError, match=r"pip install huggingface_hub pyarrow"):
            data.fetch(tmp_path / "PACS", where)
