"""The page in headless Chromium: quiet, offline, and inside its window at both widths and in both schemes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commissure.report import page
from commissure.report.results import Report

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found: install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths["chromedriver"]))
    yield driver
    driver.quit()


def opened(browser: Any, path: Path, width: int, scheme: str) -> None:
    browser.get("about:blank")  # the start page loads its own parts
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_cleanly(report: Report, browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = page.write(report, tmp_path / "index.html")
    opened(browser, path, width, scheme)
    assert browser.get_log("browser") == [], "the console is silent"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert path.as_uri() in urls, "the log sees requests"
    assert [url for url in urls if not url.startswith((path.as_uri(), "data:"))] == []
    inner, outer = browser.execute_script(
        "return [innerWidth, Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)]"
    )
    assert inner == width
    assert outer <= width, "no horizontal overflow"
    escaping = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('thead') && !e.closest('svg') "
        "&& e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"
    )
    assert escaping == []
    background, color = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    assert contrast(background, color) >= 7
    assert (luminance(background) < 0.05) == (scheme == "dark")
    small = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && e.innerText "
        "&& parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.tagName)"
    )
    assert small == [], "text is at least 12 px"
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.verdict')].map(e => "
        "[getComputedStyle(e, '::before').content, e.innerText, getComputedStyle(e).color])"
    )
    assert len({mark for mark, *_ in marks}) == 5, "each verdict has a sign of its own"
    assert min(contrast(background, color) for *_, color in marks) >= 4.5


def channels(color: str) -> list[float]:
    return [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]


def luminance(color: str) -> float:
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
