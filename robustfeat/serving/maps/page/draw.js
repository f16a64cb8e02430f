// The picture: points written into pixels, and thumbnails, names, links and the lasso drawn above them.
// 100,000 points take milliseconds this way, on every machine: no graphics processor is asked.

const canvas = document.getElementById("map");
const context = canvas.getContext("2d", { alpha: false });
const view = { x: 0.5, y: 0.5, scale: 1, fit: 1, width: 0, height: 0, ratio: 1 };

const HIDDEN = 0;
const DIM = 1;
const FULL = 2;
const tone = new Uint8Array(count).fill(FULL);
const selected = new Uint8Array(count);
const marked = new Uint8Array(count);  // by a layer that is on
let shown = new Uint8Array(count).fill(1);
let colouring = colourings[0];
let pointed = -1;  // a category of the legend that is pointed at
let pixels = new Int32Array(count);
let image = null;
let buffer = null;
let wide = 0;  // of the buffer, as is `tall`
let tall = 0;

// The same in the order of drawing: memory is then read from its start to its end, which halves the time.
const SELECTED = 4;
const MARKED = 8;
const drawn = {
  x: Float32Array.from(order, (row) => xs[row]),
  y: Float32Array.from(order, (row) => ys[row]),
  tone: new Uint8Array(count),
  pixels: new Int32Array(count),
};

let someFaint = false;
function refreshDrawn() {
  someFaint = pointed < 0 && tone.includes(DIM);
  for (let at = 0; at < count; at++) {
    const row = order[at];
    const rings = tone[row] === FULL ? (selected[row] ? SELECTED : 0) | (marked[row] ? MARKED : 0) : 0;
    drawn.tone[at] = tone[row] | rings;
    drawn.pixels[at] = pixels[row];
  }
}

function toScreen(row) {
  return [(xs[row] - view.x) * view.scale + view.width / 2, (ys[row] - view.y) * view.scale + view.height / 2];
}

function toMap(left, top) {
  return [(left - view.width / 2) / view.scale + view.x, (top - view.height / 2) / view.scale + view.y];
}

function fitView() {
  const box = canvas.getBoundingClientRect();
  const before = view.fit;
  view.width = box.width;
  view.height = box.height;
  view.ratio = Math.min(3, window.devicePixelRatio || 1);
  canvas.width = Math.max(1, Math.round(box.width * view.ratio));
  canvas.height = Math.max(1, Math.round(box.height * view.ratio));
  wide = canvas.width;
  tall = canvas.height;
  image = new ImageData(wide, tall);
  buffer = new Int32Array(image.data.buffer);
  view.fit = Math.max(40, Math.min((box.width - 48) / data.width, (box.height - 96) / data.height));
  view.scale *= view.fit / before;
  stamps.clear();
}

function wholeView() {
  Object.assign(view, { x: 0.5, y: 0.5, scale: view.fit });
}

function zoomAt(factor, left, top) {
  const [x, y] = toMap(left, top);
  view.scale = Math.min(view.fit * 1024, Math.max(view.fit * 0.5, view.scale * factor));
  view.x = x - (left - view.width / 2) / view.scale;
  view.y = y - (top - view.height / 2) / view.scale;
}

// Radius of a point in CSS pixels: smaller where there are many, larger when zoomed in.
function pointRadius() {
  const room = Math.sqrt((view.width * view.height) / Math.max(count, 1));
  const base = Math.min(4.5, Math.max(1.1, 0.2 * room));
  return Math.min(7, base * (view.scale / view.fit) ** 0.3);
}

// A disc as offsets into the buffer, for 4 x 4 places of its centre within a pixel.
const stamps = new Map();
function stampsOf(radius) {
  const known = stamps.get(radius);
  if (known) return known;
  const reach = Math.ceil(radius + 1);
  const made = [];
  for (let phase = 0; phase < 16; phase++) {
    const inner = [];
    const edge = [];
    const shares = [];
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++) {
        const distance = Math.hypot(dx - (phase % 4) / 4, dy - (phase >> 2) / 4);
        const share = Math.min(1, Math.max(0, radius + 0.5 - distance));
        if (share >= 0.99) inner.push(dy * wide + dx);
        else if (share > 0.02) {
          edge.push(dy * wide + dx);
          shares.push(Math.round(256 * share));
        }
      }
    }
    made.push({ inner: Int32Array.from(inner), edge: Int32Array.from(edge), shares: Int32Array.from(shares) });
  }
  const entry = { made, reach };
  stamps.set(radius, entry);
  return entry;
}

