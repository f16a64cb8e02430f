// The card of the selected image: what it is believed to be, and what is like it.

import { request } from "./api.js";
import { baseName, byId, element, percent, visible } from "./dom.js";
import { State, store } from "./store.js";
import { thumbnail } from "./thumbnails.js";
import { nearest } from "./vectors.js";

const NEIGHBOURS = 8;
const BARS = 3;

export class Selected {
  #choose;
  #drawn = null;
  #asked = null; // {image, name, stop}: the search in a collection that the list shows

  /** `choose` selects an image. */
  constructor(choose) {
    this.#choose = choose;
    byId("collection").addEventListener("change", () => this.#drawNeighbours(store.images[store.active]));
  }

  /** Offers collections of the server, by name, to search in. */
  offer(collections) {
    byId("within").hidden = !collections.length;
    byId("collection").replaceChildren(element("option", { value: "", text: "these images" }),
      ...collections.map((name) => element("option", { value: name, text: name })));
  }

  draw() {
    const image = store.active === null ? null : store.images[store.active];
    byId("selected").hidden = !image;
    if (!image) byId("similar").hidden = true;
    if (!image) return;
    const [name] = byId("selected-name").children;
    name.textContent = store.selected.size > 1 ? `${store.selected.size} images` : baseName(image.shown);
    byId("selected-name").title = image.shown.slice(0, 300);
    if (this.#drawn !== image) this.#drawPreview(image);
    this.#drawn = image;
    byId("selected-state").textContent = stateOf(image);
    byId("selected-state").classList.toggle("error", image.state === State.FAILED);
    byId("bars").replaceChildren(...bars(image));
    const { answer } = image;
    const open = answer && image.label === null && store.selected.size === 1;
    byId("accept").hidden = !open;
    if (open) byId("accept").replaceChildren("Accept ", element("bdi", { text: store.shownName(answer.classId).slice(0, 24) }), " ", element("kbd", { text: "↵" }));
    this.#drawNeighbours(image);
  }

  #drawPreview(image) {
    const [picture, none] = [byId("preview"), byId("preview-none")];
    picture.hidden = none.hidden = true;
    thumbnail(image, (found) => {
      if (store.active !== image.id) return;
      picture.hidden = !found;
      none.hidden = Boolean(found);
      if (found) picture.src = found.url;
      else none.textContent = "This browser shows no such file.";
      picture.alt = baseName(image.shown).slice(0, 80);
    });
  }

  #drawNeighbours(image) {
    const known = image.state === State.READY;
    byId("similar").hidden = !known;
    const name = known ? byId("collection").value : "";
    if (name && this.#asked?.image === image && this.#asked.name === name) return;
    this.#asked?.stop.abort();
    this.#asked = name ? { image, name, stop: new AbortController() } : null;
    if (name) this.#ask(this.#asked);
    if (name || !known) return;
    const ids = store.ready.map((one) => one.id);
    byId("neighbours").replaceChildren(...nearest(store.vectors, image.id, ids, NEIGHBOURS).map(([id, cosine]) => this.#neighbour(id, cosine)));
  }

  #neighbour(id, cosine) {
    const image = store.images[id];
    const button = element("button", {
      type: "button", "aria-label": `${baseName(image.shown).slice(0, 80)}, similarity ${cosine.toFixed(2)}`,
      title: image.shown.slice(0, 300), on: { click: () => this.#choose(id) },
    }, element("span", { text: cosine.toFixed(2) }));
    thumbnail(image, (found) => { if (found) button.prepend(element("img", { src: found.url, alt: "" })); });
    return element("li", {}, button);
  }

  /** The most similar images of a collection that the server has; it tells their names, not their pictures. */
  async #ask(asked) {
    const list = byId("neighbours");
    try {
      const answer = await request(`similar/${encodeURIComponent(asked.name)}?k=${NEIGHBOURS}`, { method: "POST", body: asked.image.file, signal: asked.stop.signal });
      const { matches } = (await answer.json()).data[0];
      if (asked !== this.#asked) return;
      list.replaceChildren(...matches.map((row) => element("li", { class: "row-of-collection" },
        element("bdi", { text: visible(row.path) }), element("span", { text: row.cosine.toFixed(2) }))));
    } catch (error) {
      if (asked === this.#asked) list.replaceChildren(element("li", { class: "error", text: error.message }));
    }
  }
}

function stateOf(image) {
  if (store.selected.size > 1) return "Click a class to label all of them.";
  if (image.state === State.FAILED) return `Failed: ${image.problem}.`;
  if (image.state !== State.READY) return "Not embedded yet.";
  if (image.label !== null) return `Labelled ${store.shownName(image.label)}.`;
  return image.answer ? `Predicted ${store.shownName(image.answer.classId)}.` : "No label yet.";
}

function bars(image) {
  const { answer } = image;
  if (!answer?.shares || store.selected.size > 1) return [];
  const order = answer.shares.map((share, at) => [share, answer.ids[at]]).sort((a, b) => b[0] - a[0]).slice(0, BARS);
  return order.map(([share, id]) => {
    const fill = element("i", { class: "dot", data: { class: store.classNumber(id) % 9 + 1 } });
    fill.style.width = `${Math.max(1, 100 * share)}%`;
    return element("li", {}, element("bdi", { class: "text", text: store.shownName(id) }), element("span", { class: "bar", "aria-hidden": "true" }, fill), element("span", { class: "share", text: percent(share) }));
  });
}
