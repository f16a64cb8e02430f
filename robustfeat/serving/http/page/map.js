// The images in the plane of their first two principal components.

import { baseName, byId } from "./dom.js";
import { store } from "./store.js";
import { thumbnail } from "./thumbnails.js";
import { principal } from "./vectors.js";

const PICTURES = 250; // with more images, points
const MARGIN = 48;

export class ImageMap {
  #canvas = byId("map");
  #places = new Map();
  #ids = "";
  #view = { scale: 1, x: 0, y: 0 };
  #pointers = new Map();
  #moved = 0;
  #choose;
  #waiting = false;

  constructor(choose) {
    this.#choose = choose;
    new ResizeObserver(() => this.draw()).observe(this.#canvas);
    const canvas = this.#canvas;
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); this.#zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY); }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); this.#pointers.set(event.pointerId, event); this.#moved = 0; });
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerleave", () => { byId("map-tip").hidden = true; });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.#lift(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    for (const button of document.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => this.#zoom(Number(button.dataset.zoom), canvas.clientWidth / 2, canvas.clientHeight / 2));
    }
  }

  /** Computes places anew if there are other images, and draws. */
  draw() {
    if (!this.#canvas.clientWidth) return;
    const ids = store.ready.map((image) => image.id);
    const key = `${ids.length} ${ids[0]} ${ids.at(-1)} ${store.vectors.version}`;
    if (key !== this.#ids) {
      this.#ids = key;
      this.#places = ids.length > 1 ? principal(store.vectors, ids) : new Map(ids.map((id) => [id, [0, 0]]));
    }
    byId("map-note").textContent = ids.length < 2 ? "Add two images or more." : "The two directions in which these images differ most (PCA).";
    if (!this.#waiting) requestAnimationFrame(() => this.#paint());
    this.#waiting = true;
  }

  reset() {
    this.#view = { scale: 1, x: 0, y: 0 };
  }

  #paint() {
    this.#waiting = false;
    const canvas = this.#canvas;
    const ratio = devicePixelRatio;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const color = (id) => {
      const classId = store.classOf(store.images[id]);
      return style.getPropertyValue(classId === null ? "--muted" : `--class-${store.classNumber(classId) % 9 + 1}`);
    };
    const seen = [...this.#places.keys()].filter((id) => this.#inSight(id, width, height));
    const pictures = seen.length <= PICTURES;
    const side = Math.max(26, Math.min(64, Math.sqrt((width * height) / Math.max(seen.length, 1)) * 0.5));
    for (const id of seen) {
      if (id === store.active) continue;
      this.#point(context, id, pictures ? side : 0, color(id));
    }
    if (store.active !== null && this.#places.has(store.active)) {
      this.#point(context, store.active, pictures ? side * 1.3 : 0, style.getPropertyValue("--text"), 3);
    }
  }

  #point(context, id, side, color, line = 2) {
    const [x, y] = this.#position(id);
    context.fillStyle = context.strokeStyle = color;
    if (!side) {
      context.beginPath();
      context.arc(x, y, line + 2, 0, 2 * Math.PI);
      context.fill();
      return;
    }
    let bitmap = null;
    let now = true;
    thumbnail(store.images[id], (found) => { bitmap = found?.bitmap; if (!now) this.#later(); });
    now = false;
    const box = [x - side / 2, y - side / 2, side, side];
    context.save();
    context.beginPath();
    context.roundRect(...box, 6);
    context.clip();
    if (bitmap) {
      const edge = Math.min(bitmap.width, bitmap.height);
      context.drawImage(bitmap, (bitmap.width - edge) / 2, (bitmap.height - edge) / 2, edge, edge, ...box);
    } else {
      context.globalAlpha = 0.3;
      context.fillRect(...box);
    }
    context.restore();
    context.lineWidth = line;
    context.beginPath();
    context.roundRect(...box, 6);
    context.stroke();
  }

  #later() {
    if (this.#waiting) return;
    this.#waiting = true;
    setTimeout(() => this.#paint(), 60);
  }

  #position(id) {
    const [x, y] = this.#places.get(id);
    const { scale, x: left, y: top } = this.#view;
    const [width, height] = [this.#canvas.clientWidth, this.#canvas.clientHeight];
    return [width / 2 + (x * (width / 2 - MARGIN) - left) * scale, height / 2 - (y * (height / 2 - MARGIN) - top) * scale];
  }

  #inSight(id, width, height) {
    const [x, y] = this.#position(id);
    return x > -MARGIN && y > -MARGIN && x < width + MARGIN && y < height + MARGIN;
  }

  #zoom(factor, x, y) {
    if (!factor) this.reset();
    else {
      const view = this.#view;
      const scale = Math.min(60, Math.max(0.5, view.scale * factor));
      const [dx, dy] = [x - this.#canvas.clientWidth / 2, this.#canvas.clientHeight / 2 - y];
      view.x += dx / view.scale - dx / scale;
      view.y += dy / view.scale - dy / scale;
      view.scale = scale;
    }
    this.draw();
  }

  #move(event) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return this.#hover(event);
    const others = [...this.#pointers.values()].filter((one) => one.pointerId !== event.pointerId);
    if (others.length) {
      const reach = (one) => Math.hypot(one.offsetX - others[0].offsetX, one.offsetY - others[0].offsetY);
      this.#zoom(reach(event) / Math.max(1, reach(before)), others[0].offsetX, others[0].offsetY);
    } else {
      this.#view.x -= (event.offsetX - before.offsetX) / this.#view.scale;
      this.#view.y += (event.offsetY - before.offsetY) / this.#view.scale;
      this.draw();
    }
    this.#moved += Math.hypot(event.offsetX - before.offsetX, event.offsetY - before.offsetY);
    this.#pointers.set(event.pointerId, event);
  }

  #lift(event) {
    this.#pointers.delete(event.pointerId);
    if (event.type !== "pointerup" || this.#moved > 6) return;
    const id = this.#at(event.offsetX, event.offsetY);
    if (id !== null) this.#choose(id);
  }

  #hover(event) {
    const id = this.#at(event.offsetX, event.offsetY);
    const tip = byId("map-tip");
    tip.hidden = id === null;
    if (id === null) return;
    const [picture, name] = tip.children;
    name.textContent = baseName(store.images[id].shown).slice(0, 60);
    thumbnail(store.images[id], (found) => { picture.hidden = !found; if (found) picture.src = found.url; });
    tip.style.left = `${Math.min(event.offsetX + 16, this.#canvas.clientWidth - 180)}px`;
    tip.style.top = `${Math.min(event.offsetY + 16, this.#canvas.clientHeight - 190)}px`;
  }

  #at(x, y) {
    let [best, reach] = [null, 32];
    for (const id of this.#places.keys()) {
      const [px, py] = this.#position(id);
      const distance = Math.hypot(px - x, py - y);
      if (distance < reach) [best, reach] = [id, distance];
    }
    return best;
  }

  #key(event) {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "+" || event.key === "-") return this.#zoom(event.key === "+" ? 1.4 : 0.714, this.#canvas.clientWidth / 2, this.#canvas.clientHeight / 2);
    if (!(event.key in ways) || event.ctrlKey || event.metaKey || !this.#places.size) return;
    event.preventDefault();
    if (!this.#places.has(store.active)) return this.#choose(this.#places.keys().next().value);
    const [x, y] = this.#position(store.active);
    const [wx, wy] = ways[event.key];
    let [best, cost] = [null, Infinity];
    for (const id of this.#places.keys()) {
      const [dx, dy] = [this.#position(id)[0] - x, this.#position(id)[1] - y];
      const [along, across] = [dx * wx + dy * wy, Math.abs(dx * wy) + Math.abs(dy * wx)];
      if (id !== store.active && along > 0 && along + 2 * across < cost) [best, cost] = [id, along + 2 * across];
    }
    if (best !== null) this.#choose(best);
  }
}
