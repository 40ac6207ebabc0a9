// A click on a column's head sorts its table: up, down, as printed. Only rows of one data-group are mixed: families of
// one version and device are, anything else stays under its heading.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const bodies = [...table.tBodies];
  const printed = bodies.map((body) => [...body.rows]);

  function restore() {
    bodies.forEach((body, i) => body.append(...printed[i]));
    for (const row of table.querySelectorAll("tr.family")) row.hidden = row.classList.contains("group");
  }

  function plain(body) {
    return [...body.rows].filter((row) => !row.classList.contains("family"));
  }

  function compare(column, sign) {
    return (a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      const [u, v] = [x.dataset.value, y.dataset.value];
      if (u !== undefined && v !== undefined) return sign * (u - v);
      // What is missing, or no number among numbers, comes last whichever way.
      const rank = (cell) => (cell.dataset.value !== undefined ? 0 : cell.textContent === "-" ? 2 : 1);
      return rank(x) - rank(y) || sign * x.textContent.localeCompare(y.textContent, "en", { numeric: true });
    };
  }

  function sort(column, sign) {
    restore();
    const groups = new Map();
    for (const body of bodies) {
      const group = body.dataset.group ?? body;
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(body);
    }
    for (const members of groups.values()) {
      members[0].append(...members.flatMap(plain).sort(compare(column, sign)));
      if (members.length === 1) continue;
      for (const row of members.flatMap((body) => [...body.rows])) {
        if (row.classList.contains("family")) row.hidden = !row.classList.contains("group");
      }
    }
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      if (next === "none") restore();
      else sort(column, next === "ascending" ? 1 : -1);
    });
  });
}

// A click on a figure, or Enter, shows it as large as the window; Escape or another click closes it.
const dialog = document.querySelector("dialog");
const [place, words] = [dialog.querySelector(".plot"), dialog.querySelector("p")];
for (const plot of document.querySelectorAll("figure .plot")) {
  plot.tabIndex = 0;
  plot.setAttribute("role", "button");
  plot.setAttribute("aria-label", "Enlarge: " + plot.firstElementChild.getAttribute("aria-label"));
  plot.addEventListener("click", () => {
    place.replaceChildren(plot.firstElementChild.cloneNode(true));
    words.textContent = plot.nextElementSibling.textContent;
    dialog.showModal();
  });
  plot.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    plot.click();
  });
}
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => place.replaceChildren());

// On a narrow screen the contents start folded.
if (matchMedia("(max-width: 69.99rem)").matches) document.querySelector("nav details").open = false;
