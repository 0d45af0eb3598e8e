// The rows: unpacked from columns, and merged by index as new ones come.

const dataOf = (id) => {
  const element = document.getElementById(id);
  return element === null ? null : JSON.parse(element.textContent);
};
const facts = dataOf("facts");
const embedded = dataOf("thumbnails");

const rows = []; // in the order of their indices
const rowOf = new Map(); // index to row

function unpack(block) {
  const columns = Object.entries(block.columns);
  return Array.from({ length: block.rows }, (_, i) => {
    const row = {};
    for (const [name, { values, of, at }] of columns) row[name] = values ? values[i] : of[at[i]];
    return row;
  });
}

// Adds or replaces rows.
function merge(block) {
  const found = unpack(block);
  let ordered = true;
  for (const row of found) {
    const before = rowOf.get(row.index);
    rowOf.set(row.index, row);
    if (before === undefined) {
      ordered &&= rows.length === 0 || Number(rows.at(-1).index) < Number(row.index);
      row.place = rows.length;
      rows.push(row);
    } else {
      row.place = before.place;
      rows[row.place] = row;
    }
  }
  if (!ordered) {
    rows.sort((a, b) => Number(a.index) - Number(b.index));
    rows.forEach((row, place) => { row.place = place; });
  }
  return found.length;
}

const isImage = (row) => row.status === "ok" && !row.problem;

// Addresses are put together here, of a hash, a number or the encoded parts of a path.
function thumbnailAddress(row) {
  const name = /^[0-9a-f]{64}$/.test(row.pixels_sha256 ?? "") ? row.pixels_sha256.slice(0, 32) : null;
  if (name === null) return null;
  if (facts.mode === "served") return `thumbnail/${name}`;
  if (embedded === null) return `${facts.thumbnails}${name}.webp`;
  return Object.hasOwn(embedded, name) ? `data:image/webp;base64,${embedded[name]}` : null;
}

function imageAddress(row) {
  if (facts.mode === "served") return `image/${encodeURIComponent(row.index)}?${row.pixels_sha256}`;
  if (facts.images === null || !row.file_name) return null;
  return `./${facts.images}${row.file_name.split("/").map(encodeURIComponent).join("/")}`;
}
