// The grid: only tiles near the window are in the document, however many rows there are.

const GAP = 14;
const CAPTION = 24;
const AROUND = 2; // rows of tiles above and below the window

const grid = {
  scroll: document.getElementById("scroll"),
  canvas: document.getElementById("canvas"),
  tiles: new Map(), // row to its tile
  columns: 1,
  side: 0,
  chosen: null, // the index of a sample
};

function placeOfChosen() {
  const row = grid.chosen === null ? undefined : rowOf.get(grid.chosen);
  return row === undefined ? -1 : shownRows.indexOf(row);
}

function measure() {
  const style = getComputedStyle(grid.scroll);
  const width = grid.scroll.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const wanted = Number(document.getElementById("size").value);
  grid.columns = Math.max(1, Math.floor((width + GAP) / (wanted + GAP)));
  grid.side = Math.floor((width - GAP * (grid.columns - 1)) / grid.columns);
  const lines = Math.ceil(shownRows.length / grid.columns);
  grid.canvas.style.height = `${Math.max(0, lines * lineHeight() - GAP)}px`;
}

const lineHeight = () => grid.side + CAPTION + GAP;

function renderGrid() {
  const first = Math.max(0, Math.floor(grid.scroll.scrollTop / lineHeight()) - AROUND);
  const last = Math.ceil((grid.scroll.scrollTop + grid.scroll.clientHeight) / lineHeight()) + AROUND;
  const start = first * grid.columns;
  const near = new Map();
  shownRows.slice(start, last * grid.columns).forEach((row, i) => near.set(row, start + i));
  for (const [row, tile] of grid.tiles) {
    if (!near.has(row)) { tile.remove(); grid.tiles.delete(row); }
  }
  for (const [row, place] of near) {
    let tile = grid.tiles.get(row);
    if (tile === undefined) {
      tile = makeTile(row);
      grid.tiles.set(row, tile);
      grid.canvas.append(tile);
    }
    const x = (place % grid.columns) * (grid.side + GAP);
    const y = Math.floor(place / grid.columns) * lineHeight();
    tile.style.transform = `translate(${x}px, ${y}px)`;
    tile.style.width = `${grid.side}px`;
    tile.firstChild.style.height = `${grid.side}px`;
    tile.setAttribute("aria-posinset", place + 1);
    tile.setAttribute("aria-setsize", shownRows.length);
    tile.setAttribute("aria-selected", String(row.index === grid.chosen));
  }
  const chosen = grid.tiles.get(rowOf.get(grid.chosen));
  if (chosen === undefined) grid.scroll.removeAttribute("aria-activedescendant");
  else grid.scroll.setAttribute("aria-activedescendant", chosen.id);
}

function makeTile(row) {
  const frame = element("div", { class: "frame" });
  const kind = row.status === "ok" ? (row.problem ? "broken" : "") : "failed";
  const tile = element("div", { class: `tile ${kind}`, role: "option", id: `tile-${row.index}` }, frame);
  tile.onclick = () => { choose(row.index); openPanel(); };
  const words = kind === "" ? row.prompt : `${row.error_type ?? "cannot be shown"}: ${row.error_message ?? row.problem ?? ""}`;
  tile.setAttribute("aria-label", plain(`${row.index}: ${words}`).slice(0, 300));
  if (kind === "") {
    const address = thumbnailAddress(row);
    const image = element("img", { alt: "", decoding: "async", draggable: false });
    image.onerror = () => { tile.classList.add("broken"); frame.replaceChildren(...failure("cannot be shown", "see zimage verify")); };
    if (address !== null) image.src = address;
    frame.append(image);
    if (isRejected(row)) {
      tile.classList.add("rejected");
      frame.append(element("span", { class: "badge", textContent: "rejected" }));
    }
  } else {
    frame.append(...failure(row.error_type ?? "cannot be shown", row.error_message ?? row.problem ?? ""));
  }
  tile.append(element("div", { class: "caption" }, element("span", { textContent: row.index }), isolated(row.prompt.slice(0, 80))));
  tile.title = plain(row.prompt).slice(0, 600);
  return tile;
}

const failure = (cause, message) => [
  element("span", { class: "cause" }, isolated(cause)),
  element("span", { class: "message" }, isolated(message.split("\n")[0])),
];

// Makes tiles anew whose row's state changed; without an argument all of them.
function forgetTiles(only = grid.tiles.keys()) {
  for (const row of [...only]) {
    grid.tiles.get(row)?.remove();
    grid.tiles.delete(row);
  }
}

function choose(index) {
  grid.chosen = index;
  reveal(placeOfChosen());
  renderGrid();
  if (!panel.hidden) renderPanel();
}

function reveal(place) {
  if (place < 0) return;
  const pad = parseFloat(getComputedStyle(grid.scroll).paddingTop);
  const top = Math.floor(place / grid.columns) * lineHeight() + pad;
  const { scrollTop, clientHeight } = grid.scroll;
  if (top - pad < scrollTop) grid.scroll.scrollTop = top - pad;
  else if (top + lineHeight() > scrollTop + clientHeight) grid.scroll.scrollTop = top + lineHeight() - clientHeight;
}

function move(by) {
  if (shownRows.length === 0) return;
  const place = placeOfChosen();
  const next = place < 0 ? 0 : Math.min(shownRows.length - 1, Math.max(0, place + by));
  choose(shownRows[next].index);
}
