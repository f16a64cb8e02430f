// Sends images to /embed as everyone does: within the server's limits, a batch at a time, again when it is busy.

import { Refusal, request } from "./api.js";
import { byId, count, pause, toast } from "./dom.js";
import { State, store } from "./store.js";

const BATCH = 16;
const BATCH_BYTES = 8 * 2 ** 20; // larger ones would take long on a slow line
const AT_ONCE = 2;
const TRIES = 8; // without an answer
const BUSY_TRIES = 60; // with the answer that there is no room
const LONGEST_PAUSE_S = 10;

export class Embedder {
  #limits;
  #queue = [];
  #total = 0;
  #run = newRun();

  /** `limits` are those of /info, `model` is the name of the model. */
  constructor(limits, model) {
    this.#limits = limits;
    this.model = model;
    byId("cancel").addEventListener("click", () => this.cancel());
    byId("retry").addEventListener("click", () => this.retry());
  }

  /** Embeds images, after those that wait already. */
  add(images) {
    if (!this.#run.workers && !this.#queue.length) this.#total = 0;
    const most = this.#limits.body_bytes - 1024;
    for (const image of images) {
      Object.assign(image, { problem: "", passing: false });
      if (image.file.size > most) fail(image, `larger than the ${Math.round(most / 2 ** 20)} MiB that this server takes`);
      else if (!image.file.size) fail(image, "the file is empty");
      else {
        image.state = State.WAITING;
        this.#queue.push(image);
        this.#total += 1;
      }
    }
    store.changed("images");
    while (this.#run.workers < AT_ONCE && this.#queue.length) this.#work(this.#run);
    this.#show();
  }

  /** Stops; what was not embedded can be embedded later. */
  cancel() {
    this.#endRun();
    this.#show();
    store.changed("images");
  }

  /** Embeds all of them anew, by another model. */
  change(model) {
    this.#endRun();
    this.model = model;
    store.forgetFeatures();
    this.add(store.images);
  }

  /** Embeds those again that failed for a passing reason. */
  retry() {
    this.add(store.images.filter((image) => image.state === State.FAILED && image.passing));
  }

  /** Begins another run. Workers of the old one change nothing any more. */
  #endRun() {
    this.#run.stop.abort(new DOMException("cancelled", "AbortError"));
    this.#run = newRun();
    this.#queue = [];
    for (const image of store.images) if (image.state === State.WAITING || image.state === State.SENT) fail(image, "cancelled", true);
  }

  async #work(run) {
    run.workers += 1;
    const stop = run.stop.signal;
    while (this.#queue.length && !stop.aborted) {
      const batch = this.#take();
      for (const image of batch) image.state = State.SENT;
      const sent = await this.#send(batch, stop);
      this.#show();
      store.changed("images");
      if (!sent) break;
    }
    run.workers -= 1;
    this.#show();
  }

  #take() {
    const batch = [];
    const most = Math.min(BATCH_BYTES, this.#limits.body_bytes - 1024);
    let bytes = 0;
    while (this.#queue.length && batch.length < Math.min(BATCH, this.#limits.items)) {
      bytes += this.#queue[0].file.size + 512;
      if (batch.length && bytes > most) break;
      batch.push(this.#queue.shift());
    }
    return batch;
  }

  /** Sends a batch until it is answered or given up. False where it waits again, since another one took the room; true after `stop`. */
  async #send(batch, stop) {
    for (let attempt = 1; ; attempt += 1) {
      try {
        const form = new FormData();
        // The server needs no names, and headers of parts could not hold all of them.
        batch.forEach((image, at) => form.append("images", image.file, `${at}`));
        const answer = await request(`embed?model=${encodeURIComponent(this.model)}`, { method: "POST", body: form, signal: stop });
        const { data } = await answer.json();
        return stop.aborted || accept(batch, data);
      } catch (error) {
        if (stop.aborted) return true;
        const refused = error instanceof Refusal;
        if (refused && error.data) return accept(batch, error.data); // none of them can be read
        if (refused && error.status === 413 && batch.length > 1) {
          const half = batch.length >> 1;
          if (await this.#send(batch.slice(0, half), stop)) return this.#send(batch.slice(half), stop);
          this.#queue.unshift(...batch.slice(half));
          return false;
        }
        if (refused && error.status === 401) { // no key was given
          failAll(batch, "the server asks for a key", true);
          this.cancel();
          return true;
        }
        const busy = refused && (error.status === 429 || error.status === 503);
        const passing = !refused || error.passing;
        if (!passing || attempt >= (busy ? BUSY_TRIES : TRIES)) return failAll(batch, messageOf(error), passing);
        if (busy && this.#run.workers > 1) {
          this.#queue.unshift(...batch);
          return false;
        }
        const seconds = Math.min(LONGEST_PAUSE_S, error.retryAfterS ?? 2 ** (attempt - 2));
        if (!(await this.#wait(seconds, busy, stop))) return true;
      }
    }
  }

  async #wait(seconds, busy, stop) {
    this.#note = `${busy ? "The server is busy" : "The server does not answer"}; next try in ${Math.ceil(seconds)} s`;
    this.#show();
    try {
      await pause(seconds, stop);
      return true;
    } catch {
      return false;
    } finally {
      this.#note = "";
    }
  }

  #note = "";

  #show() {
    const at = store.images.filter((image) => image.state === State.WAITING || image.state === State.SENT).length;
    const busy = this.#run.workers > 0 || this.#queue.length > 0;
    const finished = !byId("progress").hidden && !busy;
    byId("progress").hidden = !busy;
    byId("progress-bar").max = this.#total || 1;
    byId("progress-bar").value = this.#total - at;
    byId("progress-text").textContent = this.#note || `Embedding ${this.#total - at} of ${count(this.#total, "image")}`;
    const passing = store.images.filter((image) => image.state === State.FAILED && image.passing).length;
    byId("retry").hidden = busy || !passing;
    byId("retry").textContent = `Try ${count(passing, "image")} again`;
    if (finished && store.images.length) {
      const failed = store.images.filter((image) => image.state === State.FAILED).length;
      store.changed("embedded");
      toast(`${count(store.ready.length, "image")} ready${failed ? `, ${failed.toLocaleString("en")} failed` : ""}.`);
    }
  }
}

/** What is sent until the user cancels or chooses another model; `workers` are those still running. */
function newRun() {
  return { stop: new AbortController(), workers: 0 };
}

function accept(batch, data) {
  for (const entry of data) {
    const image = batch[entry.index];
    if (store.images[image.id] !== image) continue; // it was taken away meanwhile
    if (entry.error) {
      fail(image, entry.error.message, entry.error.code === "internal");
    } else {
      store.vectors.set(image.id, entry.embedding);
      Object.assign(image, { state: State.READY, problem: "" });
    }
  }
  return true;
}

function failAll(batch, problem, passing) {
  for (const image of batch) fail(image, problem, passing);
  return true;
}

function fail(image, problem, passing = false) {
  Object.assign(image, { state: State.FAILED, problem, passing });
}

function messageOf(error) {
  return error instanceof Refusal ? error.message : "the server does not answer";
}
