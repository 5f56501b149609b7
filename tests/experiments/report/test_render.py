"""The report as files: figures by hand, one page that needs nothing, tables that are tables."""

import base64
import csv
import dataclasses
import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from domainshift import files as disk
from domainshift.records.results import versions
from domainshift.records.schema import EVALUATIONS
from domainshift.report import command, contents, findings, render, statistics
from made_records import (
    EXACT,
    GAINS,
    cell,
    exact,
    find_cell,
    line,
    report_of,
    write_suite,
)
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_suite(tmp_path_factory.mktemp("report") / "small", EXACT, exact)
    run = folder / find_cell(folder, "da", "cartoon", 0).training
    Image.linear_gradient("L").resize((1600, 400)).save(run / "maps.png")
    return folder


@pytest.fixture(scope="module")
def built(folder):
    return report_of(folder)


@pytest.fixture(scope="module")
def files(folder):
    assert command.main([str(folder), "--out", str(folder / "x.html")]) == 0
    return {suffix: (folder / f"x.{suffix}").read_text() for suffix in ("html", "md", "tex", "csv")}


# --- figures ----------------------------------------------------------------------------------


def test_the_tally(built):
    expected = (
        "2 primary comparisons, 4 with the targets told apart: 4 that these seeds cannot decide."
    )
    assert findings.tally(built.comparisons.primary) == built.main[0] == expected


def test_a_line_by_hand(built):
    # cartoon: 44, 44 and 46 percent of 350
    assert cell(built, "random", "cartoon", "Last epoch") == "44.7 ± 1.2"
    assert cell(built, "random", "cartoon", "k of n") == "154–161 of 350"
    assert cell(built, "random", "cartoon", "Seeds") == "3 of 3"
    assert cell(built, "random", "cartoon", "Minus baseline") == "+4.7 ± 3.5"
    assert cell(built, "random", "cartoon", "Verdict").startswith(
        "undecided: three seeds cannot say"
    )
    assert cell(built, "random", None, "Verdict") == ""  # a mean over targets has none
    assert cell(built, "random", None, "Last epoch") == "49.7 ± 1.2"
    assert cell(built, "random", "cartoon", "Largest class") == "14.3"
    # by held-out images and by the target the first epoch is best, six points above the last
    assert cell(built, "random", "cartoon", "Epoch selected") == "50.7 ± 1.2"
    assert cell(built, "random", "cartoon", "Oracle") == "50.7 ± 1.2"
    low, high = line(built, "random", "cartoon").wilson
    assert low < 44.7 < high and high - low == pytest.approx(10.4, abs=0.1)


def test_epochs_that_were_not_tested_are_in_no_column(tmp_path):
    text = EXACT.replace("evaluate: each", "evaluate: last")
    built = report_of(write_suite(tmp_path / "last", text, exact))
    assert cell(built, "random", "cartoon", "Last epoch") == "44.7 ± 1.2"
    assert cell(built, "random", "cartoon", "Epoch selected") == ""
    assert cell(built, "random", "cartoon", "Oracle") == ""
    headings = [column.heading for column in built.sections[0].details.columns]
    assert not any(h.startswith(("Epoch", "Oracle")) for h in headings)
    assert built.findings["The choice of the epoch"] == []


def test_no_held_out_images_is_said(built, tmp_path):
    words = "No epoch is selected on source images"
    assert not any(text.startswith(words) for text in built.limits)
    folder = write_suite(tmp_path / "whole", EXACT.replace(", holdout: 0.1", ""), exact)
    assert command.main([str(folder)]) == 0
    assert all(words in (folder / f"report.{s}").read_text() for s in ("html", "md"))


def test_what_was_run_is_counted_by_the_runs(tmp_path):
    text = EXACT.replace("[cartoon, sketch]", "[cartoon]")
    gone = [("da", "cartoon", seed) for seed in range(3)]
    built = report_of(write_suite(tmp_path / "c", text, exact, without=gone))
    assert "2 arms in 1 table, 3 seeds, 6 trainings." in contents.what_was_run(built.study)


