"""A page as headless Chromium shows it, where there is one: no browser, no test."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

__all__ = ["check_page", "measured_page"]

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Appended to a copy of the page: what a reader would see, as one attribute of the document.
_PROBE = """
<script>
addEventListener("load", () => {
  const wide = [...document.body.querySelectorAll("*")].filter((each) =>
    !each.closest("pre") && each.scrollWidth > each.clientWidth + 1 && each.clientWidth > 0
      && getComputedStyle(each).display !== "inline");
  const anchors = [...document.querySelectorAll("a[href^='#']")];
  document.documentElement.dataset.found = JSON.stringify({
    width: innerWidth,
    scrolled: document.documentElement.scrollWidth,
    overflowing: wide.map((each) => each.tagName + ": " + each.textContent.trim().slice(0, 80)),
    images: [...document.images].map((each) => [each.complete && each.naturalWidth, each.alt]),
    dangling: anchors.filter((each) => !document.getElementById(each.hash.slice(1))).map((each) => each.hash),
    titles: [...document.querySelectorAll("h2")].map((each) => each.textContent),
  });
});
</script>
"""


def measured_page(path: Path, width: int, folder: Path) -> dict[str, Any]:
    """What Chromium found of the page in a window that wide, and ``console``: what its scripts and parts complained of.

    Args:
        path: of the page.
        width: CSS pixels; a full Chromium has windows of 500 at least.
        folder: for a copy of the page, and the browser's own files.
    """
    browser = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell")
    copy = folder / f"probed-{width}.html"
    copy.write_text(path.read_text(encoding="utf-8") + _PROBE, encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2000", copy.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', result.stdout)
    assert found is not None, result.stderr[-2000:]
    measured: dict[str, Any] = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    measured["console"] = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return measured


def check_page(path: Path, folder: Path, titles: list[str]) -> None:
    """The page fits a narrow screen and a wide one, with every image, and nothing complains."""
    for width in (500, 1200):
        found = measured_page(path, width, folder)
        assert found["width"] == width, found
        assert found["scrolled"] <= width and found["overflowing"] == [], found
        assert found["images"] and all(loaded and alt for loaded, alt in found["images"]), found["images"]
        assert found["console"] == [] and found["dangling"] == []
        assert sorted(found["titles"]) == sorted(titles)
