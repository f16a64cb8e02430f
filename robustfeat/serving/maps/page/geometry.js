// Points by place: the nearest one, those in a polygon, and which thumbnails have room beside each other.

const GRID = 256;
const gridStart = new Uint32Array(GRID * GRID + 1);
const gridRows = new Uint32Array(count);

function cellOf(value) {
  return Math.min(GRID - 1, Math.max(0, Math.floor(value * GRID)));
}

(function fillGrid() {
  const cells = new Uint32Array(count);
  for (let row = 0; row < count; row++) {
    cells[row] = cellOf(ys[row]) * GRID + cellOf(xs[row]);
    gridStart[cells[row] + 1]++;
  }
  for (let cell = 0; cell < GRID * GRID; cell++) gridStart[cell + 1] += gridStart[cell];
  const next = gridStart.slice();
  for (let row = 0; row < count; row++) gridRows[next[cells[row]]++] = row;
})();

// Calls `visit` with each row whose place lies in the box, or near it.
function inBox(left, top, right, bottom, visit) {
  for (let y = cellOf(top); y <= cellOf(bottom); y++) {
    const line = y * GRID;
    for (let at = gridStart[line + cellOf(left)]; at < gridStart[line + cellOf(right) + 1]; at++) visit(gridRows[at]);
  }
}

// The nearest row that is shown, at most `reach` away; -1 without one.
function nearest(x, y, reach, shown) {
  let best = -1;
  let least = reach * reach;
  inBox(x - reach, y - reach, x + reach, y + reach, (row) => {
    const distance = (xs[row] - x) ** 2 + (ys[row] - y) ** 2;
    if (distance <= least && shown[row]) {
      least = distance;
      best = row;
    }
  });
  return best;
}

// The nearest shown row in a direction, within 45 degrees of it; -1 without one.
function neighbour(from, dx, dy, shown) {
  let best = -1;
  let least = Infinity;
  for (let row = 0; row < count; row++) {
    if (!shown[row] || row === from) continue;
    const ahead = (xs[row] - xs[from]) * dx + (ys[row] - ys[from]) * dy;
    const aside = Math.abs((xs[row] - xs[from]) * dy - (ys[row] - ys[from]) * dx);
    if (ahead <= 0 || aside > ahead) continue;
    const cost = ahead + 2 * aside;
    if (cost < least) {
      least = cost;
      best = row;
    }
  }
  return best;
}

// The shown rows within a polygon of [x, y], by the even-odd rule.
function inPolygon(corners, shown) {
  const across = corners.map((corner) => corner[0]);
  const down = corners.map((corner) => corner[1]);
  const found = [];
  inBox(Math.min(...across), Math.min(...down), Math.max(...across), Math.max(...down), (row) => {
    if (!shown[row]) return;
    let inside = false;
    for (let at = 0, before = corners.length - 1; at < corners.length; before = at++) {
      const crosses = (down[at] > ys[row]) !== (down[before] > ys[row]);
      if (crosses) {
        const place = across[at] + ((ys[row] - down[at]) * (across[before] - across[at])) / (down[before] - down[at]);
        if (xs[row] < place) inside = !inside;
      }
    }
    if (inside) found.push(row);
  });
  return found.sort((one, other) => one - other);
}

// Rows whose thumbnails do not overlap if each is `side` wide: those in `kept`, then others in the order of drawing.
function spread(side, kept, shown) {
  const cells = new Map();
  const columns = Math.ceil(1 / side) + 3;
  const placed = [];
  function hasRoom(row, column, line) {
    for (let dy = -1; dy <= 1; dy++) {
      for (let dx = -1; dx <= 1; dx++) {
        const others = cells.get((line + dy) * columns + column + dx);
        if (others === undefined) continue;
        for (const other of others) {
          if (Math.abs(xs[other] - xs[row]) < side && Math.abs(ys[other] - ys[row]) < side) return false;
        }
      }
    }
    return true;
  }
  function place(row, forced) {
    const column = Math.floor(xs[row] / side) + 1;
    const line = Math.floor(ys[row] / side) + 1;
    if (!forced && !hasRoom(row, column, line)) return;
    const key = line * columns + column;
    const there = cells.get(key);
    if (there) there.push(row);
    else cells.set(key, [row]);
    placed.push(row);
  }
  const known = new Uint8Array(count);
  for (const row of kept) {
    known[row] = 1;
    place(row, true);
  }
  for (const row of order) if (shown[row] && !known[row] && thumbOf[row] >= 0) place(row, false);
  return placed;
}