def test_limits_say_how_runs_depart_from_the_protocol(built):
    assert built.findings["Beside the published figures"] == [
        "2 published figures in the tables not compared with ours: our runs depart from the protocol."
    ]
    (text,) = [text for text in built.limits if text.startswith("Not the protocol")]
    for words in (
        "limit 50 (protocol: none)",
        "holdout 0.1 (protocol: 0)",
        "epochs 3 (protocol: 30)",
    ):
        assert words in text


def test_report_as_mistake_is_shown_as_one(tmp_path):
    text = """
title: mistake
defaults: {preset: report-a, weights: imagenet, epochs: 2, limit: 50}
sources: [art_painting]
targets: [cartoon]
seeds: [0, 1]
tables:
  hook-place:
    title: place
    published: [report-A report T2]
    baseline: baseline
    arms:
      baseline: {mode: baseline}
      random: {mode: random, layers: all, every: 3, p_zero: 0.2}
profiles: {full: {}}
"""
    built = report_of(write_suite(tmp_path / "a", text, lambda *_: 40))
    assert built.audit.passes  # to test once more is no other method
    assert cell(built, "random", "cartoon", "INVALID") == "80.0 ± 0.0"
    assert cell(built, "random", "cartoon", "Last epoch") == "40.0 ± 0.0"
    assert cell(built, "random", "cartoon", "Published") == "82.28 (invalid)"
    budget, invalid = built.sections[0].notes
    assert budget == "Runs of 12 updates with 64 images."
    assert "measured on the 2048 art_painting training images" in invalid
    assert "no k of the 2344 images of cartoon gives it" in invalid
    assert built.findings["Testing on the training images"] == [
        "random: 80.0 on its own training images, 40.0 on the target (2 runs)"
    ]


def test_collapse_is_flagged_and_counts_an_arms_runs_of_every_table(tmp_path):
    """The later table has one target of the arm's two."""
    content = yaml.safe_load(EXACT)
    arm = {"da": content["tables"]["shaping"]["arms"]["da"]}
    content["tables"]["again"] = {"title": "again", "targets": ["sketch"], "arms": arm}
    folder = write_suite(tmp_path / "c", yaml.safe_dump(content), exact, collapsed=True)
    built = report_of(folder)
    assert cell(built, "da", "cartoon", "Flags") == "one class for 100 % in 3 of 3 runs"
    headings = [column.heading for column in built.sections[0].details.columns]
    assert headings.index("Flags") < headings.index("k of n")
    assert "In 3 arms some runs call nearly every target image one class." in built.main
    assert set(built.findings["Collapse"]) == {
        f"{arm}: 6 of 6 runs call one class more than 90 % of the images" for arm in GAINS
    }


# --- the page ---------------------------------------------------------------------------------


def tree(page):
    assert page.startswith("<!doctype html>\n")
    return ElementTree.fromstring(page.removeprefix("<!doctype html>\n"))


def test_the_page_needs_nothing(files):
    page = files["html"]
    tree(page)
    assert "<script" not in page and "@import" not in page and "url(http" not in page
    targets = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert targets and all(t.startswith(("#", "data:image/png;base64,")) for t in targets)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    links = re.findall(r'<a href="#([^"]*)"', page)
    assert links and set(links) <= set(ids)
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_the_first_screen(files, built):
    """What was run, how much is there, does the audit pass, what came out: before any table."""
    first = files["html"].split("On this page")[0]
    for text in ("A small study", "profile full", "18 of 18 runs done", "passes",
                 "3 arms in 1 table, 3 seeds", "9 updates", "at most 50 images a class",
                 "+4.7 ± 3.5, undecided"):  # fmt: skip
        assert text in first.replace("\N{NO-BREAK SPACE}", " ")
    assert built.decided == "0 of 4" and "0 of 4" in first


