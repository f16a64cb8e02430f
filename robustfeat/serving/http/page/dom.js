// Elements by id, new elements, and words about numbers. Text is only ever set as text.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element. Properties are attributes, but for `text`, `on` (listeners) and `data` (dataset). */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "text") made.textContent = value;
    else if (key === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (key === "data") Object.assign(made.dataset, value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** "1 image", "2,000 images". */
export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

export const percent = (share) => `${Math.round(100 * share)} %`;

/** Text in which nothing turns the direction of what is read: a name must not look like another one. */
export const visible = (text) => text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

/** A name without its folders. */
export const baseName = (path) => path.slice(path.lastIndexOf("/") + 1);

let clearing = 0;

/** Tells screen readers. */
export function announce(text) {
  const status = byId("status");
  status.textContent = status.textContent === text ? `${text}\u00a0` : text;
}

/** Shows a line for some seconds, and tells screen readers. */
export function toast(text, seconds = 6) {
  const line = byId("toast");
  line.textContent = text;
  line.hidden = false;
  announce(text);
  clearTimeout(clearing);
  clearing = setTimeout(() => { line.hidden = true; }, 1000 * seconds);
}

/** Asks; whether the answer is yes. */
export function confirm(text, yes) {
  const dialog = byId("confirm-dialog");
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});
