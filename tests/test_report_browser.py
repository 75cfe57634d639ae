"""The page of `kvq report` in a headless browser: no errors, nothing loaded, nothing wider than the window.

Needs playwright's own Chromium, or one of the system's named below. KVQ_SCREENSHOTS names a folder for the pictures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from test_cli import model_folder

from mlx_kvq_plugin.cli import main

SYSTEM = ("chromium-headless-shell", "chromium", "google-chrome")
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("LD_PRELOAD", raising=False)  # the BLAS of these tests is no library for a browser
        playwright = stack.enter_context(sync_api.sync_playwright())
        own = Path(playwright.chromium.executable_path)
        system = next(filter(None, map(shutil.which, SYSTEM)), None)
        if not own.is_file() and system is None:
            pytest.skip("no Chromium is installed: apt-get install chromium-headless-shell, or playwright install")
        launched = playwright.chromium.launch(
            executable_path=None if own.is_file() else system,
            args=["--no-sandbox"],  # which root needs
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything that can be wide: many layers and heads, long names, several schemes."""
    folder = tmp_path_factory.mktemp("models") / ("a_model_with_a_very_long_name_" * 4)
    options: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 12}
    kinds = ["sliding_attention"] * 11 + ["full_attention"]
    model_folder(folder, **options, layer_types=kinds, sliding_window=tiny_models.WINDOW)
    assert main(["calibrate", str(folder), "--sequences", "1", "--length", "128"]) == 0
    out = folder.parent / "report.html"
    schemes = ("tq4", "tq@3", "k=tq4,v=tq2,edges=2,recent=32", "rvq1")
    argv = ["report", str(folder), "--quick", "--tokens", "100", "--out", str(out)]
    assert main([*argv, *(part for scheme in schemes for part in ("--kv-scheme", scheme))]) == 0
    return out


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_without_a_fault(browser: Any, page_file: Path, tmp_path: Path, width: int, theme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    sizes = page.eval_on_selector_all("svg.plot", "found => found.map(x => [x.clientWidth, x.clientHeight])")
    assert len(sizes) >= 6 and all(min(size) > 150 and size[0] <= width for size in sizes)
    for _ in range(2):  # as it opens, then with all tables shown
        assert page.evaluate("document.documentElement.scrollWidth") == width
        wide = page.evaluate(
            "[...document.querySelectorAll('body *')].filter(x => !x.closest('.scroll, svg')"
            f" && x.getBoundingClientRect().right > {width}).map(x => x.outerHTML.slice(0, 80))"
        )
        assert wide == []
        page.evaluate("document.querySelectorAll('details').forEach(x => x.open = true)")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    channels = [sum(map(int, color.strip("rgb()").split(","))) for color in (ink, paper)]
    assert (channels[0] < channels[1]) is (theme == "light") and abs(channels[0] - channels[1]) > 450
    folder = Path(os.environ.get("KVQ_SCREENSHOTS") or tmp_path)
    shot = folder / f"report-{width}-{theme}.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 20_000
    page.close()


def test_texts_in_pictures_can_be_read_on_a_phone(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    page.goto(page_file.as_uri())
    heights = page.eval_on_selector_all(
        "svg.plot",
        "found => found.map(x => [...x.querySelectorAll('g[id*=text_]')].map(t => t.getBoundingClientRect().height))",
    )
    tallest = [max(texts) for texts in heights]
    assert all(8 <= height <= 400 for height in tallest)
    page.close()


def test_numbers_are_printed_too(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every(x => x.open)")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()
