// Colours for categories and numbers, for light and dark pages; see palette.py.

let dark = matchMedia("(prefers-color-scheme: dark)").matches;
let theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "paper", "panel", "faint", "line", "dim", "accent", "mark", "halo"]) {
    theme[name] = style.getPropertyValue("--" + name).trim();
  }
  theme.categories = data.palettes[dark ? "dark" : "light"];
  theme.scale = data.scales[dark ? "dark" : "light"];
}

// As a pixel of ImageData: 0xAABBGGRR in the memory of a little-endian machine, as a signed number.
function pixelOf(hex) {
  const value = parseInt(hex.slice(1), 16);
  return (0xff000000 | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) | 0;
}

function hexOf(red, green, blue) {
  return "#" + [red, green, blue].map((part) => Math.round(part).toString(16).padStart(2, "0")).join("");
}

// The colour of a share of a scale, from 0 to 1.
function scaleColour(share) {
  const place = Math.min(1, Math.max(0, share)) * (theme.scale.length - 1);
  const low = Math.min(theme.scale.length - 2, Math.floor(place));
  const mixed = theme.scale[low].map((part, at) => part + (place - low) * (theme.scale[low + 1][at] - part));
  return hexOf(...mixed);
}

function categoryColour(colouring, category) {
  return category < 0 ? theme.dim : theme.categories[colouring.colours[category]];
}

// The colour of each row as text: for frames, rings and legends.
function colourOf(colouring, row) {
  const value = colouring.values[row];
  if (colouring.kind === "categories") return categoryColour(colouring, value);
  return Number.isNaN(value) ? theme.dim : scaleColour((value - colouring.low) / (colouring.high - colouring.low || 1));
}

// (count,) pixels.
function pixelsOf(colouring) {
  const pixels = new Int32Array(count);
  if (colouring.kind === "categories") {
    const known = colouring.names.map((_, category) => pixelOf(categoryColour(colouring, category)));
    const none = pixelOf(theme.dim);
    for (let row = 0; row < count; row++) pixels[row] = colouring.values[row] < 0 ? none : known[colouring.values[row]];
  } else {
    const steps = Array.from({ length: 256 }, (_, step) => pixelOf(scaleColour(step / 255)));
    const none = pixelOf(theme.dim);
    const width = colouring.high - colouring.low || 1;
    for (let row = 0; row < count; row++) {
      const value = colouring.values[row];
      const step = Math.round((255 * (value - colouring.low)) / width);
      pixels[row] = Number.isNaN(value) ? none : steps[Math.min(255, Math.max(0, step))];
    }
  }
  return pixels;
}
