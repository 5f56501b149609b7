"""data.py verify: is a folder usable, and is it the official PACS?"""

import os
import shutil
from pathlib import Path

import pytest
from domainshift.data import folder as folder_module
from domainshift.data.command import main
from domainshift.data.pacs import CLASSES
from made_folders import make_squares, picture


@pytest.fixture
def verify(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_module, "DATA_FOLDER", tmp_path / "data")

    def run(path):
        status = main(["verify", str(path)])
        out, err = capsys.readouterr()
        problems = [line for line in out.splitlines() if line.startswith("problem: ")]
        return status, problems, out, err

    return run


# --- PACS ---


def test_all_right(tiny_pacs, two_each, verify):
    status, problems, out, err = verify(tiny_pacs)
    assert (status, problems, err) == (0, [], "")
    assert "all right: this is PACS" in out
    assert "2 / 2" in out and "14 / 14" in out
    assert "0 dog, 1 elephant, 2 giraffe, 3 guitar, 4 horse, 5 house, 6 person" in out


def test_a_part_is_usable_but_not_official(tiny_pacs, verify):
    status, problems, out, _ = verify(tiny_pacs)
    assert status == 1
    assert len(problems) == 28
    assert problems[0].endswith("dog: 2 images, officially 379")
    assert "2 / 3929" not in out and "14 / 3929" in out
    assert "not the whole official PACS, but usable" in out


def test_every_problem_is_named(tiny_pacs, two_each, verify):
    (tiny_pacs / "photo" / "dog" / "pic_000.jpg").write_bytes(b"broken")
    picture(5, size=(64, 64)).save(tiny_pacs / "sketch" / "house" / "pic_001.png")
    (tiny_pacs / "cartoon" / "zebra").mkdir()
    shutil.rmtree(tiny_pacs / "cartoon" / "person")
    (tiny_pacs / "cartoon" / "dog" / "pic_000.gif").write_bytes(b"GIF89a")
    shutil.rmtree(tiny_pacs / "art_painting")
    status, problems, out, _ = verify(tiny_pacs)
    assert status == 1
    for part in (
        "art_painting: the domain folder is missing",
        "zebra: not a class of PACS",
        "person: the class folder is missing",
        "pic_000.gif' is ignored: image in another format",
        "pic_000.jpg is unreadable or truncated",
        "pic_001.png is 64 x 64 pixels, but must be 227 x 227",
    ):
        assert sum(part in line for line in problems) == 1, part
    assert len(problems) == 6
    assert "not usable as it is" in out


def add_strays(root, images):
    """Strays of every kind. Returns the ends of the lines that name them."""
    shutil.copytree(images, root / "__MACOSX" / "deep")
    shutil.copytree(images, images.with_name(f"{images.name} "))
    shutil.copytree(images, images / "more")
    (images / "gone.jpg").symlink_to("/nowhere/at/all")
    (images / "Thumbs.db").write_bytes(b"left by a file manager")
    (images / "note.txt").write_text("not an image")
    (root / "cover.png").write_bytes(b"")
    lines = [
        "/__MACOSX' is ignored: hidden or system entry, images: 2",
        f"/{images.name} ' is ignored: folder, images: 2",
        f"/{images.name}/more' is ignored: folder, images: 2",
        f"/{images.name}/gone.jpg' is ignored: broken link, images: 1",
        f"/{images.name}/Thumbs.db' is ignored: hidden or system entry",
        f"/{images.name}/note.txt' is ignored: other file",
        "/cover.png' is ignored: image in no class, images: 1",
    ]
    try:
        shutil.copy(next(images.glob("*0*")), images / os.fsdecode(b"caf\xe9.jpg"))
        lines.append(rf"/{images.name}/caf\udce9.jpg' is ignored: name not in UTF-8, images: 1")
    except OSError:
        pass  # this file system takes UTF-8 alone
    return lines


@pytest.mark.parametrize("kind", ["PACS", "another"])
def test_every_stray_is_named_and_counted(tmp_path, tiny_pacs, two_each, office, verify, kind):
    root, images = (
        (tiny_pacs, tiny_pacs / "photo" / "dog")
        if kind == "PACS"
        else (office, office / "Art" / "TV")
    )
    ends = add_strays(root, images)
    status, problems, out, err = verify(root)
    assert status == 1 and err == ""
    lines = out.splitlines()
    for end in ends:
        (line,) = (line for line in lines if line.endswith(end))
        harmless = "hidden or system" in end or "other file" in end
        assert line.startswith("problem: ") != harmless, line
    assert len(problems) == len(ends) - 3
    assert f"warning: ignored {len(ends)} entries with {2 * 3 + len(ends) - 5} images (" in out
    assert "all right" not in out


