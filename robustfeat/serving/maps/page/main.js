// Pointers, keys, and the start.

const PICK = 14;  // CSS pixels around the pointer
const card = $("card");
let lassoMode = false;
let pinned = false;

function describe(row) {
  const parts = [data.paths[row]];
  for (const one of colourings) if (one.name && valueText(one, row)) parts.push(`${one.name} ${valueText(one, row)}`);
  for (const layer of layers) if (layer.rows.includes(row)) parts.push(layer.name);
  if (selected[row]) parts.push("selected");
  return parts.join(", ");
}

function showCard(row) {
  current = row;
  card.hidden = row < 0;
  if (row >= 0) {
    const picture = card.querySelector("canvas");
    const list = [element("dd", { className: "path" }, element("bdi", { textContent: data.paths[row] }))];
    for (const one of colourings) {
      const text = valueText(one, row);
      if (text) list.push(element("dt", { textContent: one.name }), element("dd", {}, element("bdi", { textContent: text })));
    }
    for (const layer of layers) {
      const place = layer.rows.indexOf(row);
      if (place < 0) continue;
      list.push(element("dt", { textContent: layer.name }), element("dd", { textContent: layer.texts ? layer.texts[place] : "yes" }));
    }
    card.querySelector("dl").replaceChildren(...list);
    picture.hidden = thumbOf[row] < 0;
    const side = Math.round((view.width < 500 ? 150 : 198) * view.ratio);
    picture.width = picture.height = side;
    const brush = picture.getContext("2d");
    brush.imageSmoothingQuality = "high";
    const paint = () => { if (current === row) drawThumb(brush, row, 0, 0, side, paint); };
    paint();
    placeCard();
  }
  redraw();
}

function placeCard() {
  if (card.hidden) return;
  const [x, y] = toScreen(current);
  const { offsetWidth: wide, offsetHeight: tall } = card;
  const left = x + 18 + wide < view.width ? x + 18 : x - 18 - wide;
  const top = Math.min(Math.max(8, y - tall / 2), view.height - tall - 8);
  card.style.transform = `translate(${Math.round(Math.min(Math.max(8, left), view.width - wide - 8))}px, ${Math.round(Math.max(8, top))}px)`;
}

function moved() {
  placeCard();
  redraw();
}

function goTo(row) {
  pinned = true;
  const [x, y] = toScreen(row);
  const inside = x > 60 && y > 60 && x < view.width - 60 && y < view.height - 60;
  if (!inside) Object.assign(view, { x: xs[row], y: ys[row] });
  showCard(row);
  say(describe(row));
}

function pick(left, top) {
  // A thumbnail is hit wherever the pointer is on it; the one drawn last lies on top.
  const placed = thumbsShown();
  const half = thumbs ? thumbSide(levelOf()) / 2 : 0;
  for (let place = placed.length - 1; place >= 0; place--) {
    const row = placed[place];
    if (tone[row] !== FULL) continue;
    const [x, y] = toScreen(row);
    if (Math.abs(x - left) <= half && Math.abs(y - top) <= half) return row;
  }
  return nearest(...toMap(left, top), PICK / view.scale, shown);
}

function setLasso(on) {
  lassoMode = on;
  $("lasso").setAttribute("aria-pressed", on);
  $("pan").setAttribute("aria-pressed", !on);
  canvas.classList.toggle("lasso", on);
}

// Pointers: one moves the map or draws the lasso, two zoom.
const fingers = new Map();
let drag = null;
function placeOf(event) {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  const place = placeOf(event);
  fingers.set(event.pointerId, place);
  if (fingers.size > 1) {
    lassoLine = null;
    drag = { kind: "pinch" };
    return;
  }
  const kind = lassoMode || event.shiftKey ? "lasso" : "pan";
  drag = { kind, start: place, far: false, added: event.shiftKey && lassoMode };
  if (kind === "lasso") lassoLine = [toMap(...place)];
});

canvas.addEventListener("pointermove", (event) => {
  const place = placeOf(event);
  const before = fingers.get(event.pointerId);
  if (!drag || !before) {
    if (event.pointerType === "mouse" && !pinned) {
      const row = pick(...place);
      if (row !== current) showCard(row);
    }
    return;
  }
  if (drag.kind === "pinch") {
    const other = Array.from(fingers).find(([id]) => id !== event.pointerId)[1];
    const middle = [(place[0] + other[0]) / 2, (place[1] + other[1]) / 2];
    const [wasX, wasY] = toMap((before[0] + other[0]) / 2, (before[1] + other[1]) / 2);
    const factor = Math.hypot(place[0] - other[0], place[1] - other[1]) / Math.max(1, Math.hypot(before[0] - other[0], before[1] - other[1]));
    zoomAt(factor, ...middle);
    const [isX, isY] = toMap(...middle);
    view.x += wasX - isX;
    view.y += wasY - isY;
  } else {
    drag.far ||= Math.hypot(place[0] - drag.start[0], place[1] - drag.start[1]) > 4;
    if (drag.kind === "pan" && drag.far) {
      canvas.classList.add("moving");
      view.x -= (place[0] - before[0]) / view.scale;
      view.y -= (place[1] - before[1]) / view.scale;
    } else if (drag.kind === "lasso") lassoLine.push(toMap(...place));
  }
  fingers.set(event.pointerId, place);
  moved();
});

