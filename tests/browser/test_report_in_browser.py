"""The report in a browser: what a reader may do with it, and what it shows without scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_cases import make_records, write_results

from flowprox.evaluation.report import ReportOptions, write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, served: Callable[[Path], str]) -> str:
    folder = write_results(tmp_path_factory.mktemp("report") / "results", make_records())
    return f"{served(folder)}/{write_report(folder, ReportOptions()).name}"


def test_pictures_are_compared_and_methods_hidden(report: str, page_at: Callable[..., Any]) -> None:
    page = page_at(has_touch=True)
    page.goto(report)
    stage = page.locator(".stage").first
    box = stage.bounding_box()
    place = lambda: int(stage.get_attribute("aria-valuenow"))  # noqa: E731
    at = lambda part: (box["x"] + part * box["width"], box["y"] + box["height"] / 2)  # noqa: E731

    page.mouse.move(*at(0.5))
    page.mouse.down()
    page.mouse.move(*at(0.75))
    page.mouse.up()
    assert place() == 75
    page.touchscreen.tap(*at(0.25))
    assert place() == 25
    stage.press("ArrowRight")
    assert place() == 27 and "27%" in stage.locator(".over").get_attribute("style")

    lists = page.get_by_label("left picture").first, page.get_by_label("right picture").first
    for choice, shown, label in zip(lists, stage.locator("img").all(), ("measurement", "bm3d"), strict=True):
        option = choice.locator("option", has_text=label).first
        choice.select_option(option.get_attribute("value"))
        tile = page.locator(f"details.image >> nth=0 >> figure[data-method={label}] >> img").first
        assert shown.get_attribute("src") == tile.get_attribute("src")

    stage.press("+")
    page.locator(".tile .picture").first.click()
    scales = page.locator("details.image >> nth=0 >> .picture img").evaluate_all(
        "all => all.map(one => one.style.transform)"
    )
    assert len(scales) == 2 + 4 + 3 and set(scales) == {"scale(4)"}  # under the slider, of the methods, their errors

    shown = lambda name: page.locator(f"[data-method={name}] >> visible=true").count()  # noqa: E731
    assert shown("bm3d") and shown("flow")
    page.locator("#filter summary").click()
    page.get_by_label("bm3d", exact=True).uncheck()
    assert not shown("bm3d") and shown("flow")

    titles = page.locator("svg [data-method] title").all_text_contents()
    assert any(text.startswith("flow: ") for text in titles)
    page.locator("table.sortable th button").first.click()
    assert page.locator("th[aria-sort=ascending]").count() == 1


@pytest.mark.parametrize("width, scheme, scripts", [(1280, "light", False), (390, "dark", True)])
def test_it_is_complete_without_scripts_and_fits_a_phone(
    report: str, page_at: Callable[..., Any], overflow: Callable[[Any], int], width: int, scheme: str, scripts: bool
) -> None:
    page = page_at(width, scheme, java_script_enabled=scripts)
    page.goto(report)
    assert page.locator("table").count() > 2 and page.locator("svg").count() > 0
    assert page.locator("img >> visible=true").count() >= 7
    assert not scripts or overflow(page) <= 0