// Whole numbers of 32 bits throughout: engines are several times as fast with them.
function stamp(entry, left, top, pixel) {
  const x = left | 0;
  const y = top | 0;
  const reach = entry.reach;
  if (x < reach || y < reach || x >= wide - reach || y >= tall - reach) return;
  const { inner, edge, shares } = entry.made[((((top - y) * 4) | 0) << 2) | (((left - x) * 4) | 0)];
  const start = y * wide + x;
  for (let at = 0; at < inner.length; at++) buffer[start + inner[at]] = pixel;
  const redBlue = pixel & 0xff00ff;
  const green = pixel & 0x00ff00;
  for (let at = 0; at < edge.length; at++) {
    const place = start + edge[at];
    const share = shares[at];
    const old = buffer[place];
    const rest = 256 - share;
    buffer[place] = -16777216
      | (((Math.imul(old & 0xff00ff, rest) + Math.imul(redBlue, share)) >>> 8) & 0xff00ff)
      | (((Math.imul(old & 0x00ff00, rest) + Math.imul(green, share)) >>> 8) & 0x00ff00);
  }
}

function drawPoints() {
  buffer.fill(pixelOf(theme.paper));
  const ratio = view.ratio;
  const radius = Math.round(pointRadius() * ratio * 4) / 4;
  const disc = stampsOf(radius);
  const around = stampsOf(radius + 1.75 * ratio);
  const gap = stampsOf(radius + 0.75 * ratio);
  const scale = view.scale * ratio;
  const left = canvas.width / 2 - view.x * scale;
  const top = canvas.height / 2 - view.y * scale;
  const ink = pixelOf(theme.ink);
  const mark = pixelOf(theme.mark);
  const paper = pixelOf(theme.paper);
  const dim = pixelOf(theme.dim);
  for (let at = 0; at < count; at++) {
    if (drawn.tone[at] === DIM) stamp(disc, drawn.x[at] * scale + left, drawn.y[at] * scale + top, dim);
  }
  for (let at = 0; at < count; at++) {
    if (drawn.tone[at] < FULL) continue;
    const x = drawn.x[at] * scale + left;
    const y = drawn.y[at] * scale + top;
    if (drawn.tone[at] > FULL) {
      stamp(around, x, y, drawn.tone[at] & SELECTED ? ink : mark);
      stamp(gap, x, y, paper);
    }
    stamp(disc, x, y, drawn.pixels[at]);
  }
  context.putImageData(image, 0, 0);
}

// Thumbnails: those that have room at a level of zoom. Two levels are a factor of two.
let spreads = [];
let everyZoom = false;
const LEVELS = 20;
// No thumbnails before one point in so many has room for its own: on the whole map, and zoomed in.
const SPARSE = 8;
const SPARSE_ZOOMED = 36;

function levelOf() {
  return Math.max(0, Math.min(LEVELS, Math.floor(2 * Math.log2(view.scale / view.fit) + 1e-6)));
}

// Side of a thumbnail in CSS pixels.
function thumbSide(level) {
  return Math.min(48 + 4 * Math.min(level, 9), thumbs.side);
}

function spreadOf(level) {
  while (spreads.length <= level) {
    const next = spreads.length;
    const side = (1.08 * thumbSide(next)) / (view.fit * 2 ** (next / 2));
    spreads.push(spread(side, next ? spreads[next - 1] : [], shown));
  }
  return spreads[level];
}

function thumbsShown() {
  if (!thumbs) return [];
  const level = levelOf();
  const placed = spreadOf(level);
  const wanted = Math.min(count, thumbs.count) / (level ? SPARSE_ZOOMED : SPARSE);
  const enough = placed.length >= wanted || level === LEVELS;
  return everyZoom || enough ? placed : [];
}