def test_what_a_file_manager_leaves_is_named_and_no_problem(tiny_pacs, two_each, verify):
    (tiny_pacs / "photo" / ".DS_Store").write_bytes(b"left by a file manager")
    status, problems, out, _ = verify(tiny_pacs)
    assert (status, problems) == (0, []) and "all right: this is PACS" in out
    assert f"'{tiny_pacs}/photo/.DS_Store' is ignored: hidden or system entry\n" in out


# --- the official lists ---


def write_list(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{file} {label}\n" for file, label in rows))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("folder", ["", "splits", "../pacs_label", "../../lists"])
def test_labels_from_zero_or_one(tmp_path, pacs_original, two_each, verify, folder, first):
    root = Path(shutil.copytree(pacs_original, tmp_path / "a" / "b" / "kfold"))
    for part in ("train", "crossval", "test"):
        rows = [(f"photo/{name}/pic_000.jpg", label + first) for label, name in enumerate(CLASSES)]
        write_list(root / folder / f"photo_{part}_kfold.txt", rows)
    status, problems, out, _ = verify(root)
    assert (status, problems) == (0, [])
    assert "official lists: 3 in " in out


def test_lists_that_disagree(tiny_pacs, two_each, verify):
    path = tiny_pacs / "photo_train_kfold.txt"
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
    status, problems, _, _ = verify(tiny_pacs)
    assert status == 1
    assert len(problems) == 4
    text = "\n".join(problems)
    assert "line 3: label 4 for photo/giraffe/pic_000.jpg, but giraffe is 3" in text
    assert "line 4: photo/person/pic_999.jpg does not exist" in text
    assert "line 5: unknown domain or class in photo/zebra/pic_000.jpg" in text
    assert "line 7: not '<domain>/<class>/<file> <label>'" in text


def test_a_list_may_begin_with_a_byte_order_mark(tiny_pacs, two_each, verify):
    path = tiny_pacs / "photo_train_kfold.txt"
    path.write_bytes(b"\xef\xbb\xbfphoto/dog/pic_000.jpg 1\r\nphoto/dog/pic_001.jpg 1\r\n")
    assert verify(tiny_pacs)[:2] == (0, [])


@pytest.mark.parametrize("part", ["train", "crossval", "test"])
def test_a_list_with_entries_of_another_domain(tiny_pacs, two_each, verify, part):
    path = tiny_pacs / f"art_painting_{part}_kfold.txt"
    write_list(path, [("art_painting/dog/pic_000.jpg", 1), ("sketch/dog/pic_000.png", 1)])
    assert verify(tiny_pacs)[:2] == (
        1,
        [
            f"problem: {path}, line 2: sketch/dog/pic_000.png is not of art_painting, "
            "the domain of the list"
        ],
    )


# --- any folder ---


def test_another_data_set_is_counted_and_compared_with_nothing(office, verify):
    (office / "Art" / "Mug" / "note.txt").write_text("not an image")
    picture(1).save(office / "Art" / "TV" / "more.png")
    status, problems, out, err = verify(office)
    assert (status, problems, err) == (0, [], "")
    assert "official" not in out and "all right: every image is readable" in out
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in out.splitlines()
        if "│" in line
    }
    assert [cell.strip() for cell in rows["TV"]] == ["3", "2", "2", "2"]
    assert [cell.strip() for cell in rows["all"]] == ["11", "10", "10", "10"]
    assert "warning: ignored 1 entry with 0 images (other file: 1): 'Art/Mug/note.txt'" in out
    assert "Real World 256" in out


def test_its_broken_images_are_named(office, verify):
    (office / "Art" / "Mug" / "00001.jpg").write_bytes(b"")
    (office / "Product" / "TV" / "00002.jpg").write_bytes(b"broken")
    status, problems, out, _ = verify(office)
    assert status == 1 and len(problems) == 2
    assert "Art/Mug/00001.jpg is unreadable" in problems[0]
    assert "Product/TV/00002.jpg is unreadable" in problems[1]
    assert "all right" not in out


def test_a_data_set_that_shares_a_domain_with_pacs_is_not_compared_with_it(tmp_path, verify):
    root = make_squares(tmp_path / "domain_net", domains=("clipart", "quickdraw", "sketch"))
    status, problems, out, _ = verify(root)
    assert (status, problems) == (0, []) and "official" not in out


def test_a_bad_folder_is_one_line_on_stderr(tmp_path, verify):
    lonely = make_squares(tmp_path / "lonely", domains=("only",))
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty", lonely):
        status, problems, out, err = verify(folder)
        assert (status, problems, out) == (2, [], "")
        assert err.startswith("data.py: error: ") and len(err.splitlines()) == 1
        assert str(folder) in err
