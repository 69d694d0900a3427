"use strict";

const SECONDS = { h: 3600, min: 60, s: 1 };

function sortKey(row, column) {
  const text = row.cells[column].textContent.trim().replace(/^< /, "");
  const parts = [...text.matchAll(/([\d.]+) (h|min|s)\b/g)];
  if (parts.length) return parts.reduce((sum, part) => sum + parseFloat(part[1]) * SECONDS[part[2]], 0);
  const number = parseFloat(text.replace(/,/g, "").replace("−", "-"));
  return Number.isNaN(number) ? text.toLowerCase() : number;
}

function compareKeys(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a < b ? -1 : a > b ? 1 : 0;
}

function sortBy(header) {
  const table = header.closest("table");
  const descending = header.getAttribute("aria-sort") === "ascending";
  const sign = descending ? -1 : 1;
  const rows = [...table.tBodies[0].rows];
  const column = header.cellIndex;
  rows.sort((a, b) => sign * compareKeys(sortKey(a, column), sortKey(b, column)));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  table.tBodies[0].append(...rows);
}

for (const header of document.querySelectorAll(".sortable thead th")) {
  header.tabIndex = 0;
  header.addEventListener("click", () => sortBy(header));
  header.addEventListener("keydown", (event) => {
    if (event.key === "Enter") sortBy(header);
  });
}

const search = document.getElementById("search");
if (search) {
  const rows = [...document.getElementById("listing").tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const hits = document.getElementById("hits");
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      if (!row.hidden) shown += 1;
    });
    hits.textContent = `${shown} of ${rows.length} shown`;
  });
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
