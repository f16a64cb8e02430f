// What the server answers for labels: a linear head, whose answers for all images are computed here.

/** A head of /teach. */
export class Head {
  constructor(answer) {
    this.classes = answer.classes;
    this.accuracy = answer.accuracy;
    this.rows = answer.rows;
    this.rowsScored = answer.rows_scored;
    this.calibration = answer.calibration;
    this.coefficients = floats(answer.coefficients);
    this.intercepts = floats(answer.intercepts);
    if (answer.kind !== "svm" || answer.scaling !== "l2") throw new Error(`a head of kind ${answer.kind} is not known`);
  }

  /** The margin of each class for one image; `norm` is that of its features. */
  margins(features, norm) {
    const size = features.length;
    const margins = [...this.intercepts];
    for (let row = 0; row < margins.length; row += 1) {
      let sum = 0;
      for (let at = 0; at < size; at += 1) sum += this.coefficients[row * size + at] * features[at];
      margins[row] += sum / norm;
    }
    return margins.length === 1 ? [-margins[0], margins[0]] : margins;
  }

  /** Shares of the classes that add up to 1. Without calibration they only have the margins' order. */
  probabilities(margins) {
    const { scale, offset } = this.calibration ?? { scale: margins.map(() => 1), offset: margins.map(() => 0) };
    const logits = scale.length === 1
      ? [0, margins[1] * scale[0] + offset[0]]
      : margins.map((margin, at) => margin * scale[at] + offset[at]);
    const largest = Math.max(...logits);
    const powers = logits.map((logit) => Math.exp(logit - largest));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((power) => power / sum);
  }

  /** What the head says of an image: the number of the class, its share, all shares, and how certain it is. */
  answer(features, norm) {
    const margins = this.margins(features, norm);
    const shares = this.probabilities(margins);
    const best = margins.indexOf(Math.max(...margins));
    const second = Math.max(...margins.filter((_, at) => at !== best));
    return { best, share: shares[best], shares, certainty: margins[best] - second };
  }
}

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Float64Array(bytes.buffer);
}

/** float32 values as base64. */
export function base64(values) {
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}
