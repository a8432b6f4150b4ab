"""`report` in a real browser, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from analytic import invoke
from browser import Browser, Page, kept_in, open_browser
from hostile_study import HARM, hostile_study

from qsearch.report.page_document import page_document
from qsearch.report.page_file import write_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as running:
        yield running


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A page of a search that measured twelve trials and dropped one point, and the document in it."""
    folder = tmp_path_factory.mktemp("written")
    assert invoke(folder, "search", "--budget", "12", AGAIN="worse").exit_code == 0
    result = invoke(folder, "report", "--study", "demo", "--out", "demo.html", "--json")
    assert result.exit_code == 0, result.stderr
    return folder / "demo.html", json.loads(result.stdout)


def opened(browser: Browser, file: Path, width: int = 1280) -> Page:
    page = browser.page()
    page.resize(width, 900, mobile=width < 600)
    page.open(file.as_uri())
    return page


def unharmed(page: Page, file: Path) -> None:
    """Nothing was complained about, and nothing but the file was asked for."""
    assert page.complaints == []
    assert page.requests == [file.as_uri()]


def selected(page: Page) -> list[str]:
    """Where the selected point shows: the parts of the page, each once."""
    code = "[...document.querySelectorAll('.selected')].map((one) => one.closest('.chart, table').id + ' ' + one.dataset.point)"
    return sorted(page.evaluate(code))


def places(index: int) -> list[str]:
    return sorted(f"{place} {index}" for place in ("again", "by-bytes", "by-latency", "intervals", "map", "points"))


def test_the_page_shows_every_point_everywhere(browser: Browser, written: tuple[Path, dict], tmp_path: Path) -> None:
    file, document = written
    page = opened(browser, file)
    unharmed(page, file)
    points = len(document["points"])
    assert points == len(document["study"]["front"]) + 1
    assert page.evaluate("document.title") == "qsearch: demo"
    for place in ("#by-latency .point", "#by-bytes .point", "#points tr[data-point]", "#map tr[data-point]"):
        assert page.evaluate(f"document.querySelectorAll('{place}').length") == points, place
    assert page.evaluate("document.querySelectorAll('#map td').length") == points * 8
    assert page.evaluate("document.querySelectorAll('#tables tbody tr').length") == len(document["tables"])
    assert page.evaluate("document.querySelectorAll('#commands code').length") == points
    text = page.evaluate("document.body.innerText")
    for point in document["points"]:
        assert f"{point['latency_ms']:.3f} ± {point['latency_spread_ms']:.3f}" in text and point["command"] in text
    assert f"{document['study']['hypervolume']:.4f}" in text
    assert page.screenshot(kept_in(tmp_path) / "report-wide.png").stat().st_size > 20_000


def test_a_point_chosen_in_one_place_is_marked_in_all(browser: Browser, written: tuple[Path, dict]) -> None:
    file, document = written
    page = opened(browser, file)
    knee = [point["name"] for point in document["points"]].index(document["picks"]["knee"])
    assert selected(page) == places(knee)
    other = next(index for index in range(len(document["points"])) if index != knee)
    page.click(f'#points tr[data-point="{other}"]')
    assert selected(page) == places(other)
    assert document["points"][other]["command"] in page.evaluate("document.querySelector('#chosen').innerText")
    page.click(f'#map tr[data-point="{knee}"] th')
    assert selected(page) == places(knee)
    # By mouse in the figures, where no other point lies over it.
    lone = page.evaluate(LONE_POINT)
    page.click(f'#by-bytes .point[data-point="{lone}"] .dot')
    assert selected(page) == places(lone)
    page.evaluate("document.querySelector('#by-latency .point.selected').focus()")
    page.press("ArrowRight" if lone + 1 < len(document["points"]) else "ArrowLeft")
    moved = lone + 1 if lone + 1 < len(document["points"]) else lone - 1
    assert selected(page) == places(moved)
    pressed = page.evaluate("[...document.querySelectorAll('[aria-pressed=true]')].map((one) => one.dataset.point)")
    assert pressed == [str(moved)] * 2
    unharmed(page, file)


