"""Pages in a real browser: it requests nothing, says nothing, and shows everything."""

from __future__ import annotations

import pytest

from tests.report.browser import Browser, path_of_browser
from tests.report.test_page import SECTIONS
from vp_train.report import page

pytestmark = pytest.mark.skipif(path_of_browser() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


def assert_is_shown(found, width, sections):
    requested, said, look = found
    assert [url for url in requested if not url.startswith("data:")] == requested[:1]
    assert requested[0].startswith("file:///")
    assert said == []
    assert look["width"] <= width  # wide tables and pictures scroll by themselves
    assert [name for name in look["headings"] if name != "missing"] == sections
    assert look["shown"] == look["pictures"] > 5


def test_the_page_of_a_run_is_shown(browser, evil_run):
    path = page.write_report(evil_run)
    for width in (1280, 400):
        assert_is_shown(browser.look(path, width), width, SECTIONS)


def test_the_page_of_two_runs_is_shown(browser, evil_run, write_run, tmp_path):
    other, _ = write_run("plain", "optim.lr=0.5", traced=False)
    path = page.write_comparison([evil_run, other], tmp_path / "two.html")
    sections = ["settings", "curves", "figures", "warnings", "versions"]
    for width in (1280, 400):
        assert_is_shown(browser.look(path, width), width, sections)


def test_a_page_follows_the_colours_that_the_reader_prefers(browser, write_run):
    run, _ = write_run("untraced", traced=False)
    path = page.write_report(run)
    light, dark = (browser.look(path, 800, dark=dark)[2] for dark in (False, True))
    assert light["background"] != dark["background"]
    assert light["images"] == 1  # the planned schedule, of a run without a traced step


def test_a_script_in_a_page_would_be_seen(browser, tmp_path):
    """The other tests could fail."""
    (tmp_path / "other.css").write_text("")
    path = tmp_path / "page.html"
    path.write_text('<link rel="stylesheet" href="other.css"><script>console.log("hello")</script>')
    requested, said, _ = browser.look(path, 800)
    assert len(requested) == 2
    assert said
