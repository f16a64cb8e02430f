// Fits a head whenever labels change: the server gets labelled features and keeps nothing.

import { Refusal, request } from "./api.js";
import { announce, count, pause, percent } from "./dom.js";
import { Head, base64 } from "./head.js";
import { State, store } from "./store.js";

const REST_S = 0.15; // after a label: the next one may come at once
const MOST_ROWS = 1000;
const TRIES = 5;

export class Teacher {
  #fitting = null;
  state = "";
  busy = false;

  /** `model` is the name under which the features were asked for. */
  constructor(model) {
    this.model = model;
  }

  /** The labelled images that are fitted. */
  get rows() {
    return store.images.filter((image) => image.label !== null && image.state === State.READY).slice(0, MOST_ROWS);
  }

  get possible() {
    return new Set(this.rows.map((image) => image.label)).size > 1;
  }

  /** Forgets the fit that runs, and what was told of the last one. */
  forget() {
    this.#fitting?.abort();
    this.busy = false;
    this.state = "";
  }

  /** Labels have changed: fits, and forgets the fit that runs. */
  async changed() {
    this.#fitting?.abort();
    if (!this.possible) {
      this.forget();
      store.head = null;
      for (const image of store.images) image.answer = null;
      store.changed("answers");
      return;
    }
    this.#fitting = new AbortController();
    const { signal } = this.#fitting;
    this.busy = true;
    store.changed("fit");
    try {
      await pause(REST_S, signal);
      const began = performance.now();
      const answer = await this.#ask("application/json", "head", signal);
      store.head = new Head(await answer.json());
      this.classify(store.images);
      this.state = describe(store.head);
      this.seconds = (performance.now() - began) / 1000;
      announce(this.state);
    } catch (error) {
      if (signal.aborted) return;
      this.state = `Not fitted: ${error.message}.`;
      announce(this.state);
    }
    this.busy = false;
    store.changed("answers");
  }

  /** The head's folder in a zip file, as a Blob. */
  async archive(name) {
    return (await this.#ask("application/zip", name)).blob();
  }

  async #ask(accept, name, signal) {
    const { rows } = this;
    const classes = store.classes.filter(({ id }) => rows.some((image) => image.label === id));
    const features = new Float32Array(rows.length * store.vectors.size);
    rows.forEach((image, at) => features.set(store.vectors.of(image.id), at * store.vectors.size));
    const labels = rows.map((image) => classes.findIndex(({ id }) => id === image.label));
    const body = JSON.stringify({
      model: this.model, classes: classes.map((one) => one.name), labels, features: base64(features), name,
    });
    for (let attempt = 1; ; attempt += 1) {
      try {
        return await request("teach", { method: "POST", body, headers: { accept, "content-type": "application/json" }, signal });
      } catch (error) {
        if (signal?.aborted || attempt === TRIES || (error instanceof Refusal && !error.passing)) {
          throw error instanceof Refusal ? error : new Error("the server does not answer");
        }
        await pause(error.retryAfterS ?? attempt, signal);
      }
    }
  }

  /** Lets the head say what images are. */
  classify(images) {
    const { head } = store;
    const ids = head.classes.map((name) => store.classes.find((one) => one.name === name)?.id ?? null);
    for (const image of images) {
      if (image.state !== State.READY) continue;
      const { best, share, shares, certainty } = head.answer(store.vectors.of(image.id), store.vectors.norm(image.id));
      const known = head.calibration !== null;
      image.answer = { classId: ids[best], share: known ? share : null, shares: known ? shares : null, ids, certainty };
    }
  }
}

/** The images to label next: the least certain ones first. */
export function uncertain() {
  return store.images.filter((image) => image.answer && image.label === null)
    .sort((a, b) => a.answer.certainty - b.answer.certainty);
}

function describe(head) {
  const on = `Fitted on ${count(head.rows, "label")}`;
  if (head.accuracy === null || head.rowsScored < 4) return `${on}. Label a few more of each class.`;
  return `${on}; about ${percent(head.accuracy)} right on labels that it had not seen.`;
}
