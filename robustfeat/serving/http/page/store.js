// All that the page knows: images, classes, labels, what is selected, and what can be undone.

import { visible } from "./dom.js";
import { Vectors } from "./vectors.js";

export const MOST_IMAGES = 20_000;
export const MOST_CLASSES = 50;
const MOST_UNDONE = 500;

/** Where an image is on its way. */
export const State = { WAITING: "waiting", SENT: "sent", READY: "ready", FAILED: "failed" };

class Store extends EventTarget {
  images = []; // {id, file, path, shown (the path as text to read), state, problem, passing, label, answer}; id is the place in this array
  classes = []; // {id, name}
  vectors = new Vectors();
  selected = new Set();
  active = null; // the selected image that keys and the panel are about
  head = null;
  shown = []; // ids of the images that the grid shows, in its order
  #done = [];
  #undone = [];
  #classId = 0;
  #changes = new Set();

  /** Tells listeners of "change" in the next frame: images, labels, answers, selection or order. */
  changed(...kinds) {
    if (!this.#changes.size) queueMicrotask(() => {
      const detail = this.#changes;
      this.#changes = new Set();
      this.dispatchEvent(new CustomEvent("change", { detail }));
    });
    for (const kind of kinds) this.#changes.add(kind);
  }

  get ready() {
    return this.images.filter((image) => image.state === State.READY);
  }

  /** Adds files, [{file, path}]; those that are new. */
  add(files) {
    const known = new Set(this.images.map((image) => `${image.path}\n${image.file.size}`));
    const added = [];
    for (const { file, path } of files) {
      if (known.has(`${path}\n${file.size}`) || this.images.length >= MOST_IMAGES) continue;
      known.add(`${path}\n${file.size}`);
      const image = { id: this.images.length, file, path, shown: visible(path), state: State.WAITING, problem: "", passing: false, label: null, answer: null };
      this.images.push(image);
      added.push(image);
    }
    if (added.length) this.changed("images");
    return added;
  }

  /** Forgets what a model has said; images and labels stay. */
  forgetFeatures() {
    this.vectors.clear();
    this.head = null;
    for (const image of this.images) image.answer = null;
  }

  clear() {
    this.forgetFeatures();
    this.images = [];
    this.selected = new Set();
    this.active = null;
    this.#done = [];
    this.#undone = [];
    this.changed("images", "labels", "answers", "selection");
  }

  /** Selects images; the last one is the active one. */
  select(ids, active = ids.at(-1) ?? null) {
    this.selected = new Set(ids);
    this.active = active;
    this.changed("selection");
  }

  className(id) {
    return this.classes.find((one) => one.id === id)?.name ?? "";
  }

  /** The name as text to read. */
  shownName(id) {
    return visible(this.className(id));
  }

  classNumber(id) {
    return this.classes.findIndex((one) => one.id === id);
  }

  /** The class that an image has or is believed to have. */
  classOf(image) {
    return image.label ?? image.answer?.classId ?? null;
  }

  addClass(name) {
    const added = { id: (this.#classId += 1), name };
    this.#do("class", () => { this.classes = [...this.classes, added]; }, () => { this.classes = this.classes.filter((one) => one !== added); });
    return added;
  }

  renameClass(id, name) {
    const before = this.className(id);
    const rename = (to) => { this.classes = this.classes.map((one) => (one.id === id ? { ...one, name: to } : one)); };
    this.#do("rename", () => rename(name), () => rename(before));
  }

  removeClass(id) {
    const before = this.classes;
    const labelled = this.images.filter((image) => image.label === id);
    this.#do("removal", () => {
      this.classes = before.filter((one) => one.id !== id);
      for (const image of labelled) image.label = null;
    }, () => {
      this.classes = before;
      for (const image of labelled) image.label = id;
    });
  }

  /** Gives images a label, or null. */
  label(ids, classId) {
    const changes = ids.map((id) => [this.images[id], this.images[id].label])
      .filter(([image, before]) => image.state === State.READY && before !== classId);
    if (!changes.length) return 0;
    this.#do("label", () => { for (const [image] of changes) image.label = classId; },
      () => { for (const [image, before] of changes) image.label = before; },
      changes.map(([image]) => image.id));
    return changes.length;
  }

  get canUndo() { return this.#done.length > 0; }
  get canRedo() { return this.#undone.length > 0; }

  /** Takes the last change back; the ids of the images that it was about. */
  undo() { return this.#move(this.#done, this.#undone, "backward"); }
  redo() { return this.#move(this.#undone, this.#done, "forward"); }

  #move(from, to, way) {
    const step = from.pop();
    if (!step) return null;
    step[way]();
    to.push(step);
    this.changed("labels");
    return step.ids;
  }

  #do(name, forward, backward, ids = []) {
    forward();
    this.#done.push({ name, forward, backward, ids });
    if (this.#done.length > MOST_UNDONE) this.#done.shift();
    this.#undone = [];
    this.changed("labels");
  }
}

export const store = new Store();
