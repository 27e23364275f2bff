"""The page: one file that loads nothing, the figures in it, and what stands in the place of what is missing."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from report_cases import NASTY, Tags, make_records, write_figures_of_a_study, write_results

from flowprox.cli import main
from flowprox.data import save_image
from flowprox.evaluation.report import (
    PARTS,
    ReportOptions,
    picture_path,
    read_results,
    truth_path,
    write_page,
    write_report,
    write_tables,
)
from flowprox.records import RecordWriter

SWEPT = {"denoising-sigma0.1": {"sigma": 0.1}, "denoising-sigma0.2": {"sigma": 0.2}}
TABLES = ReportOptions(parts=["overview", "comparisons", "cases"])
"""Without charts, which take most of the time."""
RECIPE = {
    "problems": [
        {
            "name": "denoising",
            "series": {"sigma": [0.1, 0.2]},
            "published": {"flow": [30.0, 26.5], "gan": [22.0, None]},
            "published_in": "Somebody (2020), Table 1",
        }
    ]
}


def read(path: Path) -> Tags:
    return Tags(path.read_text(encoding="utf-8"))


def make_results(folder: Path) -> Path:
    write_results(folder, make_records(SWEPT))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder that also has drawn figures."""
    return write_figures_of_a_study(make_results(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def page(whole: Path) -> str:
    """The whole page of it."""
    return write_report(whole).read_text(encoding="utf-8")


# One file -------------------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_loads_nothing(page: str) -> None:
    tags = Tags(page)
    images = tags.all("img")
    n_tiles = 2 * 2 * (1 + 3 + 3)  # problems, images: truth, estimates, error maps
    assert len(images) == n_tiles + 2  # and drawn figures
    assert all(image["alt"] and str(image["src"]).startswith("data:image/") for image in images)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in tags.found}
    outside = re.sub(r"data:image/[\w+]+;base64,[\w+/=]+", "", page)
    assert "http:" not in outside and "https:" not in outside and "@import" not in outside
    assert not re.search(r"url\((?!#)", outside)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in page and "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_identifiers_are_unique_and_references_lead_somewhere(page: str) -> None:
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    referred = {*re.findall(r'href="#([^"]+)"', page), *re.findall(r"url\(#([^)]+)\)", page)}
    assert referred and referred <= set(names)


def test_charts_are_described_and_colored_by_the_page(page: str) -> None:
    described = [a for _, a in Tags(page).found if a.get("role") == "img"]
    assert len(described) == page.count("<svg") == 1 + 2 * 2  # curve; cost and spread of each problem
    assert all(a["aria-label"] for a in described)
    assert "flow: 28.50 at sigma 0.1" in str(described[0]["aria-label"])
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--ink)" in drawings and "var(--c2)" in drawings and not re.search(r"#[0-9a-f]{6}", drawings)
    rules = page.partition("</style>")[0]
    assert all(rules.count(f"--c{i}:") == 2 for i in range(8)) and "<style" not in drawings


def test_reports_are_reproducible(whole: Path, page: str) -> None:
    assert write_report(whole).read_text(encoding="utf-8") == page
    tables = [[path.read_bytes() for path in write_tables(read_results([whole]))] for _ in range(2)]
    assert tables[0] == tables[1]


def test_text_is_escaped_and_names_stay_in_the_folder(tmp_path: Path) -> None:
    records = make_records(
        {NASTY: {"sigma": 0.1}}, {NASTY: 0.0, "b": 1.0}, images=[NASTY, "1", "2"], recipe=NASTY, version=NASTY
    )
    records[1]["failed"] = NASTY
    folder = write_results(tmp_path / "run", records)
    assert all(path.parent == folder / "images" for path in (truth_path(folder, NASTY), *folder.glob("images/*")))
    write_figures_of_a_study(folder, {"norm.svg": {"title": NASTY, "caption": NASTY, "alt": NASTY}})
    tags = read(write_report(folder, ReportOptions(title=NASTY)))
    assert len(tags.all("script")) == 1
    assert tags.text.count(NASTY) > 8
    assert any(NASTY in str(image["alt"]) for image in tags.all("img"))


