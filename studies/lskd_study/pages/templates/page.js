"use strict";
// Makes every table of class "data" sort and copy as CSV; without this script the page is whole all the same.
// A cell may name what it sorts by in data-value. data-fixed on a table: its rows have an order of their own,
// so it only copies; it alone may have cells over several columns.
(() => {
  const NUMBER = /^[<>≤≥≈±]?\s*([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?)/i;
  const ABSENT = /^[–—-]?$/;

  // A cell's text: no marks that are only for the eye, one line.
  function text(cell) {
    if (cell.nodeType === Node.TEXT_NODE) return cell.data;
    if (cell.nodeType !== Node.ELEMENT_NODE || cell.getAttribute("aria-hidden") === "true") return "";
    const inside = [...cell.childNodes].map(text).join("");
    return /^(BR|LI|P|DIV|SPAN)$/.test(cell.tagName) ? ` ${inside} ` : inside;
  }
  const line = cell => text(cell).replace(/\s+/g, " ").replace(/ ([.,;:)])/g, "$1").trim();

  function number(words) {
    const plain = words.replace(/\u2212/g, "-").trim();
    const found = NUMBER.exec(plain);
    return found && /\d/.test(found[1]) ? Number(found[1].replace(/,/g, "")) : NaN;
  }

  const bodyRows = table => [...table.tBodies].flatMap(body => [...body.rows]);

  // RFC 4180. A true minus sign becomes the one that programs read as a number. What stands over several columns
  // is said in the first.
  function csv(table) {
    const quoted = words => (/[",\n]/.test(words) ? `"${words.replace(/"/g, '""')}"` : words);
    const value = cell => quoted(line(cell).replace(/\u2212(?=\d|\.)/g, "-")) + ",".repeat(cell.colSpan - 1);
    const rows = [...table.tHead.rows, ...bodyRows(table)];
    return rows.map(row => [...row.cells].map(value).join(",") + "\r\n").join("");
  }

  function sortBy(table, column, direction, original) {
    const body = table.tBodies[0];
    const rows = [...original];
    if (direction) {
      const keys = new Map(rows.map(row => {
        const cell = row.cells[column];
        return [row, cell.dataset.value ?? line(cell)];
      }));
      const there = [...keys.values()].filter(key => !ABSENT.test(key));
      const numeric = there.length > 0 && there.every(key => !Number.isNaN(number(key)));
      const compare = numeric
        ? (a, b) => number(a) - number(b)
        : (a, b) => a.localeCompare(b, "en", { numeric: true, sensitivity: "base" });
      rows.sort((first, second) => {
        const [a, b] = [keys.get(first), keys.get(second)];
        if (ABSENT.test(a) || ABSENT.test(b)) return ABSENT.test(a) - ABSENT.test(b);  // last either way
        return direction * compare(a, b);
      });
    }
    body.append(...rows);
  }

  function makeSortable(table, say) {
    const original = bodyRows(table);
    const states = { "1": "ascending", "-1": "descending" };
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const name = line(cell);
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...cell.childNodes);
      button.addEventListener("click", () => {
        const next = { ascending: -1, descending: 0 }[cell.getAttribute("aria-sort")] ?? 1;
        table.querySelectorAll("th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
        if (next) cell.setAttribute("aria-sort", states[next]);
        table.classList.toggle("sorted", next !== 0);
        sortBy(table, column, next, original);
        say(next ? `Sorted by ${name}, ${states[next]}` : "In the first order again");
      });
      cell.append(button);
    });
    table.classList.add("sorts");
  }

  async function copy(words, beside) {
    try {
      await navigator.clipboard.writeText(words);
      return true;
    } catch {
      // An old browser, or a page that may not ask: the selection's own copying, and failing that the text itself.
    }
    const field = document.createElement("textarea");
    field.value = words;
    field.readOnly = true;
    field.setAttribute("aria-label", "The table as CSV");
    beside.after(field);
    const before = document.activeElement;
    field.focus();
    field.select();
    let copied = false;
    try { copied = document.execCommand("copy"); } catch { /* the text stays on the page, selected */ }
    if (copied) {
      field.remove();
      before.focus();
    }
    return copied;
  }

  function enhance(table) {
    const tools = document.createElement("p");
    tools.className = "tools";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy as CSV";
    const region = table.closest(".scroll");
    const name = table.caption ? line(table.caption) : region && region.getAttribute("aria-label");
    if (name) button.setAttribute("aria-label", `Copy as CSV: ${name}`);
    const status = document.createElement("span");
    status.setAttribute("role", "status");
    status.setAttribute("aria-live", "polite");
    const say = words => { status.textContent = words; };
    tools.append(button, " ", status);
    (region || table).after(tools);
    button.addEventListener("click", async () => {
      if (tools.nextElementSibling instanceof HTMLTextAreaElement) tools.nextElementSibling.remove();
      const rows = bodyRows(table).length;
      const done = await copy(csv(table), tools);
      say(done ? `Copied, ${rows} ${rows === 1 ? "row" : "rows"}` : "This browser does not let the page copy; the text is selected, copy it from there");
    });
    if (bodyRows(table).length > 1 && !("fixed" in table.dataset)) makeSortable(table, say);
  }
  document.querySelectorAll("table.data").forEach(enhance);

  // A region that shows all it contains needs no stop of its own on the way of the Tab key.
  const regions = [...document.querySelectorAll(".scroll[tabindex]")];
  const stops = () => regions.forEach(region => { region.tabIndex = region.scrollWidth > region.clientWidth ? 0 : -1; });
  if ("ResizeObserver" in window) {
    const watch = new ResizeObserver(stops);
    regions.forEach(region => watch.observe(region));
  }

  // A link into what is folded away unfolds it, in browsers that do not do so themselves.
  function reveal() {
    let target = null;
    try { target = document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch { return; }
    if (!target) return;
    const folded = [];
    for (let at = target.closest("details"); at; at = at.parentElement.closest("details")) folded.push(at);
    if (!folded.some(details => !details.open)) return;
    folded.forEach(details => { details.open = true; });
    target.scrollIntoView();
  }
  window.addEventListener("hashchange", reveal);
  reveal();

  // On paper the target of a link is printed behind it, unless it is what the link says.
  document.querySelectorAll("a[href]").forEach(link => {
    if (link.textContent.trim() === link.getAttribute("href")) link.classList.add("file");
  });

  // Paper has nothing to unfold. What is marked "screen" is too long for it and stays away.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open]):not(.screen)")];
    opened.forEach(details => { details.open = true; });
  });
  window.addEventListener("afterprint", () => { opened.forEach(details => { details.open = false; }); });
})();
