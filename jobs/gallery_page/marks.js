// Rejected images. The served page sends marks to the output; a page from a file offers them as CSV.

const marks = new Map(); // index to { hash, note, at }
let unsaved = false;

// A mark is of an image: it ends when the sample is made again otherwise.
const isRejected = (row) => marks.has(row.index) && marks.get(row.index).hash === row.pixels_sha256;

function takeMarks(given) {
  marks.clear();
  for (const [index, hash, note] of given) marks.set(index, { hash, note, at: null });
}

async function setMark(row, rejected, note = "") {
  if (row.status !== "ok") return;
  const before = marks.get(row.index);
  if (rejected) marks.set(row.index, { hash: row.pixels_sha256, note, at: new Date() });
  else marks.delete(row.index);
  showMark(row);
  if (facts.mode !== "served") {
    unsaved = true;
    return;
  }
  try {
    const answer = await fetch("rejected", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ index: row.index, pixels_sha256: row.pixels_sha256, note, rejected }),
    });
    if (!answer.ok) throw new Error(await answer.text());
    showProblem(null);
  } catch (error) {
    if (before === undefined) marks.delete(row.index);
    else marks.set(row.index, before);
    showMark(row);
    showProblem(`The mark could not be saved: ${error.message}`);
  }
}

function showMark(row) {
  forgetTiles([row]);
  updateValuesOfStatus();
  applyFilters();
  measure();
  renderGrid();
  if (!panel.hidden && grid.chosen === row.index) renderPanel();
  showSaving();
}

function updateValuesOfStatus() {
  const filter = filters.get("status");
  if (filter !== undefined) updateValues("status", filter);
}

function showSaving() {
  const save = document.getElementById("save-marks");
  save.hidden = facts.mode === "served" || marks.size === 0;
  save.textContent = `Download rejected.csv (${number(marks.size)})`;
}

// What a spreadsheet program would run as a formula gets an apostrophe in front.
const defused = (text) => (/^[\s\0]*[=+\-@\uff1d\uff0b\uff0d\uff20]|^[\t\r\n]/.test(text) ? `'${text}` : text);
const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function marksAsCsv() {
  const lines = ["index,pixels_sha256,note,at"];
  const time = (at) => (at ?? new Date()).toISOString().replace(/\.\d+Z$/, "+00:00");
  for (const [index, { hash, note, at }] of marks) lines.push(`${index},${hash},${cell(defused(note))},${time(at)}`);
  return `${lines.join("\n")}\n`;
}

function downloadMarks() {
  const address = URL.createObjectURL(new Blob([marksAsCsv()], { type: "text/csv" }));
  element("a", { href: address, download: "rejected.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  unsaved = false;
}
