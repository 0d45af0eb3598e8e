// Command lines that make an image again, quoted for a shell.

const BARE = /^[A-Za-z0-9_@%+=:,.\/-]+$/;

// One word of a command line. Characters that act are written as bytes (`$'\x1b'`, which bash and
// zsh read), so that what is copied is what is seen. Null where no command line can hold it.
function quoted(word) {
  const text = String(word);
  if (text.includes("\0")) return null;
  if (BARE.test(text)) return text;
  if (!new RegExp(ACTING.source, "u").test(text)) return `'${text.replaceAll("'", `'"'"'`)}'`;
  const bytes = (character) => Array.from(new TextEncoder().encode(character), (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  const inside = text.replace(/[\\']/g, "\\$&").replaceAll("\n", "\\n").replace(ACTING, bytes);
  return `$'${inside}'`;
}

function commandLine(words) {
  const found = words.map(quoted);
  return found.includes(null) ? null : found.join(" ");
}

// A value that begins with a hyphen would be taken for a flag.
const flag = (name, value) => (String(value).startsWith("-") ? [`${name}=${value}`] : [name, value]);

const regenCommand = (row) => commandLine(["zimage", "regen", facts.output, row.index]);

const importCommand = () => commandLine(["zimage", "gallery", facts.output, "--import-rejected", "rejected.csv"]);

function generateCommand(row) {
  const how = facts.generate;
  const notes = how.without_flag.map((key) => `${key} of the job has no flag here`);
  const found = ["zimage", "generate", ...how.model, ...flag("--prompt", row.prompt)];
  if (row.negative_prompt) found.push(...flag("--negative-prompt", row.negative_prompt));
  found.push("--seed", row.seed, "--width", row.width, "--height", row.height);
  found.push("--steps", row.num_inference_steps, "--guidance", row.guidance_scale);
  found.push("--dtype", row.dtype, "--attention", row.attention, ...how.more);
  for (const name of row.loras ? row.loras.split(",") : []) {
    if (Object.hasOwn(how.loras, name)) found.push(...flag("--lora", how.loras[name][0]), "--lora-scale", how.loras[name][1]);
    else notes.push(`the job names no adapter ${plain(name)}`);
  }
  if (row.profile_init_image) {
    const root = how.images_root === null ? "" : `${how.images_root}/`;
    found.push(...flag("--init-image", root + row.profile_init_image), "--strength", how.strength);
  }
  const extension = how.extensions[row.format] ?? "png";
  found.push("-o", `${facts.name}_${String(row.index).padStart(8, "0")}.${extension}`);
  return [commandLine(found), notes];
}