def test_many_pairs_are_folded(tmp_path):
    text = EXACT.replace("[art_painting]", "[art_painting, sketch]").replace(
        "[cartoon, sketch]", "[art_painting, cartoon, photo, sketch]"
    )
    page = render.page(report_of(write_suite(tmp_path / "m", text, exact)))
    tree(page)
    main, details = page.split("<summary>Details: ")[:2]
    assert "mean of 6 pairs</th>" in main and "→ photo" not in main.split('class="main"')[1]
    rows = details.split("</details>")[0]
    assert rows.count("→ photo") == 2 * 3 and rows.count('class="mean"') == 3


def test_an_edited_record_withholds_the_findings(tmp_path, capsys):
    folder = write_suite(tmp_path / "small", EXACT, exact)
    run = folder / find_cell(folder, "random", "cartoon", 0).training
    path = run / EVALUATIONS / "cartoon.json"
    text = path.read_text()
    assert '"accuracy": 44.0' in text
    path.write_text(text.replace('"accuracy": 44.0', '"accuracy": 64.0'))
    assert command.main([str(folder)]) == 1
    assert "THE AUDIT FAILS" in capsys.readouterr().err
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    tree(page)
    assert page.index('role="alert"') < page.index("<h1>") < page.index("Main findings")
    assert "Do not quote a figure of this page" in page
    assert f"{run.name}/cartoon: cartoon.json: edited after the run: the seal does not fit" in page
    assert contents.WITHHELD in page and contents.WITHHELD in text
    assert "minus baseline:" not in page + text and "they find" not in page + text
    assert "<em" not in page and "**" not in text
    assert "The primary comparisons in numbers" not in page and "Confusions of" not in page
    assert '<details open="open"><summary>Rules that fail: 1 of' in page
    assert "FAILS" in (folder / "report.tex").read_text()
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert not any(row["verdict"] for row in rows) and len(rows) == 9
    assert (
        cell(report_of(folder), "da", "sketch", "Last epoch") == "50.0 ± 2.0"
    )  # nothing else lost


def test_what_records_say_is_text_and_not_markup(tmp_path):
    text = EXACT.replace('"A small study"', '"A & <i>small</i> | study"')
    folder = write_suite(tmp_path / "small", text, exact)
    index = disk.read_json(folder / "suite.json")
    index["tables"][0] |= {"title": "<i>table</i> & \"quotes'", "note": "a < b"}
    disk.write_json(folder / "suite.json", index)
    assert command.main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "<i>" not in page and "A &amp; &lt;i&gt;small&lt;/i&gt; | study" in page
    tree(page)


def test_maps_are_in_the_page(files, folder):
    pattern = r'<img class="maps" alt="Maps of (\S+)" src="data:image/png;base64,'
    image = re.search(pattern, files["html"])
    assert image[1] == find_cell(folder, "da", "cartoon", 0).training


def test_a_narrow_picture_of_maps_keeps_every_pixel(files, folder):
    """Half the pixels blur the squares of a map."""
    data = re.search(r'src="data:image/png;base64,([^"]*)"', files["html"])[1]
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    (path,) = folder.glob("*/maps.png")
    kept = Image.open(path).convert("RGB")
    assert shown.size == kept.size == (1600, 400) and shown.tobytes() == kept.tobytes()


def test_every_section_is_listed(files, tmp_path):
    claims = "claims: {B1: {says: x, rules: [random > baseline]}}\ntables:"
    built = report_of(
        write_suite(tmp_path / "s", EXACT.replace("\ntables:", f"\n{claims}", 1), exact)
    )
    for page in (files["html"], render.page(built)):
        links = re.findall(r'<li><a href="#([^"]*)">([^<]*)</a></li>', page)
        ids = re.findall(r'<section id="([^"]*)"><h[23]>([^<]*)</h[23]>', page)
        assert links == ids and len(ids) >= 11
        assert len(ids) == page.count("<section")


