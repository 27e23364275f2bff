"""The page of ``flowprox app`` in a browser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def app(browser: Any) -> Iterator[str]:
    """Address of the page, whose server is a process of its own."""
    pytest.importorskip("gradio", reason="needs the extra app")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flowprox", "app", "--no-show", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline, there = time.monotonic() + 240, 1  # seconds: it imports all, on a machine that does other work too
    while there and process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            there = probe.connect_ex(("127.0.0.1", port))
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_a_picture_is_restored(app: str, page_at: Callable[..., Any]) -> None:
    page = page_at()
    page.goto(app)
    page.get_by_role("button", name="Restore").click()
    page.locator("p", has_text="dB").filter(has_text="denoising").wait_for()
    assert page.locator("text=--model unfolded-denoising-natural").count()
    page.get_by_label("latent-map", exact=True).check()
    page.get_by_role("button", name="Restore").click()
    page.get_by_text("--method latent-map").wait_for()


def test_it_fits_a_phone(app: str, page_at: Callable[..., Any], overflow: Callable[[Any], int]) -> None:
    page = page_at(390, "dark")
    page.goto(app)
    page.get_by_role("button", name="Restore").wait_for()
    assert overflow(page) <= 0
