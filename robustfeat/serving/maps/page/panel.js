// The panel: what is coloured how, which points are shown, what stands out, and what is selected.
// Paths and labels come from strangers: they become text of elements, never markup.

const $ = (id) => document.getElementById(id);

function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

let found = null;  // rows of the search, or null

function refreshTone() {
  const anyLayer = layers.some((layer) => layer.on);
  const wanted = found && new Uint8Array(count);
  if (found) for (const row of found) wanted[row] = 1;
  for (let row = 0; row < count; row++) {
    const stands = (!wanted || wanted[row])
      && (!anyLayer || marked[row] || selected[row])
      && (pointed < 0 || colouring.values[row] === pointed);
    tone[row] = !shown[row] ? HIDDEN : stands ? FULL : DIM;
  }
  refreshDrawn();
  redraw();
}

function refreshShown() {
  shown = new Uint8Array(count);
  for (let row = 0; row < count; row++) {
    const value = colouring.values[row];
    if (colouring.kind === "categories") shown[row] = value < 0 ? !colouring.noneOff : !colouring.off[value];
    else if (Number.isNaN(value)) shown[row] = !colouring.filtered;
    else shown[row] = value >= colouring.from && value <= colouring.to;
  }
  spreads = [];
  refreshTone();
}

function refreshMarked() {
  marked.fill(0);
  for (const layer of layers) if (layer.on) layer.rows.forEach((row) => { marked[row] = 1; });
  refreshTone();
}

for (const one of colourings) {
  if (one.kind === "categories") {
    one.counts = new Uint32Array(one.names.length);
    one.none = 0;
    for (const value of one.values) value < 0 ? one.none++ : one.counts[value]++;
    one.byCount = Array.from(one.names.keys()).sort((a, b) => one.counts[b] - one.counts[a] || a - b);
    one.off = new Uint8Array(one.names.length);
    one.noneOff = false;
  } else Object.assign(one, { from: -Infinity, to: Infinity, filtered: false });
}

function colourBy(at) {
  colouring = colourings[at];
  pointed = -1;
  pixels = pixelsOf(colouring);
  const categories = colouring.kind === "categories";
  $("colouring-note").hidden = !colouring.note;
  $("colouring-note").textContent = colouring.note || "";
  $("legend").hidden = $("legend-tools").hidden = !categories || !colouring.names.length;
  $("scale").hidden = categories;
  if (categories) drawLegend();
  else drawScale();
  refreshShown();
}

function legendItem(category) {
  const box = element("input", { type: "checkbox", checked: category < 0 ? !colouring.noneOff : !colouring.off[category] });
  const swatch = element("span", { className: "swatch" });
  swatch.style.setProperty("--own", category < 0 ? theme.faint : categoryColour(colouring, category));
  const name = category < 0 ? "none" : colouring.names[category];
  const total = element("span", { className: "count", textContent: format(category < 0 ? colouring.none : colouring.counts[category]) });
  const only = element("button", { textContent: "only", ariaLabel: `Show only ${name}` });
  const item = element("li", {}, element("label", { title: name }, box, swatch, element("bdi", { textContent: name }), total), only);
  box.addEventListener("change", () => {
    if (category < 0) colouring.noneOff = !box.checked;
    else colouring.off[category] = box.checked ? 0 : 1;
    refreshShown();
  });
  only.addEventListener("click", () => setLegend((other) => other === category));
  const point = (to) => () => { pointed = to; refreshTone(); };
  if (category >= 0) {
    item.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") point(category)(); });
    item.addEventListener("pointerleave", point(-1));
  }
  return item;
}

function drawLegend() {
  const items = colouring.byCount.map(legendItem);
  if (colouring.none) items.push(legendItem(-1));
  $("legend").replaceChildren(...items);
}

