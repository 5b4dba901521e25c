"""The page in a real browser: a silent console, no sideways scrolling, legible in both colour schemes."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lskd_study.cli.main import main
from lskd_study.pages.study import write_report
from lskd_study.plan.plan import Plan

pytestmark = pytest.mark.integration

Keys = pytest.importorskip("selenium.webdriver").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

BACKGROUND = "return getComputedStyle(document.body).backgroundColor"
CONTRAST = """
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).map(Number);
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
};
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
const paper = light(getComputedStyle(document.body).backgroundColor);
const behind = e => {
  while (e && getComputedStyle(e).backgroundColor == 'rgba(0, 0, 0, 0)') e = e.parentElement;
  return e ? light(getComputedStyle(e).backgroundColor) : paper;
};
return [
  ...[...document.querySelectorAll('body *:not(script, style)')]
    .filter(e => [...e.childNodes].some(child => child.nodeType == Node.TEXT_NODE && child.data.trim()))
    .map(e => [e, getComputedStyle(e)[e.tagName == 'text' ? 'fill' : 'color']])
    .map(([e, color]) => [4.5, ratio(light(color), behind(e)), e.outerHTML]),
  ...[...document.querySelectorAll('.panels path[style*="--arm"], .difference path[style*="--arm"]')]
    .map(e => [3, ratio(light(getComputedStyle(e).stroke), paper), e.outerHTML]),
].filter(([need, found]) => !(found >= need)).map(([need, found, html]) => found + ' ' + html.slice(0, 200));
"""


# Names, headings and landmarks.
STRUCTURE = """
const problems = [];
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const check = (right, words) => { if (!right) problems.push(words); };
const name = e => (e.getAttribute('aria-label')
  || all('#' + CSS.escape(e.getAttribute('aria-labelledby') || 'nothing')).map(l => l.textContent).join('')
  || e.textContent || e.title).trim();
for (const tag of ['header', 'main', 'footer'])
  check(all(tag).filter(e => e.parentElement == document.body).length == 1, 'one ' + tag);
check(all('h1').length == 1, 'h1');
const levels = all('h1, h2, h3, h4').map(h => Number(h.tagName[1]));
levels.forEach((level, i) => check(!i || level <= levels[i - 1] + 1, 'heading ' + i + ' is too deep'));
const ids = all('[id]').map(e => e.id);
check(new Set(ids).size == ids.length, 'ids twice');
all('a[href^="#"]').forEach(a => check(ids.includes(a.hash.slice(1)), a.outerHTML + ' leads nowhere'));
all('a, button, section, [role=region], [role=img], summary, th').forEach(e =>
  check(name(e), e.outerHTML.slice(0, 200) + ' has no name'));
all('section').forEach(s => check(ids.includes(s.getAttribute('aria-labelledby')), s.outerHTML.slice(0, 80)));
const regions = all('[role=region]').map(name);
check(new Set(regions).size == regions.length, 'regions of one name');
all('th').forEach(th => check(th.scope, th.outerHTML + ' has no scope'));
all('svg:not([role=img], [aria-hidden=true])').forEach(s => check(false, s.outerHTML.slice(0, 80)));
all('[tabindex]').forEach(e => check(e.tabIndex <= 0, 'tabindex'));
all('.scroll').forEach(e =>
  check(e.scrollWidth <= e.clientWidth || e.tabIndex == 0, 'no way to scroll ' + name(e)));
all('pre').forEach(e => check(e.tabIndex == 0, 'pre'));
all('button').forEach(e => check(e.getBoundingClientRect().height >= 24, 'a small target ' + name(e)));
return problems;
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory, fake_study_at, translation_study_at) -> dict[str, Path]:
    """A page with everything, one with runs missing, one with more arms and settings; and one over all."""
    made = {}
    for name, changes in {
        "usual": {"effect": 2.0, "controls": ["hard", "smoothed"]},
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
    index = tmp_path_factory.mktemp("index") / "studies.html"
    assert main(["index", *(str(page.parent) for page in made.values()), "--output", str(index)]) == 0
    return {**made, "index": index, "paper": paper_page(fake_study_at(tmp_path_factory.mktemp("paper")))}


def paper_page(make: Callable[..., Plan]) -> Path:
    """The page of a study that names tables of the paper, with figures of others beside its own."""
    plan = make(teachers=[(name, "teacher.yaml") for name in ("resnet50", "densenet121")], seeds=[0, 1])
    own = {"student": "small", "teacher": "resnet50", "temperature": 1.0, "hard_weight": 0.0, "top1": 70.0}
    figures = [{**own, "smoothing": alpha} for alpha in plan.smoothing]
    published = {"source": "Others, 2022", "figures": figures}
    write_report(replace(plan, paper=["Table 7", "Table 8", "Table 9"], published=published))
    return plan.root / "index.html"


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
    assert main(["stability", "--list", str(folder / "teachers.yaml")]) == 0
    return folder / "out" / "index.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (768, "dark"), (390, "light"), (320, "dark")])
@pytest.mark.parametrize("name", ["usual", "many", "translation", "teachers", "index", "paper"])
def test_the_page_in_chromium(browser, pages, name, width, scheme):
    browser.get_log("performance")
    show(browser, pages[name], width, scheme)
    assert browser.execute_script(STRUCTURE) == []
    assert browser.get_log("browser") == []
    asked = [entry["message"] for entry in browser.get_log("performance")]
    assert not [message for message in asked if '"url":"http' in message]
    answer = browser.find_element("id", "answer")
    advice = browser.find_elements("css selector", "#recommendation .sentence")
    assert len(advice) == (name != "index")
    # On the first screen, the advice on that of the smallest telephone too.
    for one, high in ((answer, 700 if width > 320 else 900), *((one, 568) for one in advice)):
        assert one.is_displayed()
        assert one.location["y"] + one.size["height"] < high
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    scroll, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert scroll <= inner == width
    word = {"translation": "BLEU", "index": "Of 4 studies"}.get(name, "accura")
    assert word in answer.text
    assert ("95 % interval" in answer.text) == (name != "index")
    panels = browser.find_elements("css selector", ".panels svg")
    assert panels or name in ("teachers", "index")
    assert all(panel.size["height"] > 100 for panel in panels)
    background = browser.execute_script(BACKGROUND)
    assert (background == "rgb(21, 24, 28)") == (scheme == "dark")
    assert browser.execute_script(CONTRAST) == []


def show(browser, page, width=1280, scheme="light", media=""):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())
    # What the page does when a size changes, it does in the next frame: a scrollbar that appears makes one.
    browser.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
    )


