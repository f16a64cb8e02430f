// The card of classes: their names, how many images each has, and what was fitted.

import { baseName, byId, element, toast, visible } from "./dom.js";
import { MOST_CLASSES, State, store } from "./store.js";

const NAME = 80;

export class Classes {
  #teacher;
  #assign;

  /** `assign` labels the selected images with the class of an id. */
  constructor(teacher, assign) {
    this.#teacher = teacher;
    this.#assign = assign;
    byId("new-class").addEventListener("submit", (event) => {
      event.preventDefault();
      const input = byId("new-class-name");
      if (this.#accepts(input.value.trim())) {
        store.addClass(input.value.trim());
        input.value = "";
      }
      input.focus();
    });
  }

  /** Draws all of it. */
  draw() {
    const list = byId("classes");
    const focused = document.activeElement?.dataset?.key;
    const labelled = tally((image) => image.label);
    const predicted = tally((image) => (image.label === null ? image.answer?.classId ?? null : null));
    const current = store.active === null ? null : store.images[store.active].label;
    const possible = [...store.selected].some((id) => store.images[id].state === State.READY);
    const renaming = list.querySelector("input"); // stays until the user has finished
    if (!renaming) list.replaceChildren(...store.classes.map((one, at) => this.#row(one, at, {
      labelled: labelled.get(one.id) ?? 0, predicted: predicted.get(one.id) ?? 0, current: current === one.id, possible,
    })));
    if (focused) list.querySelector(`[data-key="${focused}"]`)?.focus();
    byId("teach-hint").textContent = hint(this.#teacher);
    byId("teach-hint").hidden = !byId("teach-hint").textContent;
    byId("fit-state").textContent = this.#teacher.busy ? "Fitting…" : this.#teacher.state;
    byId("fit-state").classList.toggle("busy", this.#teacher.busy);
    byId("results").hidden = !store.head;
    byId("undo").disabled = !store.canUndo;
    byId("redo").disabled = !store.canRedo;
    byId("new-class").hidden = store.classes.length >= MOST_CLASSES;
  }

  #row(one, at, { labelled, predicted, current, possible }) {
    const shown = store.shownName(one.id);
    const said = [labelled ? `${labelled} labelled` : "", predicted ? `${predicted} predicted` : ""].filter(Boolean).join(", ");
    const assign = element("button", {
      type: "button", class: "assign", "aria-pressed": current, data: { key: `assign-${one.id}` },
      disabled: !possible, on: { click: () => this.#assign(one.id) },
      "aria-label": `Label as ${shown}${said ? `; ${said}` : ""}`,
    },
    at < 9 ? element("kbd", { text: at + 1 }) : element("kbd", { class: "more", text: "·" }),
    element("i", { class: "dot", data: { class: at % 9 + 1 } }),
    element("bdi", { class: "text", text: shown }),
    element("span", { class: "counts", title: said }, labelled ? element("b", { text: `${labelled} ✓` }) : "", predicted ? element("span", { text: predicted }) : ""));
    const edit = element("button", {
      type: "button", class: "icon", text: "✎", "aria-label": `Rename ${shown}`, data: { key: `edit-${one.id}` },
      on: { click: (event) => this.#rename(one, event.target.closest("li")) },
    });
    const remove = element("button", {
      type: "button", class: "icon", text: "×", "aria-label": `Remove ${shown}`, data: { key: `remove-${one.id}` },
      on: { click: () => { store.removeClass(one.id); toast(`${shown.slice(0, 40)} was removed; Undo brings it back.`); byId("new-class-name").focus(); } },
    });
    return element("li", {}, assign, edit, remove);
  }

  #rename(one, row) {
    const input = element("input", { type: "text", maxlength: NAME, "aria-label": `New name of ${store.shownName(one.id)}` });
    input.value = one.name;
    let done = false;
    const finish = (accepted) => {
      if (done) return;
      done = true;
      const name = input.value.trim();
      if (accepted && name !== one.name && this.#accepts(name)) store.renameClass(one.id, name);
      input.remove();
      this.draw();
      byId("classes").querySelector(`[data-key="edit-${one.id}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault(); // Enter would press the button that gets the focus
      finish(event.key === "Enter");
    });
    input.addEventListener("blur", () => finish(true));
    row.replaceChildren(input);
    input.select();
  }

  #accepts(name) {
    if (!name || /\p{Cc}/u.test(name)) {
      if (name) toast("A name of a class has no control characters.");
      return false;
    }
    if (store.classes.some((one) => one.name === name)) {
      toast(`There is a class of the name ${visible(name).slice(0, 40)} already.`);
      return false;
    }
    return true;
  }
}

function tally(classOf) {
  const found = new Map();
  for (const image of store.images) {
    const id = classOf(image);
    if (id !== null) found.set(id, (found.get(id) ?? 0) + 1);
  }
  return found;
}

function hint(teacher) {
  if (store.classes.length < 2) return "Name two or more classes that you want to tell apart.";
  if (!teacher.rows.length) return "Select an image, then click its class or press its number.";
  if (!teacher.possible) return `Now label an image of another class than ${store.shownName(teacher.rows[0].label).slice(0, 40)}.`;
  return "";
}

/** A name for files: only what is safe in every file system and on every command line. */
export function safeName(name) {
  const safe = baseName(name).normalize("NFKD").replace(/[^A-Za-z0-9_.-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 60);
  return safe.replace(/[-.]+$/, "") || "head";
}

