// Small pictures of images, made when they are first shown and kept as long as they are few enough.

const SIDE = 320; // pixels
const MOST = 4000;
const AT_ONCE = 4;

const kept = new Map(); // id to {url, bitmap}; the one used longest ago first
const waiting = new Map(); // id to {image, callbacks}
const making = new Map(); // id to {image, callbacks} of those in work; `forgetThumbnails` removes them
let running = 0;

/** The thumbnail of an image, {url, bitmap}; null where the browser cannot decode it. `then` gets it, perhaps at once. */
export function thumbnail(image, then) {
  const known = kept.get(image.id);
  if (known !== undefined) {
    kept.delete(image.id);
    kept.set(image.id, known);
    then(known);
    return;
  }
  const begun = making.get(image.id);
  if (begun) {
    begun.callbacks.push(then);
    return;
  }
  const entry = waiting.get(image.id) ?? { image, callbacks: [] };
  waiting.delete(image.id); // the latest wish comes first
  waiting.set(image.id, entry);
  entry.callbacks.push(then);
  work();
}

/** Forgets all of them. */
export function forgetThumbnails() {
  for (const one of kept.values()) drop(one);
  kept.clear();
  waiting.clear();
  making.clear();
}

function drop(one) {
  if (one) {
    URL.revokeObjectURL(one.url);
    one.bitmap.close();
  }
}

async function work() {
  if (running >= AT_ONCE || !waiting.size) return;
  running += 1;
  const [id, entry] = [...waiting].at(-1);
  waiting.delete(id);
  making.set(id, entry);
  let made = null;
  try {
    made = await make(entry.image.file);
  } catch { /* of another format than browsers know */ }
  if (making.get(id) === entry) {
    making.delete(id);
    keep(id, made);
    for (const then of entry.callbacks) then(made);
  } else drop(made);
  running -= 1;
  work();
}

function keep(id, made) {
  kept.set(id, made);
  if (kept.size > MOST) {
    const [oldest, one] = kept.entries().next().value;
    kept.delete(oldest);
    drop(one);
  }
}

async function make(file) {
  const whole = await createImageBitmap(file);
  const scale = Math.min(1, SIDE / Math.min(whole.width, whole.height), (2 * SIDE) / Math.max(whole.width, whole.height));
  const width = Math.max(1, Math.round(whole.width * scale));
  const height = Math.max(1, Math.round(whole.height * scale));
  const bitmap = scale < 1 ? await createImageBitmap(whole, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" }) : whole;
  if (bitmap !== whole) whole.close();
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  const blob = await canvas.convertToBlob({ type: "image/webp", quality: 0.85 });
  return { url: URL.createObjectURL(blob), bitmap };
}
