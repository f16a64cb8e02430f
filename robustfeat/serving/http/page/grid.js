// The images as tiles. Only those in sight are in the document, so that ten thousand scroll as ten do.

import { baseName, byId, element, percent } from "./dom.js";
import { State, store } from "./store.js";
import { thumbnail } from "./thumbnails.js";

const GAP = 8;
const CAPTION = 30;
const BEYOND = 2; // rows above and below what is in sight

export class Grid {
  #box = byId("view-images");
  #spacer = element("div", { class: "spacer", role: "presentation" });
  #tiles = new Map(); // id to element
  #anchor = null; // where a selection with Shift began

  constructor() {
    this.#box.append(this.#spacer);
    this.#box.addEventListener("scroll", () => this.draw(), { passive: true });
    this.#box.addEventListener("click", (event) => this.#click(event));
    this.#box.addEventListener("keydown", (event) => this.#key(event));
    this.#box.addEventListener("focus", () => { if (store.active === null && store.shown.length) store.select([store.shown[0]]); });
    new ResizeObserver(() => this.draw()).observe(this.#box);
  }

  get columns() {
    const width = this.#box.clientWidth - 2 * GAP;
    return Math.max(width < 500 ? 3 : 1, Math.floor((width + GAP) / ((width < 900 ? 128 : 148) + GAP)));
  }

  get #side() {
    return Math.floor((this.#box.clientWidth - 2 * GAP - (this.columns - 1) * GAP) / this.columns);
  }

  get #rowHeight() {
    return this.#side + CAPTION + GAP;
  }

  /** Draws what is in sight. */
  draw() {
    if (!this.#box.clientWidth || this.#box.hidden) return;
    const { columns } = this;
    const [side, height] = [this.#side, this.#rowHeight];
    this.#spacer.style.height = `${Math.ceil(store.shown.length / columns) * height + GAP}px`;
    const first = Math.max(0, (Math.floor(this.#box.scrollTop / height) - BEYOND) * columns);
    const last = (Math.ceil((this.#box.scrollTop + this.#box.clientHeight) / height) + BEYOND) * columns;
    const places = new Map(store.shown.slice(first, last).map((id, at) => [id, first + at]));
    const active = store.active === null ? -1 : store.shown.indexOf(store.active);
    if (active >= 0) places.set(store.active, active); // what the focus is on must be there
    for (const [id, tile] of this.#tiles) {
      if (places.has(id)) continue;
      tile.remove();
      this.#tiles.delete(id);
    }
    for (const [id, place] of places) {
      const tile = this.#tiles.get(id) ?? this.#make(id);
      tile.style.transform = `translate(${GAP + (place % columns) * (side + GAP)}px, ${GAP + Math.floor(place / columns) * height}px)`;
      tile.style.width = `${side}px`;
      tile.style.height = `${side + CAPTION}px`;
      tile.setAttribute("aria-posinset", place + 1);
      tile.setAttribute("aria-setsize", store.shown.length);
      show(tile, store.images[id]);
    }
    if (active >= 0) this.#box.setAttribute("aria-activedescendant", `tile-${store.active}`);
    else this.#box.removeAttribute("aria-activedescendant");
  }

  /** Forgets all tiles. */
  clear() {
    for (const tile of this.#tiles.values()) tile.remove();
    this.#tiles.clear();
    this.#anchor = null;
  }

  /** Scrolls as little as needed to show the active image. */
  reveal() {
    const place = store.shown.indexOf(store.active);
    if (place < 0 || this.#box.hidden) return;
    const top = Math.floor(place / this.columns) * this.#rowHeight;
    const bottom = top + this.#rowHeight + GAP;
    if (top < this.#box.scrollTop) this.#box.scrollTop = top;
    else if (bottom > this.#box.scrollTop + this.#box.clientHeight) this.#box.scrollTop = bottom - this.#box.clientHeight;
  }

  focus() {
    this.#box.focus({ preventScroll: true });
  }

  #make(id) {
    const image = store.images[id];
    const picture = element("span", { class: "picture" });
    const tile = element("div", { class: "tile", role: "option", id: `tile-${id}`, data: { id } }, picture,
      element("span", { class: "caption" }, element("i", { class: "dot" }), element("bdi", { class: "text" }), element("span", { class: "share" })));
    this.#tiles.set(id, tile);
    this.#box.append(tile);
    thumbnail(image, (found) => {
      picture.replaceChildren(found ? element("img", { src: found.url, alt: "", draggable: "false" }) : element("span", { class: "none", text: /[^.]*$/.exec(image.shown)[0].slice(0, 5).toUpperCase() }));
    });
    return tile;
  }

  #click(event) {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    this.choose(Number(tile.dataset.id), { several: event.shiftKey, toggled: event.ctrlKey || event.metaKey });
  }

  /** Selects an image; `several` from where the selection began, `toggled` beside what is selected. */
  choose(id, { several = false, toggled = false } = {}) {
    const { shown } = store;
    if (several && shown.includes(this.#anchor)) {
      const [from, to] = [shown.indexOf(this.#anchor), shown.indexOf(id)];
      store.select(shown.slice(Math.min(from, to), Math.max(from, to) + 1), id);
      return;
    }
    this.#anchor = id;
    if (!toggled) return store.select([id]);
    const ids = new Set(store.selected);
    if (ids.has(id) && ids.size > 1) ids.delete(id);
    else ids.add(id);
    store.select([...ids], ids.has(id) ? id : [...ids].at(-1));
  }

  #key(event) {
    const { columns } = this;
    const page = columns * Math.max(1, Math.floor(this.#box.clientHeight / this.#rowHeight));
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey || !store.shown.length) return;
    event.preventDefault();
    const at = store.shown.indexOf(store.active);
    const to = Math.min(store.shown.length - 1, Math.max(0, at < 0 ? 0 : at + steps[event.key]));
    if (this.#anchor === null) this.#anchor = store.active;
    this.choose(store.shown[to], { several: event.shiftKey });
    this.reveal();
  }
}

function show(tile, image) {
  const classId = store.classOf(image);
  const name = classId === null ? baseName(image.shown) : store.shownName(classId);
  const [dot, text, share] = tile.lastChild.children;
  tile.classList.toggle("active", image.id === store.active);
  tile.classList.toggle("waiting", image.state === State.WAITING || image.state === State.SENT);
  tile.classList.toggle("failed", image.state === State.FAILED);
  tile.classList.toggle("labelled", image.label !== null);
  tile.setAttribute("aria-selected", store.selected.has(image.id));
  if (text.textContent !== name) text.textContent = name;
  dot.dataset.class = classId === null ? "" : store.classNumber(classId) % 9 + 1;
  dot.hidden = classId === null;
  share.textContent = image.state === State.FAILED ? "!" : image.label !== null ? "✓" : shareOf(image);
  tile.setAttribute("aria-label", labelOf(image, name));
  tile.title = image.shown.slice(0, 300) + (image.problem && `: ${image.problem}`);
}

function labelOf(image, name) {
  const path = image.shown.slice(-120);
  if (image.state === State.FAILED) return `${path}, failed: ${image.problem}`;
  if (image.state !== State.READY) return `${path}, not embedded yet`;
  if (image.label !== null) return `${path}, labelled ${name}`;
  return image.answer ? `${path}, predicted ${name} ${shareOf(image)}`.trim() : path;
}

/** How probable the predicted class is, as text; nothing where that is not known. */
function shareOf(image) {
  return typeof image.answer?.share === "number" ? percent(image.answer.share) : "";
}
