"""Tables that sort and copy, in a real browser: by keyboard, on a page of their own."""

import csv
import io
from pathlib import Path

import pytest

from lskd_study.pages.page import environment

pytestmark = pytest.mark.integration

Keys = pytest.importorskip("selenium.webdriver").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

ROWS = [
    # name, top-1, difference, p, count, setting
    ("ResNet-101", "77.78 ± 0.05", "−0.31", "< 0.001", "1,010", "T = 10"),
    ("ResNet-50", "76.13 ± 0.12", "+0.07 points", "0.042", "100", "T = 9"),
    ("DenseNet, “121”", "–", "–", "–", "–", "–"),
    ("resnet-18", "9.5", "−12.5", "0.5", "9", "T = 1"),
    ('Wide "ResNet"', "100.00 ± 0.00", "+1.20", "1.2e-05", "12,345.5", "T = 64"),
]
HEAD = ("Model", "Top‑1 (%)", "Difference", "p", "Classes", "Setting")
PAGE = """
{% extends "shell.html.j2" %}{% block title %}Tables{% endblock %}{% block main %}
<div class="scroll" role="region" tabindex="0" aria-label="The first table">
<table class="data" id="plain">
<thead><tr>{% for h in head %}<th scope="col">{{ h }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for c in row[1:] %}<td>{{ c }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<table class="data" id="marked"><caption>Verdicts</caption>
<thead><tr><th scope="col">Claim</th><th scope="col">verdict</th><th scope="col">why</th></tr></thead>
<tbody>
<tr><td>one <span class="tested">more words</span></td>
<td data-value="2"><span aria-hidden="true">✗</span> contradicted</td><td>line<br>line</td></tr>
<tr><td>two</td><td data-value="0"><span aria-hidden="true">✓</span> supported</td><td>a&nbsp;b</td></tr>
</tbody></table>
<table class="data" data-fixed id="spanned">
<thead><tr><th scope="col">Claim</th><th scope="col">p</th><th scope="col">Runs</th></tr></thead>
<tbody><tr><th scope="rowgroup" colspan="3">Students, all</th></tr></tbody>
<tbody><tr><td colspan="2">two, of them</td><td>c</td></tr></tbody></table>
<table class="data" data-fixed id="fixed"><thead><tr><th scope="col">Measure</th></tr></thead>
<tbody><tr><td>b</td></tr><tr><td>a</td></tr></tbody></table>
{% endblock %}
"""
CLIPBOARD = """
Object.defineProperty(navigator, 'clipboard',
  {value: {writeText: async words => { window.copied = words; }}, configurable: true});
"""

NO_CLIPBOARD = "Object.defineProperty(navigator, 'clipboard', {value: undefined});"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "tables.html"
    path.write_text(environment().from_string(PAGE).render(rows=ROWS, head=HEAD))
    return path


@pytest.fixture
def tables(browser, page):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})  # another file's page was narrow
    browser.get(page.as_uri())
    browser.get_log("browser")
    yield browser
    assert browser.get_log("browser") == []


def column(browser, number, table="plain"):
    cells = browser.find_elements("css selector", f"#{table} tbody tr > :nth-child({number + 1})")
    return [cell.text for cell in cells]


def sort_button(browser, number, table="plain"):
    return browser.find_elements("css selector", f"#{table} thead button")[number]


def status(browser, table="plain"):
    table = browser.find_element("id", table)
    tools = (
        ".scroll + .tools"
        if table.get_attribute("id") == "plain"
        else f"#{table.get_attribute('id')} + .tools"
    )
    return browser.find_element("css selector", f"{tools} [role=status]").text


ORDERS = {
    0: [2, 3, 1, 0, 4],  # as words, with numbers in them by size
    1: [3, 1, 0, 4, 2],
    2: [3, 0, 1, 4, 2],
    3: [4, 0, 1, 3, 2],
    4: [3, 1, 0, 4, 2],
    5: [3, 1, 0, 4, 2],
}


@pytest.mark.parametrize("number", ORDERS)
def test_enter_and_space_sort_by_what_the_cells_say(tables, number):
    given = [row[number] for row in ROWS]
    ascending = [given[i] for i in ORDERS[number]]
    last = [text for text in ascending if text == "–"]
    descending = [text for text in reversed(ascending) if text != "–"] + last
    head = tables.find_elements("css selector", "#plain thead th")
    button = sort_button(tables, number)
    for key, order, state in (
        (Keys.ENTER, ascending, "ascending"),
        (Keys.SPACE, descending, "descending"),
        (Keys.ENTER, given, None),
        (Keys.ENTER, ascending, "ascending"),
    ):
        button.send_keys(key)
        assert column(tables, number) == order
        states = [th.get_attribute("aria-sort") for th in head]
        assert states == [state if i == number else None for i in range(len(HEAD))]
        said = f"Sorted by {HEAD[number]}, {state}" if state else "In the first order again"
        assert status(tables) == said
        assert tables.switch_to.active_element == button
    # Whole rows moved, not cells; another column takes over.
    names = [ROWS[given.index(text)][0] for text in ascending]
    assert column(tables, 0) == names
    other = (number + 1) % len(HEAD)
    sort_button(tables, other).send_keys(Keys.ENTER)
    assert [bool(th.get_attribute("aria-sort")) for th in head] == [i == other for i in range(len(HEAD))]


