"""The page in a real browser: a silent console, no sideways scrolling, legible in both colour schemes."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from lskd_study.cli import main
from lskd_study.doctor import find_chromium
from lskd_study.report import write_report

pytestmark = pytest.mark.integration

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing outside, not even the distribution's start page
    "--homepage=about:blank",
)
CONTRAST = """
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).map(Number);
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
};
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
const paper = light(getComputedStyle(document.body).backgroundColor);
return [
  ...[...document.querySelectorAll('p, td, th, dd, dt, figcaption, svg text')]
    .filter(e => !e.querySelector('.verdict'))
    .map(e => [e, getComputedStyle(e)[e.tagName == 'text' ? 'fill' : 'color']])
    .map(([e, color]) => [4.5, ratio(light(color), paper), e.outerHTML]),
  ...[...document.querySelectorAll('.panels path[style*="--arm"], .difference path[style*="--arm"]')]
    .map(e => [3, ratio(light(getComputedStyle(e).stroke), paper), e.outerHTML]),
].filter(([need, found]) => !(found >= need)).map(([need, found, html]) => found + ' ' + html.slice(0, 200));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver")
    path, driver = find_chromium(), shutil.which("chromedriver")
    if path is None or driver is None:
        reason = "no chromium with chromedriver here; on Debian: apt install chromium chromium-driver"
        if os.environ.get("LSKD_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    options = selenium.ChromeOptions()
    options.binary_location = path
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, fake_study_at, translation_study_at) -> dict[str, Path]:
    """A page with everything, one with runs missing, and one with more arms and settings than usual."""
    made = {}
    for name, changes in {
        "usual": {"effect": 2.0},
        "many": {"smoothing": [0.0, 0.05, 0.1], "temperatures": [1.0, 4.0], "seeds": [0, 1]},
    }.items():
        plan = fake_study_at(tmp_path_factory.mktemp(name))(**changes)
        if name == "many":
            (plan.folder(plan.runs[-1]) / "job.json").unlink()
        write_report(plan)
        made[name] = plan.root / "index.html"
    plan = translation_study_at(tmp_path_factory.mktemp("translation"))(effect=0.6)
    (plan.folder(plan.runs[-1]) / "job.json").unlink()
    write_report(plan)
    made["translation"] = plan.root / "index.html"
    made["teachers"] = teachers_page(tmp_path_factory.mktemp("teachers"))
    return made


def teachers_page(folder: Path) -> Path:
    """The page of a list of teachers, with warnings and both of the paper's tables."""
    generator = np.random.default_rng(0)
    labels = np.arange(150) % 6
    entries = []
    for number, smoothing in enumerate((0.0, 0.1, 0.1)):
        logits = generator.normal(size=(150, 6)).astype(np.float32)
        logits[np.arange(150), labels] += 3 - number
        np.savez(folder / f"{number}.npz", logits=logits, labels=labels)
        entry = {"name": f"teacher {number}", "logits": str(folder / f"{number}.npz")}
        entries.append({**entry, "network": "ResNet-50", "smoothing": smoothing})
    entries[0]["tolerance"] = {"accuracy": 0.1, "one_minus_s": 0.001}
    study = {"kind": "stability", "title": "Teachers", "output": str(folder / "out"), "teachers": entries}
    (folder / "teachers.yaml").write_text(yaml.safe_dump({**study, "temperatures": [1, 20]}))
    assert main(["study", str(folder / "teachers.yaml")]) == 0
    return folder / "out" / "index.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["usual", "many", "translation", "teachers"])
def test_the_page_in_chromium(browser, pages, name, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("performance")
    browser.get(pages[name].as_uri())
    assert browser.get_log("browser") == []
    asked = [entry["message"] for entry in browser.get_log("performance")]
    assert not [message for message in asked if '"url":"http' in message]
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    scroll, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert scroll <= inner == width
    answer = browser.find_element("id", "answer")
    assert answer.is_displayed()
    assert ("BLEU" if name == "translation" else "accura") in answer.text
    assert "95 % interval" in answer.text
    assert answer.location["y"] + answer.size["height"] < 700  # the answer is on the first screen
    panels = browser.find_elements("css selector", ".panels svg")
    assert panels or name == "teachers"
    assert all(panel.size["height"] > 100 for panel in panels)
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(21, 24, 28)") == (scheme == "dark")
    assert browser.execute_script(CONTRAST) == []
