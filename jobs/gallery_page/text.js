// Text of tables and messages, shown as text: nothing here ever makes markup of a string.

// What acts instead of showing: control and format characters, as the terminal's messages have it.
const ACTING = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const HARMLESS = "\n\u200c\u200d";

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("aria-") || key === "role" || key === "for") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const escaped = (character) => `\\u{${character.codePointAt(0).toString(16).padStart(4, "0")}}`;

// An isolated piece of text in which acting characters are written out.
function isolated(text, properties = {}) {
  const made = element("bdi", { dir: "auto", ...properties });
  const shown = String(text);
  let from = 0;
  for (const match of shown.matchAll(ACTING)) {
    if (HARMLESS.includes(match[0])) continue;
    made.append(shown.slice(from, match.index));
    made.append(element("span", { class: "acting", textContent: escaped(match[0]) }));
    from = match.index + match[0].length;
  }
  made.append(shown.slice(from));
  return made;
}

// The same where only plain text can be: titles and labels.
const plain = (text) =>
  String(text).replace(ACTING, (c) => (HARMLESS.includes(c) ? c : escaped(c)));

const number = (value) => value.toLocaleString("en");
const label = (column) => column.replace(/^profile_/, "").replaceAll("_", " ");
const searchable = (text) => String(text ?? "").normalize("NFKC").toLowerCase();
const size = (row) => `${row.width} \u00d7 ${row.height}`;
