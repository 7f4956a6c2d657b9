"""The report as a browser shows it."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion_moe.cli import main

from .browser import Browser, find_browser

PATH = find_browser()
pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium is installed (set CHROMIUM to the path of one)")

BOXES = """
[...document.querySelectorAll('figure')].map(figure => {
  const box = figure.querySelector('svg').getBoundingClientRect();
  return [figure.id, box.left, box.top + scrollY, box.width, box.height];
})
"""
OVERFLOWING = """
[...document.querySelectorAll('body *:not(svg *)')]
  .filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + e.id)
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('figure svg g[id*="axis"] text')]
  .map(text => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(PATH, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module", params=["classes", "prompts"])
def report(request, run_of, make_shapes_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("browser")
    if request.param == "prompts":
        run, options = make_shapes_run("--model.text_conditioning=joint"), []
    else:
        run, options = run_of("diffmoe"), [f"--compare={run_of('dsmoe')}"]
    assert main(["analyze", str(run), "--output", str(output), "--num_samples=20", "--steps=4", *options]) == 0
    return output / "report.html"


@pytest.mark.parametrize(
    ("width", "dark"), [(390, False), (1280, False), (1280, True)], ids=["phone", "desktop", "dark desktop"]
)
def test_every_figure_is_seen_and_nothing_complains(browser, report, width, dark):
    browser.open(report.as_uri(), width, dark=dark)
    boxes = browser.value(BOXES)
    page = np.array(Image.open(io.BytesIO(browser.screenshot())).convert("L")).astype(float)
    assert len(boxes) >= 12
    assert page.shape[1] == width
    for name, left, top, across, down in boxes:
        shown = page[int(top) : int(top + down), int(left) : int(left + across)]
        assert across > min(300, width * 0.8) and down > 60, name
        assert shown.std() > 8, name
    background = page[3, 3]
    assert (background < 40) == dark and (background > 240) == (not dark)
    assert browser.errors() == []
    assert [address for address in browser.requests() if not address.startswith("data:")] == [report.as_uri()]
    # No sideways scrolling, and labels that can be read.
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERFLOWING) == []
    assert browser.value(SMALLEST_TEXT) > 8


def test_labels_do_not_leave_their_figures(browser, report):
    """Whatever the width of the font that the browser has."""
    browser.open(report.as_uri(), 1280)
    outside = browser.value("""
    [...document.querySelectorAll('figure svg text')].filter(text => {
      const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
      return box.left < frame.left - 3 || box.right > frame.right + 3;
    }).map(text => text.closest('figure').id + ': ' + text.textContent)
    """)
    assert outside == []


def test_the_links_lead_to_sections(browser, report):
    browser.open(report.as_uri(), 1280)
    missing = browser.value(
        "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
    )
    assert (browser.value("document.querySelectorAll('nav a').length"), missing) == (3, 0)


def test_the_driver_sees_errors_and_requests(browser, tmp_path):
    """Or the tests above could not fail."""
    (tmp_path / "bad.html").write_text("<img src='gone.png'><script>console.error('no'); missing()</script>")
    browser.open((tmp_path / "bad.html").as_uri(), 390)
    kinds = str(browser.errors())
    assert "missing is not defined" in kinds and "'no'" in kinds
    assert any(address.endswith("gone.png") for address in browser.requests())
