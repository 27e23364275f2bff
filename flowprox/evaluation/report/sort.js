// Heads of tables become buttons that sort their column; without this script the tables are as complete.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.classList.contains("text") ? "ascending" : "descending";
      const other = { ascending: "descending", descending: "ascending" };
      const order = other[head.getAttribute("aria-sort")] ?? first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const known = (value) => value !== "" && value !== "–";
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (known(x) !== known(y)) return known(x) ? -1 : 1;
        const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
        const sign = numbers ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
        return order === "descending" ? -sign : sign;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
