// The chosen sample beside the grid: its image, what it was made from, and how to make it again.

const panel = document.getElementById("panel");

function openPanel() {
  if (rowOf.get(grid.chosen) === undefined) return;
  panel.hidden = false;
  renderPanel();
  relayout();
}

function closePanel() {
  panel.hidden = true;
  panel.replaceChildren();
  relayout();
  grid.scroll.focus();
}

function relayout() {
  measure();
  reveal(placeOfChosen());
  renderGrid();
}

function renderPanel() {
  const row = rowOf.get(grid.chosen);
  if (row === undefined) return;
  panel.scrollTop = 0;
  panel.replaceChildren(
    panelHead(row),
    row.status === "ok" ? picture(row) : causeBox(row),
    ...(row.status === "ok" ? [underPicture(row)] : []),
    ...section("Prompt", row.prompt === "" ? null : isolated(row.prompt, { className: "prose" })),
    ...section("Negative prompt", row.negative_prompt ? isolated(row.negative_prompt, { className: "prose" }) : null),
    ...section("Profile", list(profileOf(row))),
    ...section("Settings", list(settingsOf(row))),
    ...section("Hashes", row.sha256 ? list([["file", row.sha256], ["pixels", row.pixels_sha256]], "hash") : null),
    ...section("Make it again", commandsOf(row)),
  );
}

const button = (name, words, onclick, properties = {}) =>
  element("button", { type: "button", textContent: name, title: words, "aria-label": words, onclick, ...properties });

function panelHead(row) {
  const place = placeOfChosen();
  return element("div", { class: "panel-head" },
    element("h2", { textContent: `Sample ${row.index}` }),
    button("\u2039", "The one before (\u2190)", () => move(-1), { disabled: place <= 0 }),
    button("\u203a", "The next one (\u2192)", () => move(1), { disabled: place < 0 || place >= shownRows.length - 1 }),
    button("\u00d7", "Close (Esc)", closePanel));
}

function picture(row) {
  if (row.problem) return causeBox({ error_type: "cannot be shown", error_message: row.problem });
  const full = imageAddress(row);
  const small = thumbnailAddress(row);
  const image = element("img", { alt: plain(`Sample ${row.index}: ${row.prompt}`).slice(0, 300), width: row.width, height: row.height });
  if (full === null) image.src = small ?? "";
  else {
    if (small !== null) image.src = small; // at once, until the image itself is there
    const loading = new Image();
    loading.onload = () => { image.src = full; };
    loading.onerror = () => box.after(element("p", { class: "muted", textContent: "The image itself cannot be read; this is its thumbnail." }));
    loading.src = full;
  }
  const box = element("div", { class: "picture" }, image);
  return box;
}

function causeBox(row) {
  return element("div", { class: "cause-box" },
    element("strong", {}, isolated(row.error_type ?? "failed")),
    element("p", { class: "prose" }, isolated(row.error_message ?? "")));
}

function underPicture(row) {
  const rejected = isRejected(row);
  const note = element("input", {
    type: "text", id: "note", placeholder: "Note: what is wrong", maxLength: 500, "aria-label": "Note",
    value: rejected ? marks.get(row.index).note : "",
    onchange: () => { if (isRejected(row)) setMark(row, true, note.value); },
  });
  const full = imageAddress(row);
  return element("div", { class: "under" },
    button(rejected ? "Take back" : "Reject", rejected ? "Take the rejection back (x)" : "Reject this image (x)",
      () => setMark(row, !isRejected(row), note.value), { id: "reject", className: rejected ? "strong" : "" }),
    note,
    full === null ? null : element("a", { href: full, target: "_blank", rel: "noopener noreferrer", textContent: "Full size" }));
}

const section = (name, content) => (content === null ? [] : [element("h3", { textContent: name }), content]);

function list(pairs, kind = "") {
  if (pairs.length === 0) return null;
  const parts = pairs.flatMap(([name, value]) => [
    element("dt", {}, isolated(name)),
    element("dd", { class: kind }, isolated(value)),
  ]);
  return element("dl", { class: "facts" }, ...parts);
}

const profileOf = (row) =>
  Object.keys(row)
    .filter((name) => name.startsWith("profile_") && row[name] !== null)
    .map((name) => [label(name), row[name]]);

function settingsOf(row) {
  const settings = [
    ["size", size(row)],
    ["seed", row.seed],
    ["steps", row.num_inference_steps],
    ["guidance", row.guidance_scale],
    ["loras", row.loras],
    ["model", row.model],
    ["dtype", row.dtype],
    ["attention", row.attention],
    ["batch", row.batch_mode],
    ["file", row.bytes === null || row.bytes === undefined ? null : `${row.format}, ${number(row.bytes)} bytes`],
    ["made in", row.seconds === null || row.seconds === undefined ? null : `${row.seconds.toPrecision(3)} s`],
    ["made at", row.created_at],
    ["made on", [row.device, row.node].filter(Boolean).join(", ")],
  ];
  return settings.filter(([, value]) => value !== null && value !== undefined && value !== "");
}

function commandsOf(row) {
  const parts = [];
  if (row.status === "failed") {
    if (facts.retry) parts.push(command(facts.retry, "all failed samples of the job"));
    return parts.length > 0 ? element("div", {}, ...parts) : null;
  }
  if (isRejected(row)) {
    if (facts.mode !== "served") parts.push(command(importCommand(), "first: the marks of this page, downloaded above, into the output"));
    parts.push(command(facts.redo, "all rejected images of the job, each with its next seed"));
  }
  parts.push(command(regenCommand(row), "the recorded batch, compared with what is stored"));
  const [line, notes] = generateCommand(row);
  const words = ["this image alone; differs in last bits where it was made in a batch", ...notes];
  parts.push(line === null ? element("p", { class: "muted", textContent: "The prompt holds a NUL, which no command line can." }) : command(line, words.join("; ")));
  return element("div", {}, ...parts);
}

function command(line, words) {
  const copy = button("Copy", "Copy the command", async () => {
    try {
      await navigator.clipboard.writeText(line);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // no right to the clipboard: Ctrl-C does it
      copy.textContent = "Ctrl-C";
    }
  });
  const text = element("pre", {}, isolated(line));
  return element("div", { class: "command" }, element("p", { class: "muted", textContent: words }), element("div", { class: "command" }, text, copy));
}
