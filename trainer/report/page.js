// Tables sort by a click on a heading: numbers by their exact value, largest first; text from A to Z.
for (const head of document.querySelectorAll("table.sortable tr.sort th")) {
  head.tabIndex = 0;
  const sort = () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const numeric = head.classList.contains("n");
    const up = head.ariaSort ? head.ariaSort === "descending" : !numeric;
    for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
    head.ariaSort = up ? "ascending" : "descending";
    const value = (row) => {
      const cell = row.cells[column];
      return numeric ? (cell.dataset.v === undefined ? NaN : Number(cell.dataset.v)) : cell.textContent;
    };
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (numeric && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);
      return (numeric ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
    };
    body.append(...[...body.rows].sort(compare));
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
}
// The legend hides and shows runs.
for (const chip of document.querySelectorAll("nav button")) {
  chip.addEventListener("click", () => {
    const off = chip.classList.toggle("off");
    for (const part of document.querySelectorAll(`main svg .${chip.dataset.run}`)) part.classList.toggle("hidden", off);
  });
}