def test_limits_are_sentences(built):
    assert len(built.limits) > 1 and all(re.search(r"[^.]\.$", text) for text in built.limits)
    warned = {"warnings": ["one", "another."]}
    results = [
        dataclasses.replace(r, training=r.training.model_copy(update=warned))
        for r in built.study.used
    ]
    assert contents.limits_of(results)[-2:] == ["one.", "another."]


def test_percent_is_written_in_one_way(files, built):
    texts = files["html"] + files["md"] + " ".join(contents.HOW_TO_READ)
    assert not re.findall(
        r"\d%", re.sub(r"<svg.*?</svg>|<style.*?</style>", "", texts, flags=re.DOTALL)
    )
    assert "95 %" in texts


def test_losses_are_folded_below_the_table(files, built):
    fold = (
        files["html"]
        .split("<summary>Test loss after the last epoch</summary>")[1]
        .split("</details>")[0]
    )
    grid = built.sections[0].losses
    assert [c.heading for c in grid.columns] == [
        "Arm", "Source → target", "Mean cross-entropy", "In the reports' unit",
    ]  # fmt: skip
    results = line(built, "random", "cartoon").results
    losses = [r.evaluation.loss for r in results]
    row = next(row for row in grid.rows if row[:2] == ["random", "art_painting → cartoon"])
    assert row[2] == f"{statistics.mean(losses):.4f} ± {statistics.spread(losses):.4f}"
    ours = statistics.mean([r.evaluation.batch_loss for r in results])
    assert row[3].startswith(f"{ours:.4f} ±") and ours < statistics.mean(losses) / 50
    assert len(grid.rows) == 6 and "divided by the batch size" in fold and "report A" not in fold
    rows = list(csv.DictReader(io.StringIO(files["csv"])))
    one = next(r for r in rows if r["arm"] == "random" and r["target"] == "cartoon")
    assert float(one["loss"]) == pytest.approx(statistics.mean(losses))
    assert float(one["batch_loss"]) == pytest.approx(ours)


def test_where_the_losses_of_report_a_are_is_said(tmp_path):
    text = EXACT.replace("report-B report T2", "report-A report T1")
    built = report_of(write_suite(tmp_path / "a", text, exact))
    assert "The eight losses that report A shows are in the report alone" in render.page(built)


def test_folds_are_open_in_print():
    style = (render.TEMPLATES / "style.css").read_text()
    of_print = style.split("@media print")[1]
    assert "details::details-content { content-visibility: visible;" in of_print
    assert "position: static" in of_print and ".wide { overflow: visible; }" in of_print


# --- all files --------------------------------------------------------------------------------


def test_each_table_names_its_command_and_the_page_its_versions_once(files, built):
    command_line = f"{built.study.command} --only shaping"
    version = f"torch {versions('cpu')['torch']}"
    for suffix in ("html", "md", "tex"):
        assert command_line in files[suffix]
        assert files[suffix].count("18 runs: fastshape") == files[suffix].count(version) == 1


def test_the_same_records_give_the_same_files(files, folder):
    assert command.main([str(folder), "--out", str(folder / "y.html")]) == 0
    assert files == {suffix: (folder / f"y.{suffix}").read_text() for suffix in files}


def test_csv_is_numbers(files):
    rows = list(csv.DictReader(io.StringIO(files["csv"])))
    assert len(rows) == 9  # 3 arms: 2 targets and the mean
    row = next(r for r in rows if r["arm"] == "random" and r["target"] == "cartoon")
    assert float(row["accuracy"]) == pytest.approx(44 + 2 / 3)
    assert (row["seeds"], row["correct"], row["target_total"]) == ("0 1 2", "154 154 161", "350")
    mean = next(r for r in rows if r["arm"] == "random" and r["target"] == "mean")
    assert float(mean["difference"]) == pytest.approx(14 / 3)
    assert (mean["verdict"], mean["reference"]) == ("", "baseline")
    assert (mean["correct"], row["verdict"]) == ("", "undecided")


