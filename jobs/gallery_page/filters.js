// Which rows are shown: words of the prompt, and a filter for each column that has different values.

const FEW = 24; // values of a column that are listed
const SHOWN = 8; // of which so many at once
const MOST_COLUMNS = 60;
const NONE = "\u2014";

// Columns that are computed from a row, besides the row's own.
const COMPUTED = {
  status: (row) => (row.status === "ok" && isRejected(row) ? "rejected" : row.status),
  size,
};
const MAKING = [
  "error_type", "size", "loras", "num_inference_steps", "guidance_scale", "model", "dtype",
  "attention", "batch_mode", "device", "node",
];
const valueOf = (row, column) => (column in COMPUTED ? COMPUTED[column](row) : row[column]) ?? null;

const filters = new Map(); // column to { kind, chosen, text, group, values }
let words = [];
let shownRows = [];

// --- what a field of numbers or of text asks for

function parseRanges(text) {
  const ranges = [];
  for (const piece of text.split(",").map((p) => p.trim()).filter((p) => p !== "")) {
    const match = /^(-?\d+(?:\.\d+)?)(?:\s*(?:-|\.\.|\u2013)\s*(-?\d+(?:\.\d+)?))?$/.exec(piece);
    if (match === null) return null;
    ranges.push({ text: match[1], low: Number(match[1]), high: Number(match[2] ?? match[1]), one: match[2] === undefined });
  }
  return ranges;
}

// Long seeds are text, since JavaScript has no such integers; alone they are compared as text.
const inRanges = (value, ranges) =>
  value !== null &&
  ranges.some((r) => (r.one && String(value) === r.text) ||
    (!(r.one && typeof value === "string") && r.low <= Number(value) && Number(value) <= r.high));

function testOf(column, filter) {
  if (filter.kind === "few") {
    if (filter.chosen.size === 0) return null;
    return (row) => filter.chosen.has(valueOf(row, column));
  }
  const text = filter.text.trim();
  if (text === "") return null;
  if (filter.kind === "number") {
    const ranges = parseRanges(text);
    filter.input.setAttribute("aria-invalid", String(ranges === null));
    return ranges === null ? null : (row) => inRanges(valueOf(row, column), ranges);
  }
  const wanted = searchable(text);
  return (row) => searchable(valueOf(row, column)).includes(wanted);
}

// --- applying

function applyFilters() {
  for (const filter of filters.values()) {
    filter.counts = new Map();
    filter.input?.removeAttribute("aria-invalid");
  }
  const tests = [];
  for (const [column, filter] of filters) {
    const test = testOf(column, filter);
    if (test !== null) tests.push([filter, test]);
  }
  const listed = [...filters].filter(([, filter]) => filter.kind === "few");
  shownRows = [];
  for (const row of rows) {
    row.words ??= searchable(row.prompt);
    if (!words.every((word) => row.words.includes(word))) continue;
    let failing = null;
    let count = 0;
    for (const [filter, test] of tests) {
      if (!test(row)) { failing = filter; count += 1; if (count > 1) break; }
    }
    if (count > 1) continue;
    if (count === 0) shownRows.push(row);
    // Numbers beside values say what would be found: all other filters hold, their own does not.
    for (const [column, filter] of listed) {
      if (count === 1 && filter !== failing) continue;
      const value = valueOf(row, column);
      filter.counts.set(value, (filter.counts.get(value) ?? 0) + 1);
    }
  }
  const order = document.getElementById("order").value;
  if (order === "newest") {
    shownRows.sort((a, b) => (a.created_at < b.created_at ? 1 : a.created_at > b.created_at ? -1 : a.place - b.place));
  } else if (order === "slowest") {
    shownRows.sort((a, b) => (b.seconds ?? -1) - (a.seconds ?? -1) || a.place - b.place);
  }
  showCounts(tests.length > 0 || words.length > 0);
}

function showCounts(filtered) {
  const count = document.getElementById("count");
  const all = rows.length;
  count.textContent = filtered ? `${number(shownRows.length)} of ${number(all)}` : `${number(all)} samples`;
  document.getElementById("clear").hidden = !filtered;
  for (const filter of filters.values()) {
    for (const [value, line] of filter.values ?? []) {
      const found = filter.counts.get(value) ?? 0;
      line.querySelector(".number").textContent = number(found);
      line.classList.toggle("none", found === 0);
    }
  }
  const empty = document.getElementById("empty");
  empty.hidden = shownRows.length > 0;
  empty.textContent = all > 0 ? "Nothing fits all filters." : "No image is there yet.";
}