function setLegend(isOn) {
  colouring.names.forEach((_, category) => { colouring.off[category] = isOn(category, !colouring.off[category]) ? 0 : 1; });
  colouring.noneOff = !isOn(-1, !colouring.noneOff);
  $("legend").querySelectorAll("input").forEach((box, at) => {
    box.checked = at < colouring.byCount.length ? !colouring.off[colouring.byCount[at]] : !colouring.noneOff;
  });
  refreshShown();
}

$("all").addEventListener("click", () => setLegend(() => true));
$("none").addEventListener("click", () => setLegend(() => false));
$("invert").addEventListener("click", () => setLegend((_, was) => !was));

// Numbers: a histogram in the colours of the map, and the range that is shown.
const BARS = 50;
function drawScale() {
  const bars = new Uint32Array(BARS);
  const width = colouring.high - colouring.low || 1;
  for (const value of colouring.values) {
    if (!Number.isNaN(value)) bars[Math.min(BARS - 1, Math.max(0, Math.floor((BARS * (value - colouring.low)) / width)))]++;
  }
  const target = $("histogram");
  const box = target.getBoundingClientRect();
  target.width = (box.width || 268) * view.ratio;
  target.height = (box.height || 56) * view.ratio;
  const brush = target.getContext("2d");
  const highest = Math.max(1, ...bars);
  const step = target.width / BARS;
  bars.forEach((bar, at) => {
    const tall = bar ? Math.max(view.ratio, (target.height * bar) / highest) : 0;
    brush.fillStyle = scaleColour((at + 0.5) / BARS);
    brush.fillRect(at * step, target.height - tall, step - view.ratio / 2, tall);
  });
  for (const [id, bound] of [["least", "from"], ["most", "to"]]) {
    const given = colouring[bound];
    const share = Number.isFinite(given) ? (100 * (given - colouring.low)) / width : id === "least" ? 0 : 100;
    $(id).value = share;
    $(id).nextElementSibling.textContent = said(colouring.low + (share / 100) * width);
  }
}

for (const [id, bound] of [["least", "from"], ["most", "to"]]) {
  $(id).addEventListener("input", () => {
    const share = Number($(id).value) / 100;
    const value = colouring.low + share * (colouring.high - colouring.low);
    const open = id === "least" ? share === 0 : share === 1;
    colouring[bound] = open ? (id === "least" ? -Infinity : Infinity) : value;
    colouring.filtered = Number.isFinite(colouring.from) || Number.isFinite(colouring.to);
    $(id).nextElementSibling.textContent = said(value);
    refreshShown();
  });
}

// Layers
layers.forEach((layer) => {
  const box = element("input", { type: "checkbox" });
  const swatch = element("span", { className: "swatch ring" });
  swatch.style.setProperty("--own", "var(--mark)");
  const take = element("button", { textContent: "select", ariaLabel: `Select ${layer.name}` });
  const total = element("span", { className: "count", textContent: format(layer.rows.length) });
  box.addEventListener("change", () => { layer.on = box.checked; refreshMarked(); });
  take.addEventListener("click", () => select(Array.from(layer.rows), false));
  $("layers").append(element("li", {}, element(
    "label", { title: layer.note || layer.name }, box, swatch, element("bdi", { textContent: layer.name }), total,
  ), take));
});
$("layers-section").hidden = !layers.length;

// Search
let lowered = null;
let at = -1;
function search() {
  const wanted = $("search").value.trim().toLowerCase();
  lowered ||= data.paths.map((path) => path.toLowerCase());
  found = null;
  at = -1;
  if (wanted) {
    found = [];
    for (let row = 0; row < count; row++) if (lowered[row].includes(wanted)) found.push(row);
  }
  $("found").hidden = $("take-found").hidden = !found;
  if (found) $("found").textContent = `${format(found.length)} found${found.length ? "; Enter shows the next" : ""}`;
  refreshTone();
}

$("search").addEventListener("input", search);
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && found && found.length) {
    at = (at + (event.shiftKey ? found.length - 1 : 1)) % found.length;
    goTo(found[at]);
  } else if (event.key === "Escape") {
    $("search").value = "";
    search();
    canvas.focus();
  }
});
$("take-found").addEventListener("click", () => select(found, false));

