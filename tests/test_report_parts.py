"""The parts a report is made of: tables in their formats, what varies, charts, error maps."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from report_cases import NASTY, make_records

from flowprox.evaluation.report.charts import (
    N_COLORS,
    Series,
    box_chart,
    cost_chart,
    curves,
    line_chart,
    method_sweeps,
    problem_sweeps,
    spread_chart,
    sweeps_of,
    tuning_curves,
)
from flowprox.evaluation.report.pictures import data_uri, error_map, error_white, file_stem, read_picture
from flowprox.evaluation.report.sources import Chapter
from flowprox.evaluation.report.tables import Contents, make_table, to_csv, to_latex, to_markdown
from flowprox.reconstruction.files import write_deviation

TABLE = make_table(
    "t",
    "Nasty\nnames.",
    {
        "method": [NASTY, "50 % & ~ ^ \\ {x}", "best"],
        "PSNR (dB)": [-1 / 3, None, 2.0],
        "note": ["a | b", "", "±"],
        "=sum(1)": ["=HYPERLINK(1)", "@me", "-1 + 1"],
    },
    {"PSNR (dB)": ".2f"},
    {"PSNR (dB)": [False, False, True]},
)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_csv_is_read_back_with_every_digit_and_holds_no_formulas() -> None:
    head, *rows = csv.reader(io.StringIO(to_csv(TABLE)))
    assert head == ["method", "PSNR (dB)", "note", "'=sum(1)"]
    assert rows[0] == [NASTY, repr(-1 / 3), "a | b", "'=HYPERLINK(1)"] and float(rows[0][1]) == -1 / 3
    assert rows[1][1] == "" and [row[3] for row in rows[1:]] == ["'@me", "'-1 + 1"]


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = to_markdown(TABLE).splitlines()
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert "**2.00**" in lines[-1] and r"\<script\>" in lines[2]


def test_latex_escapes_every_special_character() -> None:
    text = to_latex(TABLE)
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    bare = re.sub(r"\\text\w+\{\}|\\[&%$#_{}]|\$(\\pm|-)\$|\\textbf\{|\\\\", "", body)
    assert not re.search(r"[%$#_^~\\]", bare) and bare.count("&") == 3 * 3
    assert text.startswith("% Nasty names.\n")


def test_empty_columns_vanish() -> None:
    columns = {"method": ["a"], "x": [None], "y": [""], "z": [0.0]}
    table = make_table("t", "", columns, {"x": ".1f", "z": ".1f"})
    assert table.text.to_dict("list") == {"method": ["a"], "z": ["0.0"]}


# What varies ----------------------------------------------------------------------------------------------------------

SWEEPS: dict[str, tuple[dict[str, dict[str, Any]], list[tuple[str, list[float]]]]] = {
    "one number": ({"a": {"s": 2}, "b": {"s": 1}, "c": {"s": 3}}, [("s", [1, 2, 3])]),
    "two together": ({"a": {"s": 1, "t": 5}, "b": {"s": 2, "t": 5}, "c": {"s": 3, "t": 6}}, [("s", [1, 2, 3])]),
    "the second tells them apart": ({"a": {"s": 1, "t": 5}, "b": {"s": 1, "t": 6}}, [("t", [5, 6])]),
    "grid": (
        {f"{s}{t}": {"s": s, "t": t} for s in (1, 2, 3) for t in (5, 6)},
        [("s", [1, 2, 3]), ("s", [1, 2, 3]), ("t", [5, 6]), ("t", [5, 6]), ("t", [5, 6])],
    ),
    "words part them": ({"a": {"s": 1, "n": "x"}, "b": {"s": 2, "n": "x"}, "c": {"s": 3, "n": "y"}}, [("s", [1, 2])]),
    "a word among numbers": ({"a": {"g": 1.0}, "b": {"g": 2.0}, "c": {"g": "auto"}}, [("g", [1, 2])]),
    "switches are no numbers": ({"a": {"s": True}, "b": {"s": False}}, []),
    "nothing": ({"a": {"s": 1}}, []),
}


@pytest.mark.parametrize("case", SWEEPS)
def test_what_varies(case: str) -> None:
    variants, expected = SWEEPS[case]
    found = sweeps_of(variants, "it")
    assert [(sweep.key, [value for value, _ in sweep.points]) for sweep in found] == expected
    for sweep in found:
        assert all(variants[label][sweep.key] == value for value, label in sweep.points)


def test_sweeps_of_problems_and_methods() -> None:
    noises = {"a": {"noise_parameters": {"sigma": 0.1}}, "b": {"noise_parameters": {"sigma": 0.2}}}
    records = make_records(noises, {"flow": 0.0})
    (sweep,) = problem_sweeps(records)
    assert (sweep.key, sweep.labels) == ("noise_parameters.sigma", ["a", "b"])
    variants = [
        {**record, "method": f"flow {gamma}", "options": {"gamma": gamma, "n": 3}, "flow": flow}
        for record in records
        for gamma in (1.0, 0.5)
        for flow in ("small",)
    ]
    tuned = [
        {**record, "method": "other", "options": {"gamma": 2.0, "n": 3}, "tuned": {"gamma": 2.0}} for record in records
    ]
    found = method_sweeps([*variants, *tuned])
    assert {p: [(s.key, s.labels) for s in sweeps] for p, sweeps in found.items()} == {
        problem: [("gamma", ["flow 0.5", "flow 1.0"])] for problem in ("a", "b")
    }


# Charts ---------------------------------------------------------------------------------------------------------------


XY = ("x", "y")


def _line(label: str = "m", x: tuple[float, ...] = (1, 2), **others: Any) -> Series:
    return Series(label, x, [20.0 + value for value in x], [0.5, None, *[0.1] * (len(x) - 2)], **others)


POINTS = [Series(NASTY, [1e-5], [20.0], [None], color=0, method=NASTY), Series("b", [10.0], [25.0], [1.0], color=12)]
CHARTS = {
    "one line": lambda: line_chart("n", [_line()], ("sigma", "PSNR (dB)")),
    "as many as there are colors": lambda: line_chart("n", [_line(f"m{i}") for i in range(N_COLORS)], XY),
    "names that are formulas": lambda: line_chart("n", [_line(NASTY)], (NASTY.replace("$", ""), "y")),
    "published and chosen": lambda: line_chart("n", [_line(published=[(1, 30.0)], chosen=2)], XY),
    "zero and orders of magnitude": lambda: line_chart("n", [_line(x=(0, 0.01, 1, 171))], XY),
    "many places": lambda: line_chart("n", [_line(x=tuple(range(30)))], XY, top=1.0),
    "points": lambda: line_chart("n", POINTS, XY, scale="log"),
    "boxes": lambda: box_chart(
        "n", [Series(NASTY, (), [1.0, 2.0, 4.0], color=0), Series("b", (), [3.0] * 3, color=9)], "y"
    ),
}


@pytest.mark.parametrize("case", CHARTS)
def test_charts_are_well_formed_and_the_same_again(case: str) -> None:
    svg = CHARTS[case]()
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root.get("viewBox") and root.get("width") is None
    names = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(names)) == len(names) and all(str(name).startswith("n-") for name in names)
    assert "http" not in svg and "<script" not in svg
    assert svg == CHARTS[case]()


def test_a_method_has_the_same_color_in_every_chart() -> None:
    of_line = line_chart("n", [_line("a", color=3), _line("b", color=9)], XY)
    points = [Series("a", [1.0], [2.0], color=3), Series("b", [2.0], [3.0], color=9)]
    of_points = line_chart("n", points, XY, scale="log")
    same = line_chart("n", [_line("a", color=1), _line("b", color=9)], XY)
    used = [set(re.findall(r"--c\d", svg)) for svg in (of_line, of_points, same)]
    assert used == [{"--c3", "--c1"}, {"--c3", "--c1"}, {"--c0", "--c1"}]


def test_zero_is_drawn_left_of_what_is_above_it() -> None:
    svg = CHARTS["zero and orders of magnitude"]()
    ticks = [
        element for element in ElementTree.fromstring(svg).iter("text") if element.text in ("0", "0.01", "1", "171")
    ]
    places = {element.text: float(str(element.get("x"))) for element in ticks}
    assert places["0"] < places["0.01"] < places["1"] < places["171"]


def test_curves_have_a_line_per_method_and_at_most_as_many_as_colors() -> None:
    problems = {f"sigma{s}": {"sigma": s} for s in (0.1, 0.2)}
    gains = {f"m{i}": float(i) for i in range(N_COLORS + 1)}
    chapter = Chapter("e", [], make_records(problems, gains))
    first, second = curves(Contents(chapter), "c")
    assert all(f"m{i}: " in first.alt for i in range(N_COLORS))
    assert f"m{N_COLORS}: 29.00 at sigma 0.1, 29.00 at 0.2." in second.alt


def test_variants_of_a_method_are_told_apart_in_a_curve() -> None:
    gains = {f"flow{kind} beta={beta}": float(beta) for kind in ("", " latent") for beta in (1, 2, 3)}
    records = [
        {**record, "method_name": "flow", "options": {"form": "latent" in record["method"], "beta": 0.0}}
        for record in make_records(gains=gains, images=["a"])
    ]
    for record in records:
        record["options"]["beta"] = float(record["method"].rpartition("=")[2])
    (chart,) = curves(Contents(Chapter("e", [], records)), "c")
    assert chart.alt == (
        "flow: PSNR over beta. flow: 21.00 at beta 1, 23.00 at 3. flow latent: 21.00 at beta 1, 23.00 at 3."
    )


def test_long_labels_are_whole_and_inside_the_chart() -> None:
    svg = line_chart("n", [_line("x" * 30), _line("y" * 100)], XY)
    texts = [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]
    assert max(map(len, texts)) == 44 and "x" * 30 in texts and "".join(texts).count("y" * 44) == 2
    boxes = box_chart("n", [Series("z" * 60, (), [1.0, 2.0, 3.0])], "label")
    texts = [element.text or "" for element in ElementTree.fromstring(boxes).iter("text")]
    assert max(map(len, texts)) == 24 and "".join(texts).count("z") == 60


def test_marks_have_titles_and_name_their_method() -> None:
    root = ElementTree.fromstring(line_chart("n", [_line("b & c", method="b")], XY, form=".1f"))
    titles = [element.text for element in root.iter("title")]
    assert list(dict.fromkeys(titles)) == ["b & c: 21.0 ± 0.5 at 1", "b & c: 22.0 at 2"]
    assert {element.get("data-method") for element in root.iter("g")} == {None, "b"}
    root = ElementTree.fromstring(CHARTS["boxes"]())
    assert "b: 3.00 to 3.00, 3 images" in {element.text for element in root.iter("title")}


@pytest.mark.parametrize("chart", [cost_chart, spread_chart])
def test_axes_of_ssim_end_at_one(chart: Any) -> None:
    svg = chart(Contents(Chapter("e", [], make_records()), "ssim"), "denoising", "n").svg
    texts = [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]
    ticks = [float(text) for text in texts if re.fullmatch(r"[01]\.\d+", text)]
    assert max(ticks) <= 1.0 and min(ticks) >= 0.4


def test_tuning_is_drawn_over_what_was_tried() -> None:
    records = make_records(gains={"tv": 0.0}, options={"weight": 0.1}, tuned={"weight": 0.1})
    tuning = [
        {"problem": "denoising", "method": "tv", "options": {"weight": weight}, "psnr": psnr, "n_images": 2}
        for weight, psnr in ((0.3, 20.0), (0.1, 21.0), (0.9, None))
    ]
    contents = Contents(Chapter("e", [], records, tuning))
    (chart,) = tuning_curves(contents, "t")
    assert chart.alt == "tv: tuning of weight. denoising: 21.00 at weight 0.1, 20.00 at 0.3."
    table = contents.tuning()
    assert table.best["PSNR (dB)"].tolist() == [False, True, False] and curves(contents, "c") == []


# Pictures -------------------------------------------------------------------------------------------------------------


def test_error_map_is_the_mean_absolute_difference() -> None:
    x, x_hat = np.random.default_rng(0).random((2, 5, 4, 3))
    np.testing.assert_allclose(error_map(x_hat, x), np.abs(x - x_hat).mean(-1))
    assert error_map(x, x).max() == 0


def test_white_is_a_round_number_that_most_errors_stay_below() -> None:
    small = np.full((8, 8), 0.04)
    assert error_white([small]) == 0.05
    assert error_white([small, small, np.ones((8, 8))]) == 0.05  # one bad method does not black out the others
    assert error_white([np.full((8, 8), 1.0)]) == 1.0


def test_pictures_come_back_and_large_ones_are_reduced(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png") * 255, pixels)
    assert data_uri(read_picture(tmp_path / "a.png")).startswith("data:image/png;base64,")
    Image.fromarray(np.zeros((100, 2000), dtype=np.uint8)).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png").shape == (26, 512, 3)


def test_names_of_files_are_readable_and_never_collide() -> None:
    assert (
        file_stem("denoising-sigma0.1", "a cat", "latent-map beta=1") == "denoising-sigma0.1--a cat--latent-map beta=1"
    )
    odd = ["a/b", "a-b", "a\\b", "a%b", "..", "a--b", "x" * 300, "x" * 301, "\udce9", "\x1b[31m", "猫" * 90]
    stems = [file_stem(name) for name in odd] + [file_stem("a", "b")]
    assert len(set(stems)) == len(stems) and not any(set("/\\%\x1b") & set(stem) for stem in stems)
    assert max(len(f"{stem}.png".encode()) for stem in stems) < 230


def test_a_deviation_is_an_array_and_a_picture(tmp_path: Path) -> None:
    write_deviation(torch.tensor([[[0.0, 0.05], [0.1, 0.02]]]), tmp_path, "a")
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), [[[0.0, 0.05], [0.1, 0.02]]])
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture).tolist() == [[0, 128], [255, 51]]
