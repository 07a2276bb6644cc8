"""The report page in a real browser. Deselected by default: ``python -m pytest -m browser``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.tiny_runs import record, write_plain_run

from hf_freezecache.report.figures import (
    figures_of,
    read_baseline,
)
from hf_freezecache.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
#: Runs in the page: what does not fit, what was not drawn, what was asked for, and the contrast of texts.
PROBE = """
<script>
addEventListener("error", e => document.title = "ERROR " + e.message);
addEventListener("load", () => {
  const page = document.documentElement;
  const figures = [...document.querySelectorAll("figure")].map(figure => {
    const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
    const drawn = svg.querySelectorAll("path, use").length, texts = [...svg.querySelectorAll("text")];
    const sizes = texts.map(text => text.getBoundingClientRect()).filter(text => text.width > 0);
    const outside = sizes.filter(text => text.left < -1 || text.right > innerWidth + 1).length;
    const height = Math.min(...sizes.map(text => Math.min(text.height, text.width + 6)));
    return [figure.id, Math.round(box.width), Math.round(box.height), drawn, sizes.length, outside, Math.round(height)];
  });
  const asked = performance.getEntriesByType("resource").length;
  const colors = [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
  const result = {wide: page.scrollWidth - innerWidth, figures, asked, colors, title: document.title};
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(result); document.body.append(out);
});
</script>
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    return write_report(figures_of(record(), read_baseline(write_plain_run(tmp_path / "plain"))), tmp_path)


def browse(page: Path, tmp_path: Path, width: int, dark: bool) -> tuple[str, str]:
    """Return the page's DOM and what the browser complained of, at the width of a phone or a desktop."""
    # A window is at least 500 pixels wide: a narrower page goes into a frame.
    inner = tmp_path / f"inner-{width}-{dark}.html"
    inner.write_text(page.read_text().replace("</head>", f"{PROBE}</head>"))
    outer = tmp_path / f"outer-{width}-{dark}.html"
    scheme = "dark" if dark else "light"
    outer.write_text(
        f'<!DOCTYPE html><meta name="color-scheme" content="{scheme}"><link rel="icon" href="data:,">'
        f'<iframe src="{inner.name}" style="width:{width}px;height:900px;border:0;color-scheme:{scheme}"></iframe>'
        "<pre id=copy></pre><script>addEventListener('load', () => setTimeout(() => {"
        "copy.textContent = frames[0].document.getElementById('probe').textContent}, 300))</script>"
    )
    command = [
        *(CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--log-level=0"),
        *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--allow-file-access-from-files"),
        *("--virtual-time-budget=5000", f"--window-size={max(width + 40, 600)},1000", "--dump-dom", outer.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280], ids=["phone", "desktop"])
def test_the_page_shows_every_figure_without_an_error(page, tmp_path, width, dark) -> None:
    dom, complaints = browse(page, tmp_path, width, dark)
    assert "CONSOLE" not in complaints, complaints
    probe = json.loads(re.search(r'<pre id="copy">(.*?)</pre>', dom, re.S)[1].replace("&amp;", "&"))
    assert not probe["title"].startswith("ERROR")
    assert probe["asked"] == 0
    assert probe["wide"] <= 0
    assert [figure[0] for figure in probe["figures"]] == ["over_time", "timeline", "cost", "storage"]
    for name, across, down, drawn, texts, outside, height in probe["figures"]:
        assert 280 <= across <= 480, name
        assert down > 80, name
        assert drawn > 5, name
        assert texts >= 5, name
        assert outside == 0, name
        assert height >= 9, name
    background, text = (tuple(map(int, re.findall(r"\d+", color)[:3])) for color in probe["colors"])
    assert (sum(background) < sum(text)) == dark
    assert abs(sum(background) - sum(text)) > 500


@pytest.mark.browser
def test_a_script_error_would_be_seen(page, tmp_path) -> None:
    page.write_text(page.read_text().replace("<main>", "<main><script>nothing()</script><img src='gone.png'>"))
    _, complaints = browse(page, tmp_path, 1280, False)
    assert "nothing is not defined" in complaints
