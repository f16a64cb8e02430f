// Files that are dropped, chosen or pasted; folders are looked through.

import { byId, count, toast } from "./dom.js";
import { MOST_IMAGES, store } from "./store.js";

const SUFFIX = /\.(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf])$/i;
let pasted = 0;

/** Calls `added` with the images of every drop, choice and paste. */
export function watchFiles(added) {
  const take = (found) => {
    const images = found.filter(({ file }) => file.type.startsWith("image/") || SUFFIX.test(file.name));
    const before = store.images.length;
    const fresh = store.add(images);
    const notes = [];
    if (found.length > images.length) notes.push(`${count(found.length - images.length, "file")} left out: no images.`);
    const known = images.length - fresh.length;
    if (before + images.length > MOST_IMAGES && known) notes.push(`This page holds at most ${count(MOST_IMAGES, "image")}.`);
    else if (known) notes.push(`${count(known, "image")} ${known === 1 ? "is" : "are"} here already.`);
    if (!found.length) notes.push("There is no file in what was dropped.");
    if (notes.length) toast(notes.join(" "));
    if (fresh.length) added(fresh);
  };
  watchDrops(take);
  watchChoices(take);
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    take(files.map((file) => ({ file, path: file.name === "image.png" ? `pasted-${(pasted += 1)}.png` : file.name })));
  });
}

function watchDrops(take) {
  const overlay = byId("overlay");
  let depth = 0;
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  const show = (to) => { depth = to; overlay.hidden = depth <= 0; };
  addEventListener("dragenter", (event) => { if (holdsFiles(event)) { event.preventDefault(); show(depth + 1); } });
  addEventListener("dragleave", (event) => { if (holdsFiles(event)) show(depth - 1); });
  addEventListener("dragover", (event) => { if (holdsFiles(event)) event.preventDefault(); });
  addEventListener("drop", async (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    show(0);
    // Entries must be taken at once: the list is empty after the first wait.
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const plain = [...event.dataTransfer.files];
    take(entries.length ? await walk(entries) : plain.map((file) => ({ file, path: file.name })));
  });
}

async function walk(entries) {
  const found = [];
  const waiting = [...entries];
  while (waiting.length && found.length < 2 * MOST_IMAGES) {
    const entry = waiting.shift();
    if (entry.name.startsWith(".")) continue;
    try {
      if (entry.isDirectory) waiting.push(...(await children(entry)));
      else found.push({ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), path: entry.fullPath.slice(1) });
    } catch {
      toast(`${entry.name} cannot be read.`);
    }
  }
  return found.sort((a, b) => (a.path < b.path ? -1 : 1));
}

async function children(folder) {
  const reader = folder.createReader();
  const found = [];
  for (;;) { // a hundred at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return found;
    found.push(...some);
  }
}

function watchChoices(take) {
  for (const name of ["files", "folder"]) {
    const input = byId(name);
    input.addEventListener("change", () => {
      const files = [...input.files].filter((file) => !file.name.startsWith("."));
      if (files.length) take(files.map((file) => ({ file, path: file.webkitRelativePath || file.name })));
      input.value = "";
    });
  }
  const choose = () => byId("files").click();
  byId("choose").addEventListener("click", choose);
  byId("add").addEventListener("click", choose);
  byId("choose-folder").addEventListener("click", () => byId("folder").click());
}
