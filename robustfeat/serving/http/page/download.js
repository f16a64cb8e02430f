// What leaves the page: the head as a zip file, and the predictions as a table.

import { element } from "./dom.js";
import { store } from "./store.js";

const FORMULA = /^'*[=+\-@\t\r\n]/;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/;

/** Saves a Blob as a file. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = element("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** The images as CSV: path, label, prediction, error, and the probability of each class, as `svm predict` writes them. */
export function predictionsCsv() {
  const { head } = store;
  const names = head?.classes ?? [];
  const header = ["path", "label", "prediction", "error", ...(head?.calibration ? names.map((name) => `probability:${name}`) : [])];
  const lines = [header.map(cell)];
  for (const image of store.images) {
    const { answer } = image;
    const label = image.label === null ? "" : store.className(image.label);
    const shares = head?.calibration ? names.map((_, at) => (answer?.shares ? Number(answer.shares[at].toPrecision(6)) : "")) : [];
    lines.push([...[image.path, label, answer ? store.className(answer.classId) : "", image.problem].map(guarded).map(cell), ...shares]);
  }
  return new Blob([lines.map((line) => `${line.join(",")}\n`).join("")], { type: "text/csv;charset=utf-8" });
}

/** Text that a spreadsheet would run as a formula stands behind a ', which `svm` undoes. */
function guarded(text) {
  return FORMULA.test(text) && !NUMBER.test(text) ? `'${text}` : text;
}

function cell(text) {
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
