// What the page holds: points, their paths, colourings, layers and thumbnails.
// Arrays are base64 of little-endian numbers, as every browser's typed arrays are.

function decode(text, Type) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Type(bytes.buffer);
}

const data = JSON.parse(document.getElementById("data").textContent);
const count = data.paths.length;
const xs = decode(data.x, Float32Array);  // from 0 to 1, as are ys
const ys = decode(data.y, Float32Array);
const order = decode(data.order, Uint32Array);  // the points in the order in which they are drawn
const colourings = data.colourings.map((one) => ({
  ...one, values: decode(one.values, one.kind === "categories" ? Int32Array : Float32Array),
}));
const layers = data.layers.map((one) => ({
  ...one, rows: decode(one.rows, Int32Array), groups: one.groups ? decode(one.groups, Int32Array) : null, on: false,
}));

// Where each point's thumbnail is, -1 without one.
const thumbs = data.thumbnails;
const thumbOf = new Int32Array(count).fill(-1);
if (thumbs) decode(thumbs.rows, Int32Array).forEach((row, at) => { thumbOf[row] = at; });
const perSheet = thumbs ? thumbs.columns * thumbs.columns : 1;
const sheets = thumbs ? Array.from(document.querySelectorAll("script.sheet"), (block) => ({ block, image: null })) : [];

// The sheet of a thumbnail, once it is decoded; `ready` is called when it is.
function sheetOf(at, ready) {
  const sheet = sheets[Math.floor(at / perSheet)];
  if (!sheet.image) {
    sheet.image = new Image();
    sheet.image.src = "data:image/webp;base64," + sheet.block.textContent;
    sheet.image.decode().then(() => { sheet.ready = true; ready(); }, () => { sheet.failed = true; });
  }
  return sheet.ready ? sheet.image : null;
}

// Draws a point's thumbnail into a square of a canvas; false while there is none.
function drawThumb(context, row, left, top, side, ready) {
  const at = thumbOf[row];
  const image = at < 0 ? null : sheetOf(at, ready);
  if (!image) return false;
  const place = at % perSheet;
  const own = thumbs.side;
  context.drawImage(
    image, (place % thumbs.columns) * own, Math.floor(place / thumbs.columns) * own, own, own, left, top, side, side,
  );
  return true;
}

function format(number) {
  return number.toLocaleString("en");
}

function said(value) {
  return Number.isNaN(value) ? "unknown" : Number(value.toPrecision(3)).toString();
}

// The value of a colouring for a row, as text; empty where there is none.
function valueText(colouring, row) {
  const value = colouring.values[row];
  if (colouring.kind === "categories") return value < 0 ? "" : colouring.names[value];
  return Number.isNaN(value) ? "" : said(value);
}