// Selection
function selectedRows() {
  const rows = [];
  for (let row = 0; row < count; row++) if (selected[row]) rows.push(row);
  return rows;
}

function select(rows, added) {
  if (!added) selected.fill(0);
  for (const row of rows) selected[row] = 1;
  refreshSelection();
}

function refreshSelection() {
  const rows = selectedRows();
  const some = rows.length > 0;
  $("selected").textContent = some
    ? `${format(rows.length)} ${rows.length === 1 ? "image" : "images"}`
    : "None. Use the lasso, or press Enter on an image.";
  for (const id of ["save-csv", "save-paths", "clear"]) $(id).disabled = !some;
  drawContact(rows);
  refreshTone();
}

const CONTACT_COLUMNS = 6;
function drawContact(rows) {
  const with_image = rows.filter((row) => thumbOf[row] >= 0);
  const target = $("contact");
  target.hidden = !with_image.length;
  if (!with_image.length) return;
  const some = with_image.slice(0, 5 * CONTACT_COLUMNS);
  const wide = Math.round((target.getBoundingClientRect().width || 268) * view.ratio);
  const gap = 3 * view.ratio;
  const side = (wide - gap * (CONTACT_COLUMNS - 1)) / CONTACT_COLUMNS;
  target.width = wide;
  target.height = Math.ceil(some.length / CONTACT_COLUMNS) * (side + gap) - gap;
  const brush = target.getContext("2d");
  brush.imageSmoothingQuality = "high";
  const paint = () => some.forEach((row, place) => {
    const left = (place % CONTACT_COLUMNS) * (side + gap);
    drawThumb(brush, row, left, Math.floor(place / CONTACT_COLUMNS) * (side + gap), side, paint);
  });
  paint();
}

// Saving: paths keep the bytes of their names; cells that a spreadsheet would run get a ' in front.
const FORMULA = /^'*[=+\-@\t\r\n]/;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/;
function cell(text) {
  const safe = FORMULA.test(text) && !NUMBER.test(text) ? "'" + text : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function pathBytes(row) {
  const raw = data.raw[row];
  return raw === undefined ? new TextEncoder().encode(data.paths[row]) : decode(raw, Uint8Array);
}

// The path's cell: the bytes as they are, and every other mark of CSV as `cell` writes it.
function pathCell(row) {
  const raw = data.raw[row];
  if (raw === undefined) return cell(data.paths[row]);
  const bytes = decode(raw, Uint8Array);
  const text = cell(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

function save(name, parts, type) {
  const link = element("a", { href: URL.createObjectURL(new Blob(parts, { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

$("save-csv").addEventListener("click", () => {
  const parts = [["path", ...colourings.map((one) => one.name)].map(cell).join(",") + "\n"];
  for (const row of selectedRows()) {
    parts.push(pathCell(row), ...colourings.map((one) => "," + cell(valueText(one, row))), "\n");
  }
  save("selection.csv", parts, "text/csv");
});

$("save-paths").addEventListener("click", () => {
  const rows = selectedRows();
  const broken = rows.filter((row) => data.paths[row].includes("\n")).length;
  if (broken) {
    say(`${broken} of the paths hold a line break: save CSV instead`);
    $("selected").textContent = `${broken} of the paths hold a line break: save CSV instead.`;
    return;
  }
  save("selection.txt", rows.flatMap((row) => [pathBytes(row), "\n"]), "text/plain");
});

$("clear").addEventListener("click", () => select([], false));

function takeView() {
  const rows = [];
  for (let row = 0; row < count; row++) {
    if (tone[row] !== FULL) continue;
    const [x, y] = toScreen(row);
    if (x >= 0 && y >= 0 && x <= view.width && y <= view.height) rows.push(row);
  }
  select(rows, true);
}
$("take-view").addEventListener("click", takeView);

function say(text) {
  $("said").textContent = text;
}