LONE_POINT = """(() => {
  for (const one of document.querySelectorAll('#by-bytes .point')) {
    one.scrollIntoView({block: 'center'});
    const box = one.querySelector('.dot').getBoundingClientRect();
    const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    if (hit && hit.closest('.point') === one) return Number(one.dataset.point);
  }
})()"""


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_page_does_not_scroll_sideways(browser: Browser, written: tuple[Path, dict], width: int, tmp_path: Path) -> None:
    file, _ = written
    page = opened(browser, file, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is drawn fits what it is drawn into, and its letters keep their size.
    for place in ("by-latency", "by-bytes", "intervals", "volume"):
        box = page.evaluate(
            f"(() => {{ const s = document.querySelector('#{place} svg'); return [s.clientWidth, s.viewBox.baseVal.width]; }})()"
        )
        assert box[0] <= width and abs(box[0] - box[1]) <= 1, (place, box)
    page.screenshot(kept_in(tmp_path) / f"report-{width}.png")
    unharmed(page, file)


def test_dark_and_print(browser: Browser, written: tuple[Path, dict], tmp_path: Path) -> None:
    file, document = written
    page = opened(browser, file)
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.media("", "dark")
    assert page.evaluate(paper) == "rgb(20, 22, 26)"
    page.screenshot(kept_in(tmp_path) / "report-dark.png")
    page.media("print", "dark")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    # Nothing is cut off that paper cannot scroll to.
    assert page.evaluate("getComputedStyle(document.querySelector('.tall')).overflowY") == "visible"
    page.media("", "light")
    assert page.pdf(kept_in(tmp_path) / "report.pdf").read_bytes().startswith(b"%PDF")
    # After printing, what was drawn for paper is drawn for the screen again.
    assert page.until("document.querySelector('#volume svg').viewBox.baseVal.width > 900")
    unharmed(page, file)


def test_hostile_names_do_no_harm(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    write_page(page_document(hostile_study(tmp_path)), file)
    page = opened(browser, file, 390)
    unharmed(page, file)
    assert page.evaluate("document.title") == "qsearch: hostile"
    assert page.evaluate("document.querySelectorAll('img, iframe, script:not([type])').length") == 1
    # The name is there, as text.
    assert HARM in page.evaluate("[...document.querySelectorAll('#map thead th')].map((one) => one.title).join(' ')")
    assert HARM in page.evaluate("document.querySelector('#about').textContent")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # Even script that got into the page would not run.
    page.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s); })()"
    )
    assert page.evaluate("document.title") == "qsearch: hostile"


def test_pages_of_studies_without_a_front(browser: Browser, tmp_path: Path) -> None:
    assert invoke(tmp_path, "search", "--study", "tight", "--budget", "4", "--max-latency-ms", "0.1").exit_code == 3
    assert invoke(tmp_path, "search", "--timeout", "0").exit_code == 0
    for name in ("tight", "demo"):
        assert invoke(tmp_path, "report", "--study", name, "--out", f"{name}.html").exit_code == 0
    page = opened(browser, tmp_path / "tight.html")
    assert "No configuration is within the constraints (latency_ms <= 0.1)" in page.evaluate("document.body.innerText")
    assert page.evaluate("document.querySelectorAll('#by-latency .point.closest').length") == 3
    unharmed(page, tmp_path / "tight.html")
    page = opened(browser, tmp_path / "demo.html")
    assert "No trial of this study has completed yet" in page.evaluate("document.querySelector('#notice').innerText")
    assert page.evaluate("document.querySelector('#front').hidden")
    unharmed(page, tmp_path / "demo.html")


def test_a_front_of_one_point_and_a_study_of_an_older_version(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("version: 1\nskip: ['*']\n")
    assert invoke(tmp_path, "search", "--space", "one.yaml", "--study", "one").exit_code == 0
    assert invoke(tmp_path, "report", "--study", "one", "--out", "one.html").exit_code == 0
    page = opened(browser, tmp_path / "one.html")
    assert page.evaluate("document.querySelectorAll('#by-latency .point').length") == 1
    assert page.evaluate("document.querySelector('#layers').hidden")
    page.click("#with-float")
    assert page.evaluate("document.querySelectorAll('#by-latency .float').length") == 0
    unharmed(page, tmp_path / "one.html")
    write_page(page_document(hostile_study(tmp_path, ("a", "b", "c"), old=True)), tmp_path / "old.html")
    page = opened(browser, tmp_path / "old.html")
    assert page.evaluate("document.querySelectorAll('#by-latency .point').length") == 3
    unharmed(page, tmp_path / "old.html")


def test_refusals(tmp_path: Path) -> None:
    assert invoke(tmp_path, "search", "--budget", "1").exit_code == 0
    missing = invoke(tmp_path, "report", "--study", "nix", "--out", "a.html")
    assert missing.exit_code == 1 and "no study database" in missing.stderr
    nowhere = invoke(tmp_path, "report", "--study", "demo", "--out", "nowhere/a.html")
    assert nowhere.exit_code == 2 and "directory that exists" in nowhere.stderr
    figures = invoke(tmp_path, "report", "--study", "demo", "--out", "a.html", "--figures", "figures")
    assert figures.exit_code == 0 and (tmp_path / "figures" / "front-latency.png").is_file()
    assert figures.stdout == ""