# Figures of the page --------------------------------------------------------------------------------------------------


def test_measured_beside_published(page: str) -> None:
    text = Tags(page).text
    # 28.5 dB measured, 30 and 26.5 published
    assert "−1.50" in text and "+2.00" in text
    assert "gan (not run here)" in text and "22.00" in text
    assert "Published in: Somebody (2020), Table 1." in text


def test_published_figures_are_those_of_the_recipe(results: Path) -> None:
    (results / "recipe.yaml").unlink()
    text = read(write_report(results, TABLES)).text
    assert "28.50" in text and "−1.50" not in text and "not run here" not in text


def test_means_intervals_comparisons_and_cases(page: str) -> None:
    text = " ".join(Tags(page).text.split())
    assert "28.50 ± 2.48" in text  # 27.5, 28.5, 29.5: t of two degrees of freedom
    assert "−2.50" in text and "0 of 3" in text and "0.00" in text  # bm3d against flow, the same on every image
    assert "worst case of flow" in text and "best case of flow" not in text  # of which no picture is kept
    assert "Gaussian window of 11×11" in text and "clipped to [0, 1]" in text and "95 %" in text


def test_the_best_of_a_column_is_marked(page: str) -> None:
    assert re.findall(r'<td class="best"[^>]*>([\d.]+) ± ', page) == ["28.50", "28.50"]
    assert '<td class="best" data-value="28.5">28.50</td>' in page


def test_another_figure_of_the_records(results: Path) -> None:
    page = read(write_report(results, ReportOptions(metric="residual", parts=TABLES.parts))).text
    assert "residual, mean over images" in page and "0.1000 ± 0.0000" in page


def test_a_reference_of_choice(results: Path) -> None:
    text = read(write_report(results, ReportOptions(reference="bm3d", parts=TABLES.parts))).text
    assert "+2.50" in text and "which favors it" not in text


def test_parts_can_be_chosen(tmp_path: Path) -> None:
    records = make_records(SWEPT, {"bm3d": 0.0, "flow": 1.0})
    folder = write_figures_of_a_study(write_results(tmp_path / "run", records, n_pictures=1))
    with RecordWriter(folder / "tuning.jsonl") as writer:
        writer.write(
            {"problem": "denoising-sigma0.1", "method": "flow", "options": {"gamma": 1}, "psnr": 1.0, "n_images": 1}
        )
    titles = {
        "overview": "the best mean of each problem",
        "curves": "PSNR over sigma",
        "comparisons": "minus PSNR of the reference",
        "cost": "Cost against quality",
        "spread": "Spread over images",
        "cases": "the worst and the best image of each method",
        "images": "Under each estimate its error",
        "tuning": "Every combination that was tried",
        "figures": "landscape",
    }
    assert set(titles) == set(PARTS) - {"calibration"}  # of records that hold intervals or samples
    results = read_results([folder])
    for part in titles:
        text = read(write_page(results, ReportOptions(parts=[part]))).text
        assert {name for name, title in titles.items() if title in text} == {part}
        assert "s / image" in text


def test_the_page_says_what_was_measured_and_shows_pictures_before_tables(page: str) -> None:
    assert Tags(page).text.count("denoising: sigma 0.1") == 1
    section = page.partition('<section id="c0-0">')[2]
    assert section.index('<div class="pictures">') < section.index("<table")


def test_methods_can_be_told_apart_by_a_script(page: str) -> None:
    kinds = {tag for tag, attributes in Tags(page).found if attributes.get("data-method") == "bm3d"}
    assert kinds == {"tr", "figure", "g"}
    assert {"flow", "bm3d: 26.00 ± 2.48 at 0.1"} <= {
        a.get("data-name", "").partition(",")[0] for a in Tags(page).all("figure")
    } | {text for text in re.findall("<title>([^<]+)</title>", page)}


