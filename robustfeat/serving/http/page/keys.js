// Keys that work wherever no text is being written.

import { byId } from "./dom.js";
import { State, store } from "./store.js";

/** `actions` are label, accept, next, undo and redo. */
export function watchKeys({ label, accept, next, undo, redo }) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.closest("input, select, textarea")) return;
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key === "z") (event.shiftKey ? redo : undo)();
      else if (key === "y") redo();
      else if (key === "a" && store.shown.length) store.select(store.shown.filter((id) => store.images[id].state === State.READY), store.active ?? store.shown[0]);
      else return;
    } else if (/^[1-9]$/.test(key) && store.selected.size) {
      const chosen = store.classes[Number(key) - 1];
      if (chosen) label(chosen.id);
    } else if (key === "0" || key === "delete" || key === "backspace") label(null);
    else if (key === "enter" && !event.target.closest("button, a")) accept();
    else if (key === "n") next();
    else if (key === "?") byId("help").showModal();
    else return;
    event.preventDefault();
  });
}
