// The features of all images in one array, and what can be told from them.

export class Vectors {
  #values = new Float32Array(0);
  #norms = [];
  size = 0;
  version = 0; // another one when features were forgotten

  /** Sets the features of image `id`. */
  set(id, features) {
    this.size ||= features.length;
    if ((id + 1) * this.size > this.#values.length) {
      const larger = new Float32Array(Math.max(64, 2 * (id + 1)) * this.size);
      larger.set(this.#values);
      this.#values = larger;
    }
    this.#values.set(features, id * this.size);
    let sum = 0;
    for (const value of features) sum += value * value;
    this.#norms[id] = Math.sqrt(sum) || 1;
  }

  /** The features of image `id`. */
  of(id) {
    return this.#values.subarray(id * this.size, (id + 1) * this.size);
  }

  norm(id) {
    return this.#norms[id];
  }

  /** The cosine of two images. */
  cosine(a, b) {
    return dot(this.of(a), this.of(b)) / (this.#norms[a] * this.#norms[b]);
  }

  clear() {
    this.#values = new Float32Array(0);
    this.#norms = [];
    this.size = 0;
    this.version += 1;
  }
}

function dot(a, b) {
  let sum = 0;
  for (let at = 0; at < a.length; at += 1) sum += a[at] * b[at];
  return sum;
}

/** The `most` of `ids` that are most similar to image `id`, as [id, cosine]. */
export function nearest(vectors, id, ids, most) {
  const found = ids.filter((other) => other !== id).map((other) => [other, vectors.cosine(id, other)]);
  return found.sort((a, b) => b[1] - a[1]).slice(0, most);
}

/** `ids` in an order in which neighbours are alike: from each image to the most similar one that is left. */
export function chain(vectors, ids) {
  const left = new Set(ids);
  const order = [];
  let at = ids[0];
  while (left.size) {
    left.delete(at);
    order.push(at);
    let best = -2;
    let next = -1;
    for (const other of left) {
      const cosine = vectors.cosine(at, other);
      if (cosine > best) [best, next] = [cosine, other];
    }
    at = next;
  }
  return order;
}

const FITTED = 1500;
const ROUNDS = 24;

/** The first two principal components of unit vectors: a Map of id to [x, y], each within about -1 and 1. */
export function principal(vectors, ids) {
  const size = vectors.size;
  const step = Math.max(1, Math.ceil(ids.length / FITTED)); // of many, some show the directions
  const some = ids.filter((_, at) => at % step === 0);
  const mean = new Float64Array(size);
  for (const id of some) add(mean, vectors.of(id), 1 / (vectors.norm(id) * some.length));
  const axes = [];
  for (let axis = 0; axis < 2; axis += 1) {
    let direction = Float64Array.from({ length: size }, (_, at) => Math.sin(1 + at * (axis + 1)));
    for (let round = 0; round < ROUNDS; round += 1) {
      for (const known of axes) add(direction, known, -dot(direction, known));
      const next = new Float64Array(size);
      const shift = dot(direction, mean);
      let total = 0;
      for (const id of some) {
        const along = dot(direction, vectors.of(id)) / vectors.norm(id) - shift;
        add(next, vectors.of(id), along / vectors.norm(id));
        total += along;
      }
      add(next, mean, -total);
      const length = Math.sqrt(dot(next, next)) || 1;
      direction = next.map((value) => value / length);
    }
    for (const known of axes) add(direction, known, -dot(direction, known));
    axes.push(direction);
  }
  const places = ids.map((id) => axes.map((axis) => dot(axis, vectors.of(id)) / vectors.norm(id) - dot(axis, mean)));
  const spread = Math.max(1e-9, ...places.slice(0, 20000).map(([x, y]) => Math.max(Math.abs(x), Math.abs(y))));
  return new Map(ids.map((id, at) => [id, places[at].map((value) => value / spread)]));
}

function add(sum, values, factor) {
  for (let at = 0; at < sum.length; at += 1) sum[at] += factor * values[at];
}