def test_pictures_can_be_limited(results: Path) -> None:
    tags = read(write_report(results, ReportOptions(n_images=1, parts=["images"])))
    assert len(tags.all("img")) == 2 * (1 + 3 + 3)
    assert "Pictures of 1 of 3 images" in tags.text


# What is missing or wrong ---------------------------------------------------------------------------------------------


def test_a_missing_picture_is_named_in_its_place(results: Path) -> None:
    picture_path(results, "denoising-sigma0.1", "face", "bm3d").unlink()
    picture_path(results, "denoising-sigma0.1", "cat", "bm3d").write_bytes(b"no picture")
    truth_path(results, "cat").unlink()
    text = read(write_report(results, ReportOptions(parts=["images"]))).text
    assert "denoising-sigma0.1--face--bm3d.png is missing" in text
    assert "denoising-sigma0.1--cat--bm3d.png cannot be read" in text
    assert "cat.png is missing" in text
    assert "4 pictures are missing" in text


def test_pictures_of_different_sizes_have_no_error_map(results: Path) -> None:
    n = len(read(write_report(results, ReportOptions(parts=["images"]))).all("img"))
    save_image(torch.rand(3, 16, 16), picture_path(results, "denoising-sigma0.1", "face", "bm3d"))
    assert len(read(write_report(results, ReportOptions(parts=["images"]))).all("img")) == n - 1


def test_no_pictures_at_all(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run", make_records(), n_pictures=0)
    assert "No pictures are kept" in read(write_report(folder, ReportOptions(parts=["images"]))).text


def test_failures_are_shown_with_their_message(tmp_path: Path) -> None:
    records = make_records()
    records[3] = {k: v for k, v in records[3].items() if k not in ("psnr", "ssim")} | {"failed": "ValueError: no luck"}
    folder = write_results(tmp_path / "run", records)
    text = read(write_report(folder, ReportOptions(parts=["images"]))).text
    assert text.count("ValueError: no luck") == 2 and "1 of 9 reconstructions failed" in text


def test_a_method_that_always_fails_has_a_row(tmp_path: Path) -> None:
    records = [r if r["method"] != "flow" else {**r, "psnr": None, "failed": "no"} for r in make_records()]
    page = write_report(write_results(tmp_path / "run", records)).read_text()
    assert '<th scope="row">flow</th><td>–</td>' in page


# Tables as files ------------------------------------------------------------------------------------------------------


def test_tables_in_three_formats(results: Path) -> None:
    paths = write_tables(read_results([results]))
    assert {path.suffix for path in paths} == {".md", ".csv", ".tex"}
    stems = {path.stem for path in paths}
    assert stems == {"overview", "summary", "published", "comparisons", "cases"}
    assert {path.name for path in (results / "tables").iterdir()} == {path.name for path in paths}
    assert "28.50 ± 2.48" in (results / "tables/overview.md").read_text()
    rows = list(csv.DictReader((results / "tables/summary.csv").read_text().splitlines()))
    assert [row["images"] for row in rows] == ["3"] * 6 and float(rows[2]["PSNR (dB)"]) == 28.5
    assert r"28.50 $\pm$ 2.48" in (results / "tables/overview.tex").read_text()


def test_tables_of_an_earlier_report_do_not_stay(results: Path) -> None:
    write_tables(read_results([results]))
    (results / "recipe.yaml").unlink()
    (results / "tables/mine.md").touch()
    paths = write_tables(read_results([results]))
    names = {path.name for path in (results / "tables").iterdir()}
    assert names == {path.name for path in paths} | {"mine.md"} and "published.csv" not in names


# Command --------------------------------------------------------------------------------------------------------------


def test_command_writes_page_and_tables(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in results.iterdir()}
    assert main(["report", str(results), "--title", "Mine", "--parts", "images", "overview"]) == 0
    printed = capsys.readouterr()
    assert "report.html" in printed.out and "15 files" in printed.out and printed.err == ""
    assert {path.name for path in results.iterdir()} == before | {"report.html", "tables"}
    assert "<title>Mine</title>" in (results / "report.html").read_text()


def test_command_opens_the_page(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)))
    assert main(["report", str(results), "--open", "--parts", "overview"]) == 0
    assert opened == [(results / "report.html").resolve().as_uri()] and "by hand" in capsys.readouterr().err