def test_targets_are_columns_of_the_main_table(built, files):
    main = built.sections[0].main
    assert main.headings == ["cartoon", "sketch", "mean"]
    arms = dict(main.rows)
    assert arms["random"][0] == ("44.7 ± 1.2", "+4.7 ± 3.5", "undecided", "")
    assert arms["random"][2] == ("49.7 ± 1.2", "+4.7 ± 3.5", "", "")  # a mean has no verdict
    assert arms["baseline"][0].difference == ""
    row = next(line for line in files["md"].splitlines() if line.startswith("| random | 44.7"))
    undecided = "+4.7 ± 3.5 **undecided**"
    assert row == (
        f"| random | 44.7 ± 1.2 | {undecided} | 54.7 ± 1.2 | {undecided} | 49.7 ± 1.2 | +4.7 ± 3.5 |"
    )


def test_a_difference_of_one_seed_stands_without_an_interval(tmp_path):
    text = EXACT.replace("seeds: [0, 1, 2]", "seeds: [0]")
    main = report_of(write_suite(tmp_path / "s", text, exact)).sections[0].main
    assert dict(main.rows)["random"][0] == ("44.0", "+4.0", "", "")


def test_the_main_table_says_what_is_not_in_a_difference(tmp_path):
    gone = [("da", "cartoon", 2)]
    main = report_of(write_suite(tmp_path / "s", EXACT, exact, without=gone)).sections[0].main
    cartoon, sketch, mean = dict(main.rows)["da"]
    assert cartoon.difference == "+1.0 ± 12.7 (1 missing)"
    assert sketch.difference == "+0.0 ± 3.5"
    assert mean.difference == "+1.0 ± 12.7 (1 missing, 1 left out)"


def test_a_comparison_on_many_pairs_is_one_short_sentence(tmp_path):
    text = EXACT.replace("[art_painting]", "[art_painting, sketch]").replace(
        "[cartoon, sketch]", "[art_painting, cartoon, photo, sketch]"
    )
    built = report_of(write_suite(tmp_path / "m", text, exact))
    assert built.main[1] == (
        "random minus baseline: of 6 pairs of domains 6 undecided; differences from +4.7 to +4.7."
    )
    page = render.page(built)
    assert page.count("undecided: three seeds cannot say") >= 12  # in the fold, each pair


def test_published_figures_stand_in_the_main_table(tmp_path):
    text = EXACT.replace("limit: 50, ", "")
    main = report_of(write_suite(tmp_path / "s", text, exact)).sections[0].main
    assert dict(main.rows)["baseline"][0].published == "54.82"


def test_markdown_tables_are_tables(files):
    blocks = re.split(r"\n\n+", files["md"])
    tables = [block.splitlines() for block in blocks if block.startswith("| ")]
    assert len(tables) >= 2
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
        assert re.fullmatch(r"\|( -+:? \|)+", lines[1])


