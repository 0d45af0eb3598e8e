// The page comes to life: rows, keys, and new rows while it is served.

const POLL = 3000; // milliseconds
const TYPING = 80;

let soon = 0;

// Filters or rows changed: everything that follows from them, a moment later.
function changed() {
  clearTimeout(soon);
  soon = setTimeout(() => { applyFilters(); measure(); renderGrid(); if (!panel.hidden) renderPanelHead(); }, TYPING);
}

function renderPanelHead() {
  const row = rowOf.get(grid.chosen);
  if (row !== undefined) panel.querySelector(".panel-head")?.replaceWith(panelHead(row));
}

function showProblem(words) {
  const place = document.getElementById("problem");
  place.hidden = !words;
  place.replaceChildren(words ? isolated(words) : "");
}

function showProgress() {
  const { planned, ok, failed, state } = facts;
  if (planned === undefined) return;
  const made = ok === planned ? `${number(ok)} images` : `${number(ok)} of ${number(planned)} images`;
  const parts = [made, failed > 0 ? `${number(failed)} failed` : "", state === "complete" ? "" : state];
  document.getElementById("progress").textContent = parts.filter(Boolean).join(" \u00b7 ");
}

function showRows() {
  updateGroups();
  applyFilters();
  measure();
  renderGrid();
}

// --- keys

const KEYS = {
  ArrowLeft: () => move(-1),
  ArrowRight: () => move(1),
  ArrowUp: () => move(-grid.columns),
  ArrowDown: () => move(grid.columns),
  PageUp: () => move(-grid.columns * linesOfPage()),
  PageDown: () => move(grid.columns * linesOfPage()),
  Home: () => move(-shownRows.length),
  End: () => move(shownRows.length),
  Enter: openPanel,
  Escape: () => { if (!panel.hidden) closePanel(); },
  "/": () => document.getElementById("words").focus(),
  "?": () => document.getElementById("help").showModal(),
  x: () => { const row = rowOf.get(grid.chosen); if (row !== undefined) setMark(row, !isRejected(row), isRejected(row) ? "" : document.getElementById("note")?.value ?? ""); },
};
const linesOfPage = () => Math.max(1, Math.floor(grid.scroll.clientHeight / lineHeight()));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
  const { target, key } = event;
  if (target.matches("input:not([type=checkbox]):not([type=range]), select, textarea")) {
    if (key === "Escape" || (key === "Enter" && target.id !== "order")) { target.blur(); grid.scroll.focus(); event.preventDefault(); }
    return;
  }
  if (target.matches("button, a, input") && (key === "Enter" || key.startsWith("Arrow") && target.type === "range")) return;
  if (!Object.hasOwn(KEYS, key)) return;
  event.preventDefault();
  KEYS[key]();
});

// --- new rows of a page that is served

let after = 0;
let marksSeen = 0;

async function poll() {
  try {
    for (let more = true; more;) {
      const answer = await fetch(`rows?after=${after}&marks=${marksSeen}`);
      if (!answer.ok) throw new Error(await answer.text());
      const news = await answer.json();
      more = news.more;
      after = news.after;
      const { rows: block, rejected, marks: seen, problem, ...progress } = news;
      Object.assign(facts, progress);
      if (rejected !== undefined && seen !== marksSeen) takeMarks(rejected);
      const remade = merge(block);
      if (remade > 0 || seen !== marksSeen) {
        if (seen !== marksSeen) forgetTiles();
        marksSeen = seen;
        showRows();
        if (grid.chosen === null && rows.length > 0) choose(rows[0].index);
      }
      showProgress();
      showProblem(problem);
    }
  } catch (error) {
    const gone = error instanceof TypeError;
    showProblem(gone ? "No answer: zimage gallery --serve has ended, or this machine is not reached." : error.message);
  }
  setTimeout(poll, POLL);
}

// --- start

document.getElementById("name").append(isolated(facts.name));
document.getElementById("words").oninput = (event) => {
  words = searchable(event.target.value).split(/\s+/).filter(Boolean);
  changed();
};
document.getElementById("order").onchange = changed;
document.getElementById("size").oninput = relayout;
document.getElementById("clear").onclick = clearFilters;
document.getElementById("help-open").onclick = KEYS["?"];
document.getElementById("save-marks").onclick = downloadMarks;
document.getElementById("filters-toggle").onclick = (event) => {
  const open = document.getElementById("filters").classList.toggle("open");
  event.target.setAttribute("aria-expanded", String(open));
};
document.getElementById("help-marks").textContent = facts.mode === "served"
  ? "Rejected images are kept in rejected.csv of the output."
  : "Rejected images can be downloaded as rejected.csv; zimage gallery OUTPUT --import-rejected rejected.csv takes them over.";
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
grid.scroll.addEventListener("scroll", renderGrid, { passive: true });
new ResizeObserver(() => { measure(); renderGrid(); }).observe(grid.scroll);

showProgress();
grid.scroll.focus({ preventScroll: true });
if (facts.mode === "served") {
  showRows();
  poll();
} else {
  takeMarks(facts.rejected);
  merge(dataOf("rows"));
  showRows();
  showSaving();
  choose(rows[0].index);
}