def test_command_on_several_folders(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_results(tmp_path / "other", make_records(recipe="another", run_seed=1, version="2"))
    study = write_figures_of_a_study(
        tmp_path / "study", {"norm.svg": {"title": "Norms", "caption": "c", "alt": "falls"}}
    )
    out = tmp_path / "new/report"
    assert main(["report", str(results), str(other), str(study), "--out", str(out), "--parts", "figures"]) == 0
    tags = read(out / "report.html")
    assert [a["id"] for a in tags.all("section") if re.fullmatch(r"c\d", str(a.get("id")))] == ["c0", "c1", "c2"]
    assert "another" in tags.text and "Norms" in tags.text
    assert any(image["alt"] == "falls" for image in tags.all("img"))
    assert (out / "tables/made-summary.md").is_file() and (out / "tables/another-summary.csv").is_file()
    assert not (results / "report.html").exists() and not (other / "tables").exists()


def test_mixed_records_are_noted_on_the_page_and_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_results(tmp_path / "run", [*make_records(), *make_records(version="2", run_seed=7, seed=9)])
    assert main(["report", str(folder), "--parts", "comparisons"]) == 0
    printed, text = capsys.readouterr().err, read(folder / "report.html").text
    for words in (
        "versions of flowprox differ",
        "seeds of the run differ between records (0, 7)",
        "measured in several ways",
    ):
        assert words in printed and words in text
    assert "28.50" in text


REFUSED: dict[str, tuple[list[str], str]] = {
    "metric": (["--metric", "psn"], "metric: unknown 'psn'; did you mean psnr?"),
    "metric that no record holds": (["--metric", "psnr_unclipped"], "the records hold psnr, ssim, residual"),
    "part": (["--parts", "curve"], "parts: unknown 'curve'; did you mean curves"),
    "reference": (["--reference", "bm3"], "reference: unknown 'bm3'; did you mean bm3d?"),
    "number of images": (["--n_images", "-1"], "n_images must be 0 or more"),
    "recipe": (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
    "option": (["--parst", "images"], "unknown option --parst; did you mean --parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(tmp_path / "run", make_records())
    words, message = REFUSED[case]
    assert main(["report", str(folder), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _refusal(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["report", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_empty_folder_and_a_missing_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no records and no figures" in _refusal(capsys, tmp_path)
    assert f"flowprox evaluate --out {tmp_path}" in _refusal(capsys, tmp_path)
    assert "does not exist; check the path" in _refusal(capsys, tmp_path / "nowhere")
    (tmp_path / "records.jsonl").touch()
    assert "no records" in _refusal(capsys, tmp_path)


def test_several_sources_or_a_file_need_out(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_results(tmp_path / "other", make_records())
    assert "out is missing" in _refusal(capsys, results, other)
    assert "out is missing" in _refusal(capsys, results / "records.jsonl")
    assert "given twice" in _refusal(capsys, results, results, "--out", tmp_path / "out")
    recipe = results / "recipe.yaml"
    words = [
        str(results / "records.jsonl"),
        "--recipe",
        str(recipe),
        "--out",
        str(tmp_path / "out"),
        "--parts",
        "overview",
    ]
    assert main(["report", *words]) == 0
    assert "Somebody" in read(tmp_path / "out/report.html").text


def test_an_error_leaves_the_earlier_page(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(results, TABLES)
    before = page.read_bytes()
    found = read_results([results])
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_page(found, ReportOptions("other", parts=TABLES.parts))
    assert page.read_bytes() == before and not list(results.glob(".*"))