function drawThumbs() {
  const rows = thumbsShown();
  if (!rows.length) return;
  const side = thumbSide(levelOf());
  context.imageSmoothingQuality = "high";
  for (const row of rows) {
    if (tone[row] !== FULL) continue;
    const [x, y] = toScreen(row);
    if (x < -side || y < -side || x > view.width + side || y > view.height + side) continue;
    // On whole pixels, so that they are sharp.
    const left = Math.round((x - side / 2) * view.ratio) / view.ratio;
    const top = Math.round((y - side / 2) * view.ratio) / view.ratio;
    if (!drawThumb(context, row, left, top, side, redraw)) continue;
    context.lineWidth = selected[row] || marked[row] ? 3 : 2;
    context.strokeStyle = selected[row] ? theme.ink : marked[row] ? theme.mark : colourOf(colouring, row);
    context.strokeRect(left, top, side, side);
  }
}

// Lines between the members of a group, such as duplicates.
function drawLinks() {
  context.strokeStyle = theme.mark;
  context.lineWidth = 1;
  context.beginPath();
  for (const layer of layers) {
    if (!layer.on || !layer.groups) continue;
    const first = new Map();
    layer.rows.forEach((row, at) => {
      if (!shown[row]) return;
      const start = first.get(layer.groups[at]);
      if (start === undefined) first.set(layer.groups[at], row);
      else {
        context.moveTo(...toScreen(start));
        context.lineTo(...toScreen(row));
      }
    });
  }
  context.stroke();
}

let namesOn = true;
function drawNames() {
  if (!namesOn || colouring.kind !== "categories" || !colouring.places) return;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineJoin = "round";
  context.font = `600 ${view.width < 500 ? 12 : 13}px system-ui, sans-serif`;
  context.globalAlpha = someFaint ? 0.4 : 1;  // what stands out is not hidden by a name
  const taken = [];
  for (const category of colouring.byCount) {
    const aside = pointed >= 0 && pointed !== category;
    if (aside || colouring.off[category] || !colouring.places[category]) continue;
    const [x, y] = colouring.places[category];
    const left = (x - view.x) * view.scale + view.width / 2;
    const top = (y - view.y) * view.scale + view.height / 2;
    const name = shorten(colouring.names[category], 28);
    const room = context.measureText(name).width + 10;
    if (left < -room || top < -20 || left > view.width + room || top > view.height + 20) continue;
    const box = [left - room / 2, top - 10, left + room / 2, top + 10];
    if (taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) continue;
    taken.push(box);
    context.strokeStyle = theme.halo;
    context.lineWidth = 4.5;
    context.strokeText(name, left, top);
    context.fillStyle = theme.ink;
    context.fillText(name, left, top);
  }
  context.globalAlpha = 1;
}

function shorten(text, most) {
  return text.length > most ? text.slice(0, most - 1) + "…" : text;
}

let current = -1;
let lassoLine = null;  // [x, y] on the map
function drawMarks() {
  if (current >= 0) {
    const [x, y] = toScreen(current);
    context.beginPath();
    context.arc(x, y, pointRadius() + 5, 0, 2 * Math.PI);
    context.lineWidth = 5;
    context.strokeStyle = theme.halo;
    context.stroke();
    context.lineWidth = 2.5;
    context.strokeStyle = theme.accent;
    context.stroke();
  }
  if (lassoLine && lassoLine.length > 1) {
    context.beginPath();
    for (const [x, y] of lassoLine) {
      context.lineTo((x - view.x) * view.scale + view.width / 2, (y - view.y) * view.scale + view.height / 2);
    }
    context.closePath();
    context.globalAlpha = 0.12;
    context.fillStyle = theme.accent;
    context.fill();
    context.globalAlpha = 1;
    context.lineWidth = 2;
    context.setLineDash([6, 4]);
    context.strokeStyle = theme.accent;
    context.stroke();
    context.setLineDash([]);
  }
}

function draw() {
  context.setTransform(1, 0, 0, 1, 0, 0);
  drawPoints();
  context.setTransform(view.ratio, 0, 0, view.ratio, 0, 0);
  drawLinks();
  drawThumbs();
  drawNames();
  drawMarks();
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}