def test_latex_is_a_float_of_at_most_seven_columns(files):
    text = files["tex"]
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{", r"\label{tab:shaping}"):
        assert text.count(part) == 1
    (columns,) = re.findall(r"\\begin{tabular}{(\w+)}", text)
    assert columns == "lrrrr"
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 3 and all(line.count(" & ") == 4 for line in body)
    assert r"random & 44.7 $\pm$ 1.2 & +4.7 $\pm$ 3.5$^{?}$" in body[1]
    assert not set("±−") & set(text.split("%")[-1])
    assert "primary comparisons:\n$^{?}$ undecided.}" in text  # the one sign that it has


def test_latex_without_primary_comparisons_explains_no_sign(tmp_path):
    text = EXACT.replace("primary: [[random, baseline], [da, baseline]]\n", "")
    built = report_of(write_suite(tmp_path / "s", text, exact))
    assert ("Primary comparisons decided", "none declared", "") in render.tiles(built)
    tex = render.latex(built)
    assert "interval.\n}" in tex and "Verdicts" not in tex and "$^{" not in tex


def test_columns_without_a_word_are_left_out():
    rows = [["a", "", "1"], ["b", "", ""]]
    assert render.filled(["x", "y", "z"], rows) == (["x", "z"], [["a", "1"], ["b", ""]])
    assert render.filled(["x"], []) == ([], [])


def test_numbers_are_not_broken_over_lines():
    text = render.unbroken("154–161 of 350, p 0.02, a – b")
    space, joiner = "\N{NO-BREAK SPACE}", "\N{WORD JOINER}"
    assert text == f"154{joiner}–{joiner}161{space}of{space}350, p{space}0.02, a – b"


def test_latex_of_many_targets_shows_their_mean(tmp_path):
    text = EXACT.replace("[cartoon, sketch]", "[cartoon, photo, sketch]").replace(
        "[art_painting]", "[art_painting, cartoon]"
    )
    built = report_of(write_suite(tmp_path / "m", text, exact))
    assert [len(table.headings) for table in map(render.latex_table, built.sections)] == [1]


# --- what is on the page ----------------------------------------------------------------------


def test_primary_comparisons_say_what_their_seeds_would_find(files, built):
    (c, *_) = built.comparisons.primary
    part = files["html"].split("The primary comparisons in numbers")[1].split("</details>")[0]
    assert part.count("<tr>") == 1 + 4 and f"<td>{c.smallest:.1f}</td>" in part


def test_claims_stand_before_tables_with_what_decides_them(tmp_path):
    claims = """
claims:
  B1: {says: "a & b", rules: [random > baseline]}
  B2: {says: not here, undecidable: "no run can"}
tables:"""

    def accuracy(config, *_):  # random maps gain 20, 21 and 22 points
        return 40 + (config.mode == "random") * (20 + config.seed)

    built = report_of(write_suite(tmp_path / "s", EXACT.replace("\ntables:", claims, 1), accuracy))
    page = render.page(built)
    tree(page)
    assert page.index("Published claims") < page.index("On this page")
    headings = page.split('class="claims"')[1].split("</thead>")[0]
    assert re.findall(r">([^<>]+)</th>", headings) == ["Claim", "What the report says", "Outcome"]
    assert "a &amp; b" in page and 'class="outcome holds"' in page
    assert 'class="outcome cannot-be-decided"' in page and "<li>no run can</li>" in page
    assert "| B1 | a & b | holds |" in render.markdown(built)


def test_a_page_without_claims_has_no_part_for_them(files):
    assert "Published claims" not in files["html"] + files["md"]


def test_pictures_of_maps_keep_their_colours(tmp_path):
    """128 colours turned yellow into salmon."""
    colours = [(250, 210 + i % 8, 30 + i % 16) for i in range(300)]
    picture = Image.new("RGB", (300, 1))
    picture.putdata(colours)
    picture.save(tmp_path / "maps.png")
    again = Image.open(io.BytesIO(render.small_png(tmp_path / "maps.png")))
    assert again.convert("RGB").tobytes() == picture.tobytes()


def test_markdown_has_a_blank_line_around_every_block(files):
    """Without it Markdown runs a heading or a list into the paragraph before."""
    lines = files["md"].splitlines()
    for before, here in zip(lines, lines[1:], strict=False):
        if here.startswith(("#", "- ", "| ")) and not before.startswith(here[0]):
            assert before == "", (before, here)


@pytest.mark.parametrize("sign", "\\&%$#_{}~^<>")
def test_latex_signs(sign):
    assert render.latex_text(f"a{sign}b") != f"a{sign}b"