def test_the_tab_key_goes_down_the_page_and_shows_where_it_is(browser, pages):
    show(browser, pages["usual"])
    seen = []
    for _ in range(12):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(
            browser.execute_script(
                "const e = document.activeElement, box = e.getBoundingClientRect();"
                "return [e.textContent.trim(), parseFloat(getComputedStyle(e).outlineWidth),"
                " box.top >= 0 && box.bottom <= innerHeight, scrollY + box.top]"
            )
        )
    assert seen[0][0] == "Skip to the results"
    assert seen[1][0].startswith("Students scored no lower than their teachers")  # unfolds
    assert [text for text, *_ in seen[2:4]] == ["Teacher", "α"]
    assert [one for one in seen if not (one[1] >= 2 and one[2])] == []
    tops = [top for *_, top in seen]
    assert tops == sorted(tops)


def test_a_result_leads_to_the_commands_of_its_runs(browser, pages):
    show(browser, pages["many"])
    details = browser.find_element("id", "commands")
    assert details.get_attribute("open") is None
    link = browser.find_elements("css selector", "table.results tbody tr:nth-child(3) a")[1]
    link.send_keys(Keys.ENTER)
    WebDriverWait(browser, 5).until(lambda _: details.get_attribute("open") is not None)
    heading = browser.find_element("css selector", "h3:target")
    assert heading.text == "Student big of big, α = 0, T = 1, λ = 0"
    inside = "const b = arguments[0].getBoundingClientRect(); return b.top >= 0 && b.bottom <= innerHeight"
    WebDriverWait(browser, 5).until(lambda _: browser.execute_script(inside, heading))
    commands = browser.find_elements("css selector", "h3:target + ul pre")
    assert [f"--seed {seed}" in pre.text for seed, pre in enumerate(commands)] == [True, True]
    assert all("student-big-of-big-smoothing0-T1-hard0" in pre.text for pre in commands)


PAPER = {"A4": (210, 297), "letter": (215.9, 279.4)}  # mm
CUT = """
const width = arguments[0];
return [...document.querySelectorAll('table, td, th, svg, pre, p, figure, h1, h2, h3, dd')]
  .map(e => [e.getBoundingClientRect(), e]).filter(([box]) => box.right > width + 1 || box.left < -1)
  .map(([, e]) => e.outerHTML.slice(0, 120));
"""


@pytest.mark.parametrize("paper", PAPER)
@pytest.mark.parametrize("name", ["many", "translation", "teachers", "index", "paper"])
def test_nothing_is_cut_on_paper(browser, pages, name, paper):
    wide, high = PAPER[paper]
    width = int((wide - 2 * 14) / 25.4 * 96)  # between the margins of page.css
    show(browser, pages[name], width, "dark", "print")
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(CUT, width) == []
    assert browser.execute_script(BACKGROUND) == "rgb(255, 255, 255)"
    assert browser.execute_script(CONTRAST) == []
    for left_out in browser.find_elements("css selector", ".tools, .skip, #commands pre"):
        assert not left_out.is_displayed()
    closed = browser.find_elements("css selector", "details:not([open])")
    assert all(details.get_attribute("id") == "commands" for details in closed)
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert browser.find_elements("css selector", "details[open]") == []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    size = {"paperWidth": wide / 25.4, "paperHeight": high / 25.4}
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", size)["data"])
    pages_there = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 2 <= pages_there <= 12
    boxes = {tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox\s*\[([^\]]*)\]", pdf)}
    assert len(boxes) == 1
    assert boxes.pop() == pytest.approx((0, 0, wide / 25.4 * 72, high / 25.4 * 72), abs=1)


@pytest.mark.parametrize("name", ["many", "translation"])
def test_verdicts_and_students_are_seen_at_any_width(browser, pages, name):
    """Not cut, or, in a wide table of results, beyond an edge that a shadow marks."""
    hidden = """
const box = e => e.getBoundingClientRect();
const inside = e => box(e).right <= window.innerWidth && box(e).width > 0;
const cells = [...document.querySelectorAll('.claims .verdict, .results td, .results th[scope=row]')];
return cells.filter(e => !inside(e)).map(e => [e.innerText, e.closest('.scroll')])
  .filter(([text, table]) => !(table.scrollWidth > table.clientWidth && table.querySelector('.results')
    && window.innerWidth > 720 && getComputedStyle(table).backgroundImage.split('gradient').length === 5))
  .map(([text]) => text);
"""
    for width in (320, 390, 561, 700, 870, 1280):
        show(browser, pages[name], width)
        assert browser.execute_script(hidden) == [], width
