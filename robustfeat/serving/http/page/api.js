// The server's API: its errors as objects, and the key that it may ask for.

import { byId } from "./dom.js";

const STORED = "robustfeat-key"; // in sessionStorage, which ends with the tab

/** An answer that is no success. */
export class Refusal extends Error {
  constructor(status, error, retryAfterS, data) {
    super(error?.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.code = error?.code ?? "";
    this.retryAfterS = retryAfterS;
    this.data = data; // of each image
  }

  /** Whether the same request may succeed later. */
  get passing() {
    return this.status === 429 || this.status >= 500 || this.status === 408;
  }
}

let key = sessionStorage.getItem(STORED) ?? "";
let asking = null;

/** Sends a request to a path of this server, and asks for a key where one is needed. */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  for (;;) {
    const used = key;
    const sent = used ? { ...headers, authorization: `Bearer ${used}` } : headers;
    const answer = await fetch(path, { method, body, headers: sent, signal });
    if (answer.ok) return answer;
    const refusal = await read(answer);
    if (refusal.status !== 401) throw refusal;
    if (used === key) await ask(refusal, used !== "");
  }
}

async function read(answer) {
  let content = {};
  try {
    content = await answer.json();
  } catch { /* no answer of ours: of a proxy, perhaps */ }
  const error = typeof content?.error === "object" ? content.error : undefined;
  const seconds = Number(answer.headers.get("retry-after"));
  return new Refusal(answer.status, error, seconds > 0 ? seconds : null, content?.data);
}

function ask(refusal, wrong) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("key-dialog");
    byId("key-error").hidden = !wrong;
    byId("key").value = "";
    byId("key-cancel").onclick = () => dialog.close("cancel");
    byId("key-form").onsubmit = () => { dialog.returnValue = "given"; };
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      const given = byId("key").value.trim();
      byId("key").value = "";
      // Header values are ASCII; so are our keys.
      if (dialog.returnValue !== "given" || !/^[\x21-\x7e]+$/.test(given)) return reject(refusal);
      key = given;
      sessionStorage.setItem(STORED, given);
      resolve();
    }, { once: true });
  });
  return asking;
}
