"""The documentation site in a browser: every page opens, fits a phone, and is found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowprox import load_model, make_physics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(browser: Any, served: Callable[[Path], str]) -> str:
    """Address of the site that ``FLOWPROX_SITE`` names."""
    if "FLOWPROX_SITE" not in os.environ:
        pytest.skip("needs the built site: .ci/site")
    return served(Path(os.environ["FLOWPROX_SITE"]))


def test_every_page_opens_and_fits_a_phone(
    site: str, page_at: Callable[..., Any], overflow: Callable[[Any], int]
) -> None:
    page = page_at(400, "dark")
    page.goto(f"{site}/genindex.html")
    links = page.eval_on_selector_all("a[href]", "links => links.map(link => link.href.split('#')[0])")
    todo, wide = {f"{site}/index.html", *links}, {}
    seen: set[str] = set()
    while todo - seen:
        address = min(todo - seen)
        seen.add(address)
        if not address.startswith(site) or not address.endswith(".html"):
            continue
        response = page.goto(address)
        assert response is not None and response.ok, address
        todo |= set(page.eval_on_selector_all("article a[href]", "links => links.map(link => link.href.split('#')[0])"))
        if (pixels := overflow(page)) > 0:
            wide[address] = pixels
    assert len(seen) > 60 and wide == {}


def test_search_finds_a_class(site: str, page_at: Callable[..., Any]) -> None:
    page = page_at()
    page.goto(f"{site}/search.html?q=LatentMAP")
    first = page.locator("#search-results li a").first
    first.wait_for()
    assert first.get_attribute("href").endswith("latent_map.html#flowprox.solvers.latent_map.LatentMAP")


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_the_page_to_try_does_what_python_does(
    site: str, page_at: Callable[..., Any], overflow: Callable[[Any], int], width: int, scheme: str
) -> None:
    if not (ROOT / "docs" / "_static" / "try" / "denoiser.onnx").exists():
        pytest.skip("no exported networks: python docs/make_try.py")
    page = page_at(width, scheme)
    page.goto(f"{site}/try.html")
    for task, least in (("denoise", 26.0), ("inpaint", 24.0)):
        page.check(f"#try [value={task}]")
        page.wait_for_load_state("networkidle")
        if task == "inpaint":
            before = page.locator("#try-before")
            before.scroll_into_view_if_needed()
            corner = before.bounding_box()
            page.mouse.move(corner["x"] + 20, corner["y"] + 20)
            page.mouse.down()
            page.mouse.move(corner["x"] + 60, corner["y"] + 30, steps=5)
            page.mouse.up()
        page.click("#try-run")
        page.wait_for_function("document.querySelector('#try-note').textContent.includes('dB')")
        assert float(page.text_content("#try-note").split()[0]) > least
        seen = page.evaluate("flowproxTry")
        shape = (1, 3, 128, 128) if task == "denoise" else (1, 3, 64, 64)
        y, mask, x_hat = (torch.tensor(seen[key]).view(shape) for key in ("measured", "mask", "restored"))
        assert (float(mask[0, 0, :10, :15].min()) == 0) == (task == "inpaint")  # what was painted
        if task == "denoise":
            physics = make_physics("denoising", shape[1:], sigma=seen["sigma"])
            model = load_model("unfolded-denoising-natural")
        else:
            physics = make_physics("inpainting", shape[1:], mask=np.asarray(mask[0, 0]), sigma=0.0)
            model = load_model("unfolded-inpainting-range-faces64")
        with torch.no_grad():
            assert float((model(y, physics) - x_hat).abs().max()) < 1e-4
    page.locator("#try-slider").fill("30")
    assert "70%" in page.locator("#try-over").get_attribute("style")
    assert overflow(page) <= 0
