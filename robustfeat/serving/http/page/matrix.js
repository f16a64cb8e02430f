// How similar each image is to each other, as a square of cells.

import { announce, baseName, byId } from "./dom.js";
import { store } from "./store.js";
import { thumbnail } from "./thumbnails.js";
import { chain } from "./vectors.js";

const MOST = 400;
const PICTURE = 14; // pixels of a cell, from which on the images stand beside it

export class Matrix {
  #canvas = byId("matrix");
  #order = [];
  #cosines = new Float32Array(0);
  #low = 0;
  #key = "";
  #cell = [0, 0];
  #choose;
  #waiting = false;

  constructor(choose) {
    this.#choose = choose;
    new ResizeObserver(() => this.draw()).observe(this.#canvas);
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("click", (event) => { if (this.#point(event)) this.#choose(this.#order[this.#cell[0]]); });
    this.#canvas.addEventListener("keydown", (event) => this.#press(event));
  }

  /** Orders the images so that those alike lie together, and draws. */
  draw() {
    if (!this.#canvas.clientWidth) return;
    const ready = store.ready.slice(0, MOST);
    const key = store.vectors.version + ready.map((image) => `${image.id}:${store.classOf(image) ?? ""}`).join();
    if (key !== this.#key) {
      this.#key = key;
      const groups = Map.groupBy(ready, (image) => store.classOf(image) ?? -1);
      const ids = [...groups.keys()].sort((a, b) => store.classNumber(a) - store.classNumber(b));
      this.#order = ids.flatMap((id) => chain(store.vectors, groups.get(id).map((image) => image.id)));
      this.#compute();
    }
    if (!this.#waiting) requestAnimationFrame(() => this.#paint());
    this.#waiting = true;
  }

  #compute() {
    const order = this.#order;
    const n = order.length;
    this.#cosines = new Float32Array(n * n);
    for (let row = 0; row < n; row += 1) {
      for (let column = row; column < n; column += 1) {
        const cosine = row === column ? 1 : store.vectors.cosine(order[row], order[column]);
        this.#cosines[row * n + column] = this.#cosines[column * n + row] = cosine;
      }
    }
    const sorted = this.#cosines.toSorted();
    this.#low = Math.floor(20 * (sorted[Math.floor(sorted.length * 0.02)] ?? 0)) / 20;
    byId("matrix-low").textContent = this.#low.toFixed(2);
    this.#cell = [0, Math.min(1, n - 1)];
    this.#say(false);
  }

  get #layout() {
    const n = Math.max(1, this.#order.length);
    const size = Math.min(this.#canvas.clientWidth, this.#canvas.clientHeight);
    const cell = size / (n + (size / (n + 1.6) >= PICTURE ? 1.6 : 0));
    const edge = cell >= PICTURE ? 1.6 * cell : 0;
    return { n, cell, edge, left: (this.#canvas.clientWidth - size) / 2 };
  }

  #paint() {
    this.#waiting = false;
    const canvas = this.#canvas;
    const { n, cell, edge, left } = this.#layout;
    canvas.width = canvas.clientWidth * devicePixelRatio;
    canvas.height = canvas.clientHeight * devicePixelRatio;
    if (!this.#order.length) return;
    const context = canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    const style = getComputedStyle(canvas);
    const [from, to] = ["--scale-low", "--scale-high"].map((name) => style.getPropertyValue(name).trim().split(" ").map(Number));
    const pixels = new ImageData(n, n);
    this.#cosines.forEach((cosine, at) => {
      const share = Math.min(1, Math.max(0, (cosine - this.#low) / (1 - this.#low || 1)));
      for (let channel = 0; channel < 3; channel += 1) pixels.data[4 * at + channel] = from[channel] + share * (to[channel] - from[channel]);
      pixels.data[4 * at + 3] = 255;
    });
    const small = new OffscreenCanvas(n, n);
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, left + edge, edge, n * cell, n * cell);
    if (edge) this.#order.forEach((id, at) => this.#pictures(context, id, left, edge + at * cell, cell, left + edge + at * cell));
    context.strokeStyle = style.getPropertyValue("--text");
    context.lineWidth = 2;
    const [row, column] = this.#cell;
    context.strokeRect(left + edge + column * cell, edge + row * cell, Math.max(cell, 3), Math.max(cell, 3));
  }

  #pictures(context, id, left, y, cell, x) {
    let now = true;
    thumbnail(store.images[id], (found) => {
      if (!now) { if (!this.#waiting) { this.#waiting = true; setTimeout(() => this.#paint(), 60); } return; }
      if (!found) return;
      const { bitmap } = found;
      const side = Math.min(bitmap.width, bitmap.height);
      const source = [bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side];
      context.imageSmoothingEnabled = true;
      context.drawImage(...source, left + 0.3 * cell, y + 1, cell, cell - 2);
      context.drawImage(...source, x + 1, 0.3 * cell, cell - 2, cell);
    });
    now = false;
  }

  #point(event) {
    const { n, cell, edge, left } = this.#layout;
    const column = Math.floor((event.offsetX - left - edge) / cell);
    const row = Math.floor((event.offsetY - edge) / cell);
    if (row < 0 || column < 0 || row >= n || column >= n || !this.#order.length) return false;
    if (row !== this.#cell[0] || column !== this.#cell[1]) {
      this.#cell = [row, column];
      this.#say(false);
      this.draw();
    }
    return true;
  }

  #press(event) {
    const ways = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!this.#order.length || event.ctrlKey || event.metaKey) return;
    if (event.key === " ") {
      event.preventDefault();
      this.#choose(this.#order[this.#cell[0]]);
    }
    if (!(event.key in ways)) return;
    event.preventDefault();
    this.#cell = this.#cell.map((place, at) => Math.min(this.#order.length - 1, Math.max(0, place + ways[event.key][at])));
    this.#say(true);
    this.draw();
  }

  #say(aloud) {
    const [a, b] = this.#cell.map((place) => store.images[this.#order[place]]);
    if (!a || !b) {
      byId("matrix-note").textContent = "Add two images or more.";
      return;
    }
    const cosine = this.#cosines[this.#cell[0] * this.#order.length + this.#cell[1]];
    const text = `${baseName(a.shown).slice(0, 40)} and ${baseName(b.shown).slice(0, 40)}: ${cosine.toFixed(2)}`;
    const more = store.ready.length > MOST ? ` The first ${MOST} images.` : "";
    byId("matrix-note").textContent = `${text}.${more}`;
    if (aloud) announce(text);
  }
}