function release(event) {
  const place = fingers.get(event.pointerId);
  fingers.delete(event.pointerId);
  canvas.classList.remove("moving");
  if (!drag || fingers.size) return;
  const { kind, far, added } = drag;
  drag = null;
  if (kind === "lasso" && lassoLine) {
    const line = lassoLine;
    lassoLine = null;
    if (line.length > 2 && far) {
      const rows = inPolygon(line, shown).filter((row) => tone[row] === FULL);
      select(rows, added);
      say(`${format(selectedRows().length)} selected`);
    }
  }
  if (!far && kind !== "pinch" && place) {
    const row = pick(...place);
    pinned = row >= 0;
    showCard(row);
    if (row >= 0) say(describe(row));
  }
  moved();
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", (event) => {
  lassoLine = null;
  drag = null;
  fingers.delete(event.pointerId);
  redraw();
});
canvas.addEventListener("pointerleave", () => { if (!pinned && !drag) showCard(-1); });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const step = event.deltaY * (event.deltaMode === 1 ? 20 : 1) * (event.ctrlKey ? 4 : 1);
  zoomAt(Math.exp(-Math.max(-120, Math.min(120, step)) / 400), ...placeOf(event));
  moved();
}, { passive: false });
canvas.addEventListener("dblclick", (event) => {
  zoomAt(2, ...placeOf(event));
  moved();
});

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
function middle(factor) {
  const place = current >= 0 && pinned ? toScreen(current) : [view.width / 2, view.height / 2];
  zoomAt(factor, ...place);
  moved();
}

function toggleCurrent() {
  if (current < 0) return;
  selected[current] ^= 1;
  refreshSelection();
  say(describe(current));
}

const KEYS = {
  "+": () => middle(1.5), "=": () => middle(1.5), "-": () => middle(1 / 1.5), 0: () => { wholeView(); moved(); },
  l: () => setLasso(!lassoMode), a: takeView, t: () => $("thumbnails").click(), n: () => $("names").click(),
  "/": () => { if (narrow.matches) fold(false); $("search").focus(); }, Enter: toggleCurrent, " ": toggleCurrent,
  Escape: () => { pinned = false; showCard(-1); select([], false); },
};

canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const arrow = ARROWS[event.key];
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (arrow && event.shiftKey) {
    view.x += (arrow[0] * 80) / view.scale;
    view.y += (arrow[1] * 80) / view.scale;
    moved();
  } else if (arrow) {
    const row = current < 0 ? nearest(view.x, view.y, 2, shown) : neighbour(current, ...arrow, shown);
    if (row >= 0) goTo(row);
  } else if (act) act();
  else return;
  event.preventDefault();
});

$("pan").addEventListener("click", () => setLasso(false));
$("lasso").addEventListener("click", () => setLasso(true));
$("zoom-in").addEventListener("click", () => middle(1.5));
$("zoom-out").addEventListener("click", () => middle(1 / 1.5));
$("whole").addEventListener("click", () => { wholeView(); moved(); });
$("names").addEventListener("change", () => { namesOn = $("names").checked; redraw(); });
$("thumbnails").addEventListener("change", () => { everyZoom = $("thumbnails").checked; redraw(); });
$("colouring").addEventListener("change", () => colourBy($("colouring").selectedIndex));

// On a phone the panel is a sheet that opens.
const narrow = matchMedia("(max-width: 720px)");
function fold(on) {
  $("panel-body").classList.toggle("folded", on);
  $("sheet").setAttribute("aria-expanded", !on);
}
$("sheet").addEventListener("click", () => fold(!$("panel-body").classList.contains("folded")));
narrow.addEventListener("change", () => fold(narrow.matches));

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
  dark = event.matches;
  readTheme();
  colourBy(colourings.indexOf(colouring));
});

(function start() {
  $("title").textContent = data.title;
  $("about").textContent = data.about;
  $("thumbnails").parentElement.hidden = !thumbs;
  $("colouring").replaceChildren(...colourings.map((one) => element("option", { textContent: one.name })));
  $("colouring").parentElement.hidden = colourings.length < 2;
  fold(narrow.matches);
  readTheme();
  fitView();
  wholeView();
  colourBy(0);
  new ResizeObserver(() => {
    spreads = [];
    fitView();
    moved();
  }).observe(canvas);
})();

// For scripts: where a row is on the screen, and what is selected.
window.robustfeatMap = {
  place: toScreen,
  selected: selectedRows,
  tone: (row) => tone[row],
  current: () => current,
  thumbnails: () => thumbsShown().length,
  look: (x, y, zoom) => {
    Object.assign(view, { x, y, scale: view.fit * zoom });
    draw();
  },
};