// --- the groups

function describeColumns() {
  const profiles = new Set();
  for (const row of rows) {
    for (const name in row) if (name.startsWith("profile_")) profiles.add(name);
  }
  const described = [["status", "few"], ["index", "number"], ["seed", "number"]];
  const add = (column, heading) => {
    const values = new Set();
    let numbers = true;
    for (const row of rows) {
      const value = valueOf(row, column);
      values.add(value);
      numbers &&= value === null || typeof value === "number";
    }
    if (values.size < 2) return;
    described.push([column, values.size <= FEW ? "few" : numbers ? "number" : "text", heading]);
  };
  [...profiles].slice(0, MOST_COLUMNS).forEach((column) => add(column, "Profile"));
  MAKING.forEach((column) => add(column, "Making"));
  return described;
}

// Brings the groups in line with the rows; what is chosen stays.
function updateGroups() {
  const parent = document.getElementById("groups");
  const described = describeColumns();
  const named = new Set(described.map(([column]) => column));
  for (const [column, filter] of filters) {
    if (!named.has(column)) { filter.group.remove(); filters.delete(column); }
  }
  parent.querySelectorAll("h2.part").forEach((heading) => heading.remove());
  let last = null;
  for (const [column, kind, heading] of described) {
    let filter = filters.get(column);
    if (filter === undefined || filter.kind !== kind) {
      filter?.group.remove();
      filter = { kind, chosen: new Set(), text: "", values: kind === "few" ? new Map() : null, all: false };
      filters.set(column, filter);
      filter.group = kind === "few" ? listGroup(column) : fieldGroup(column, filter);
    }
    if (heading !== undefined && heading !== last) {
      parent.append(element("h2", { class: "part", textContent: heading }));
      last = heading;
    }
    if (filter.group.parentNode !== parent || last !== null) parent.append(filter.group);
    if (kind === "few") updateValues(column, filter);
  }
}

const listGroup = (column) => element("fieldset", {}, element("legend", {}, isolated(label(column))));

function fieldGroup(column, filter) {
  filter.input = element("input", {
    type: "search",
    placeholder: filter.kind === "number" ? "12, 20-30" : "contains",
    autocomplete: "off",
    spellcheck: false,
    "aria-label": plain(label(column)),
    oninput: () => { filter.text = filter.input.value; changed(); },
  });
  const half = column === "index" || column === "seed" ? "half" : "";
  return element("fieldset", { class: half }, element("legend", {}, isolated(label(column))), filter.input);
}

function updateValues(column, filter) {
  const found = new Map();
  for (const row of rows) {
    const value = valueOf(row, column);
    found.set(value, (found.get(value) ?? 0) + 1);
  }
  if (column === "status") for (const name of ["ok", "failed", "rejected"]) if (!found.has(name)) found.set(name, 0);
  const byNumber = [...found.keys()].every((value) => value === null || typeof value === "number");
  const ordered = [...found].sort((a, b) => (a[0] === null) - (b[0] === null) || (byNumber ? a[0] - b[0] : b[1] - a[1]));
  if (column === "status") ordered.sort((a, b) => a[0].length - b[0].length);
  filter.group.querySelector(".link")?.remove();
  ordered.forEach(([value], place) => {
    let line = filter.values.get(value);
    if (line === undefined) {
      const box = element("input", {
        type: "checkbox",
        onchange: () => {
          if (box.checked) filter.chosen.add(value);
          else filter.chosen.delete(value);
          changed();
        },
      });
      const shown = isolated(value === null || value === "" ? NONE : value);
      line = element("label", { class: "value", title: plain(value ?? "") }, box, shown, element("span", { class: "number" }));
      filter.values.set(value, line);
    }
    line.hidden = place >= SHOWN && !filter.all && !filter.chosen.has(value);
    filter.group.append(line);
  });
  if (ordered.length > SHOWN && !filter.all) {
    filter.group.append(element("button", {
      type: "button",
      class: "link",
      textContent: `Show all ${ordered.length}`,
      onclick: () => { filter.all = true; updateValues(column, filter); },
    }));
  }
}

function clearFilters() {
  document.getElementById("words").value = "";
  words = [];
  for (const filter of filters.values()) {
    filter.chosen.clear();
    filter.text = "";
    filter.group.querySelectorAll("input").forEach((input) => {
      if (input.type === "checkbox") input.checked = false;
      else input.value = "";
    });
  }
  changed();
}