def test_the_tab_key_reaches_the_buttons_and_shows_them(tables):
    for _ in range(2):  # the link to the results, then the first button: the region holds all, so no stop
        tables.switch_to.active_element.send_keys(Keys.TAB)
    focused = tables.switch_to.active_element
    assert focused == sort_button(tables, 0)
    assert focused.value_of_css_property("outline-style") == "solid"
    assert focused.accessible_name == "Model"
    assert focused.aria_role == "button"


def test_a_cell_may_name_what_it_sorts_by(tables):
    buttons = tables.find_elements("css selector", "#marked thead button")
    assert [button.text for button in buttons] == ["Claim", "verdict", "why"]
    buttons[1].click()
    assert column(tables, 0, "marked") == ["two", "one more words"]


def test_tables_with_an_order_of_their_own_only_copy(tables):
    for name in ("spanned", "fixed"):
        assert not tables.find_elements("css selector", f"#{name} thead button")
        assert tables.find_element("css selector", f"#{name} + .tools button").text == "Copy as CSV"


def copied(browser, selector) -> list[list[str]]:
    browser.execute_script(CLIPBOARD)
    browser.find_element("css selector", f"{selector} button").send_keys(Keys.ENTER)
    WebDriverWait(browser, 5).until(lambda b: b.execute_script("return window.copied"))
    text = browser.execute_script("return window.copied")
    assert text.count("\r\n") == text.count("\n")
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def test_the_csv_is_the_whole_table_as_it_stands(tables):
    sort_button(tables, 1).click()
    order = [ROWS[i] for i in ORDERS[1]]
    assert copied(tables, ".scroll + .tools") == [
        list(HEAD),
        *([text.replace("−", "-") for text in row] for row in order),
    ]
    assert status(tables) == "Copied, 5 rows"
    button = tables.find_element("css selector", ".scroll + .tools button")
    assert button.accessible_name == "Copy as CSV: The first table"


def test_the_csv_leaves_out_marks_and_says_once_what_spans_columns(tables):
    assert copied(tables, "#marked + .tools") == [
        ["Claim", "verdict", "why"],
        ["one more words", "contradicted", "line line"],
        ["two", "supported", "a b"],
    ]
    assert copied(tables, "#spanned + .tools") == [
        ["Claim", "p", "Runs"],
        ["Students, all", "", ""],
        ["two, of them", "", "c"],
    ]


def test_without_a_clipboard_the_selection_is_copied(tables):
    tables.execute_script(NO_CLIPBOARD)
    button = tables.find_element("css selector", "#fixed + .tools button")
    button.send_keys(Keys.ENTER)
    WebDriverWait(tables, 5).until(lambda b: status(b, "fixed") == "Copied, 2 rows")
    assert not tables.find_elements("css selector", "textarea")
    assert tables.switch_to.active_element == button
    tables.execute_script("document.body.prepend(document.createElement('textarea'))")
    field = tables.find_element("css selector", "textarea")
    field.send_keys(Keys.CONTROL, "v")
    assert field.get_property("value").split() == ["Measure", "b", "a"]


def test_where_nothing_may_copy_the_text_is_there_to_be_copied(tables):
    tables.execute_script(NO_CLIPBOARD + "document.execCommand = () => false;")
    for _ in range(2):
        tables.find_element("css selector", "#fixed + .tools button").send_keys(Keys.ENTER)
        WebDriverWait(tables, 5).until(lambda b: "does not let" in status(b, "fixed"))
    (field,) = tables.find_elements("css selector", "textarea")
    assert field.get_property("value").split() == ["Measure", "b", "a"]
    assert field.accessible_name == "The table as CSV"


def test_without_javascript_the_tables_are_plain(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.as_uri())
        assert browser.find_elements("css selector", "button, .tools") == []
        assert column(browser, 0) == [row[0] for row in ROWS]
        assert browser.find_element("css selector", ".scroll").get_attribute("tabindex") == "0"
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_no_other_script_runs(browser, page, tmp_path):
    """The policy admits the page's own script alone, and no request."""
    added = "<img src='http://127.0.0.1:9/x.png'><script>document.title = 'changed'</script></main>"
    path = tmp_path / "changed.html"
    path.write_text(page.read_text().replace("</main>", added))
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert browser.title == "Tables"
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert sum("Content Security Policy" in message for message in refused) == len(refused) == 2


LONG = """
{% extends "shell.html.j2" %}{% block title %}Names{% endblock %}{% block main %}
<div class="scroll" role="region" tabindex="0" aria-label="Names"><table class="data"><thead><tr>
{% for i in range(9) %}<th scope="col"{% if i % 4 %} class="n"{% endif %}>Column {{ i }}</th>{% endfor %}
</tr></thead><tbody><tr>
{% for i in range(9) %}
{% if i % 4 %}<td class="n">76.13 ± 0.12</td>
{% else %}<td>vit_base_patch16_clip_224.openai_ft_in12k_in1k</td>{% endif %}
{% endfor %}
</tr></tbody></table></div>
{% endblock %}
"""


def test_long_names_are_broken_on_paper_not_cut(browser, tmp_path):
    path = tmp_path / "long.html"
    path.write_text(environment().from_string(LONG).render())
    width = 182 * 96 // 25.4  # mm of A4 between the margins
    size = {"width": int(width), "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.get(path.as_uri())
    cells = browser.find_elements("css selector", "tbody td")
    assert max(cell.rect["x"] + cell.rect["width"] for cell in cells) <= width + 1
    assert min(cell.rect["width"] for cell in cells) > 40
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
