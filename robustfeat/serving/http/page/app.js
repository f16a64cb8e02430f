// The page: its parts, and what happens between them.

import { request } from "./api.js";
import { Classes, safeName } from "./classes.js";
import { announce, baseName, byId, confirm, count, element, toast } from "./dom.js";
import { predictionsCsv, save } from "./download.js";
import { Embedder } from "./embed.js";
import { watchFiles } from "./files.js";
import { Grid } from "./grid.js";
import { watchKeys } from "./keys.js";
import { ImageMap } from "./map.js";
import { Matrix } from "./matrix.js";
import { Selected } from "./selected.js";
import { State, store } from "./store.js";
import { Teacher, uncertain } from "./teach.js";
import { forgetThumbnails } from "./thumbnails.js";

let view = "images";
let saved = true; // whether the labels were downloaded

async function start() {
  const info = await (await request("info")).json();
  const [model] = info.models;

  const grid = new Grid();
  const map = new ImageMap(choose);
  const matrix = new Matrix(choose);
  const embedder = new Embedder(info.limits, model.name);
  const teacher = new Teacher(model.name);
  const classes = new Classes(teacher, label);
  const selected = new Selected(choose);
  showModel(model);

  store.addEventListener("change", ({ detail }) => {
    const has = (...kinds) => kinds.some((kind) => detail.has(kind));
    if (has("images")) showState();
    if (has("images") && store.head) teacher.classify(store.images.filter((image) => image.answer === null));
    if (has("labels")) saved = false;
    if (has("labels") || (has("embedded") && !store.head)) teacher.changed();
    if (has("images", "labels", "answers")) { fillFilter(); order(); }
    if (has("images", "labels", "answers", "selection")) { if (view === "images") grid.draw(); else if (view === "map") map.draw(); else matrix.draw(); selected.draw(); }
    if (has("images", "labels", "answers", "selection", "fit")) classes.draw();
  });

  watchFiles((images) => embedder.add(images));
  watchKeys({ label, accept, next, undo: () => step("undo"), redo: () => step("redo") });
  watchButtons();

  function showModel(chosen) {
    byId("model").textContent = `${chosen.name} · ${count(chosen.feature_size, "feature")}`;
    byId("model").hidden = info.models.length > 1;
    byId("models").hidden = info.models.length < 2;
    const own = (info.collections ?? []).filter((one) => one.model === chosen.name);
    selected.offer(own.map((one) => one.name));
  }

  /** Labels the selected images, and goes on to the next one. */
  function label(classId) {
    const ids = [...store.selected];
    const changed = store.label(ids, classId);
    if (!changed) return;
    const what = classId === null ? "without a label" : `labelled ${store.shownName(classId)}`;
    announce(`${changed === 1 ? baseName(store.images[ids[0]].shown) : count(changed, "image")} ${what}`);
    if (ids.length === 1 && classId !== null) advance(ids[0]);
  }

  /** Selects the image after one that was just labelled: in the order of the grid, or the least certain one. */
  function advance(id) {
    const from = byId("order").value === "uncertain" ? -1 : store.shown.indexOf(id);
    const open = (one) => one !== id && store.images[one].state === State.READY && store.images[one].label === null;
    const found = store.shown.slice(from + 1).find(open) ?? store.shown.find(open);
    if (found !== undefined) store.select([found]);
    grid.reveal();
  }

  function accept() {
    const image = store.active === null ? null : store.images[store.active];
    if (image?.answer && image.label === null) label(image.answer.classId);
  }

  function next() {
    const [first] = uncertain().filter((image) => image.id !== store.active);
    if (!first) return toast(store.head ? "Every image has a label." : "Label images of two classes first.");
    store.select([first.id]);
    grid.reveal();
    announce(`${baseName(first.shown)}, predicted ${store.shownName(first.answer.classId)}`);
  }

  function step(way) {
    const ids = store[way]();
    if (ids === null) return;
    if (ids.length) store.select(ids);
    announce(way === "undo" ? "Undone" : "Redone");
  }

  function choose(id) {
    grid.choose(id);
    grid.reveal();
  }

  function showState() {
    const some = store.images.length > 0;
    document.body.dataset.state = some ? "work" : "empty";
    byId("welcome").hidden = some;
    byId("work").hidden = byId("panel").hidden = !some;
    const failed = store.images.filter((image) => image.state === State.FAILED).length;
    byId("count").textContent = `${count(store.images.length, "image")}${failed ? `, ${failed.toLocaleString("en")} failed` : ""}`;
  }

  /** Puts the images that are to be shown in their order. */
  function order() {
    const filter = byId("filter").value;
    const wanted = {
      all: () => true, open: (image) => image.label === null && image.state === State.READY,
      labelled: (image) => image.label !== null, failed: (image) => image.state === State.FAILED,
    }[filter] ?? ((image) => String(store.classOf(image)) === filter);
    const shown = store.images.filter(wanted);
    const orders = {
      uncertain: (image) => image.answer && image.label === null ? image.answer.certainty : Infinity,
      class: (image) => store.classOf(image) === null ? Infinity : store.classNumber(store.classOf(image)),
      similar: (image) => image.id === like ? -2 : like === null || image.state !== State.READY ? 2 : -store.vectors.cosine(like, image.id),
    };
    const key = orders[byId("order").value];
    if (key) {
      const keys = new Map(shown.map((image) => [image.id, key(image)]));
      shown.sort((a, b) => keys.get(a.id) - keys.get(b.id) || a.id - b.id);
    }
    store.shown = shown.map((image) => image.id);
  }

  let like = null; // the image that "Like the selected one" began with

  function fillFilter() {
    const filter = byId("filter");
    const before = filter.value || "all";
    const options = [["all", "All images"], ["open", "Without a label"], ["labelled", "Labelled"], ["failed", "Failed"],
      ...store.classes.map((one) => [String(one.id), `Class ${store.shownName(one.id).slice(0, 40)}`])];
    const key = JSON.stringify(options);
    if (filter.dataset.key === key) return;
    filter.dataset.key = key;
    filter.replaceChildren(...options.map(([value, text]) => element("option", { value, text })));
    filter.value = options.some(([value]) => value === before) ? before : "all";
  }

  function show(name) {
    view = name;
    for (const button of byId("views").children) button.setAttribute("aria-pressed", button.dataset.view === name);
    for (const other of ["images", "map", "matrix"]) byId(`view-${other}`).hidden = other !== name;
    for (const part of ["filter", "order"]) byId(part).parentElement.hidden = name !== "images";
    store.changed("selection");
  }

  function watchButtons() {
    for (const button of byId("views").children) button.addEventListener("click", () => show(button.dataset.view));
    for (const part of ["filter", "order"]) byId(part).addEventListener("change", () => {
      like = store.active;
      order();
      byId("view-images").scrollTop = 0;
      grid.draw();
    });
    byId("model-choice").append(...info.models.map((one) => element("option", { value: one.name, text: `${one.name} · ${one.feature_size}` })));
    byId("model-choice").addEventListener("change", () => {
      const chosen = info.models.find((one) => one.name === byId("model-choice").value);
      teacher.forget();
      teacher.model = chosen.name;
      embedder.change(chosen.name);
      map.reset();
      showModel(chosen);
      store.changed("answers");
    });
    byId("clear").addEventListener("click", async () => {
      if (!(await confirm("Clear the page? All images and labels leave it; the names of the classes stay.", "Clear"))) return;
      store.clear();
      embedder.cancel();
      grid.clear();
      forgetThumbnails();
      map.reset();
      saved = true;
      byId("choose").focus();
    });
    byId("accept").addEventListener("click", accept);
    byId("next").addEventListener("click", next);
    byId("undo").addEventListener("click", () => step("undo"));
    byId("redo").addEventListener("click", () => step("redo"));
    byId("head-name").addEventListener("input", () => { byId("head-folder").textContent = safeName(byId("head-name").value); });
    byId("download-csv").addEventListener("click", () => { save(predictionsCsv(), `${safeName(byId("head-name").value)}-predictions.csv`); saved = true; });
    byId("download-head").addEventListener("click", download);
    byId("panel-toggle").addEventListener("click", () => {
      const open = byId("panel").classList.toggle("closed") === false;
      byId("panel-toggle").setAttribute("aria-expanded", open);
    });
    addEventListener("beforeunload", (event) => { if (!saved && store.images.some((image) => image.label !== null)) event.preventDefault(); });
  }

  async function download() {
    const button = byId("download-head");
    const name = safeName(byId("head-name").value);
    button.disabled = true;
    try {
      save(await teacher.archive(name), `${name}.zip`);
      saved = true;
    } catch (error) {
      toast(`The head was not downloaded: ${error.message}.`);
    }
    button.disabled = false;
  }
}

byId("help-open").addEventListener("click", () => byId("help").showModal());
start().catch((error) => {
  toast(error.status === 401 ? "This server asks for a key; load the page again to give one." : `The server does not answer: ${error.message}.`, 3600);
});
