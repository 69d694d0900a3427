"""The report in headless Chromium, opened from disk: quiet, sortable, searchable, and as wide as a phone."""

import json
import shutil

import pytest
from evaluation_toys import BAD, BLEU, GOOD, TER, make_report
from test_render import AWKWARD, make_details

from pipeline.evaluation.pages.render import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or chromedriver is not installed")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium that logs its console and every request."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in [*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """A report with awkward texts in every place, open in the browser."""
    directory = tmp_path_factory.mktemp("report")
    texts = {"base": [AWKWARD] * 12, "sft": [AWKWARD, *BAD[1:]], "ppo": GOOD, "control": ["x" * 300] * 12}
    samples = {"sft": [text for text in GOOD for _ in range(2)]}
    report, outputs = make_report(texts, metrics=(BLEU, TER), samples=samples, name="<b>n</b>" * 20)
    write_report(report, make_details(outputs), directory)
    browser.get((directory / "report.html").as_uri())
    return browser


def set_width(browser, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def test_nothing_is_requested_and_the_console_is_silent(page):
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # The browser's own start page is none of ours.
    urls = [request["request"]["url"] for request in sent if request["documentURL"].startswith("file:")]
    assert urls == [page.current_url]


def test_what_models_write_is_text(page):
    assert page.execute_script("return document.scripts.length") == 1
    assert page.execute_script("return document.querySelectorAll('main b').length") == page.execute_script(
        "return document.querySelectorAll('p.note > b').length"
    )
    assert '<script>alert("x")</script>' in page.execute_script(
        "return document.getElementById('listing').textContent"
    )


@pytest.mark.parametrize("width", [390, 768, 1200, 1400])
def test_the_page_never_scrolls_sideways(page, width):
    set_width(page, width)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    script = "const page = document.documentElement; return [page.scrollWidth - page.clientWidth, window.innerWidth]"
    assert page.execute_script(script) == [0, width]


def column(page, number: int) -> list[str]:
    script = "return [...document.querySelectorAll('#listing tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    return page.execute_script(script, number)


def test_tables_sort_both_ways(page):
    set_width(page, 1400)
    click = "document.querySelectorAll('#listing thead th')[arguments[0]].click()"
    page.execute_script(click, 0)
    assert column(page, 0) == [str(number) for number in range(12)]  # as numbers: 10 after 9
    page.execute_script(click, 0)
    assert column(page, 0) == [str(number) for number in reversed(range(12))]
    page.execute_script(click, 2)
    assert column(page, 2) == sorted(column(page, 2))
    assert page.execute_script("return document.querySelectorAll('#listing [aria-sort]').length") == 1


def test_samples_are_searched(page):
    script = """
    const field = document.getElementById('search');
    field.value = arguments[0];
    field.dispatchEvent(new Event('input'));
    return [document.querySelectorAll('#listing tbody tr:not([hidden])').length,
            document.getElementById('hits').textContent];
    """
    assert page.execute_script(script, "APPLES red") == [3, "3 of 12 shown"]
    assert page.execute_script(script, "no such text") == [0, "0 of 12 shown"]
    assert page.execute_script(script, "")[0] == 12


def test_light_and_dark(page):
    paper = "return getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        seen[scheme] = page.execute_script(paper)
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}
    page.execute_script("document.getElementById('theme').click()")
    assert page.execute_script(paper) == seen["light"]
