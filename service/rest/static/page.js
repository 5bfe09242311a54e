// The page: connects what is on it with the session about the photograph on view.

import { Api } from "./api.js";
import { maskFromRecord, saveCoco, savePng } from "./downloads.js";
import { factsFromSession } from "./facts.js";
import { Gestures } from "./gestures.js";
import { askForKey, isAskingForKey } from "./keys.js";
import { labelsFromRecords, layerFromLabels, layerFromRle } from "./masks.js";
import { photoFromBlob } from "./photo.js";
import { Session } from "./session.js";
import { View } from "./view.js";

const PREVIEW = { opacity: 0.28, thickness: 1 };
const RECORD = { color: [255, 255, 255], opacity: 0.35 };
const STAGE_HEIGHT = 0.72; // of the window, so that the status line stays in sight

const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const frame = element("frame");

let session = null;
let opening = 0; // counts, so that of two photographs opened quickly the later one stays
let dragged = null; // the box under the hand
let again = null; // what "Try again" does
let fitted = {};
let layers = new Map(); // of masks, for the canvas's present size
let labels = null; // of everything-mode's records, likewise: {records, map, layer}

const api = new Api({
  askForKey,
  onWait: (message, seconds) => busy(`${sentence(message)} Trying again in ${seconds} s …`),
});
const room = () => ({ width: frame.clientWidth, height: Math.max(240, STAGE_HEIGHT * window.innerHeight) });
const view = new View(canvas, room);
const isRemoving = () => document.querySelector("[name=label]:checked").value === "remove";
const gestures = new Gestures(view, isRemoving, {
  point: (x, y, label) => (session.records ? session.select(recordAt(x, y)) : session.addPoint(x, y, label)),
  box: (box) => session.records || session.setBox(box),
  dragging: (box) => {
    dragged = session?.records ? null : box;
    draw();
  },
  hover: (x, y) => session.hover(x, y),
  leave: () => session?.stopPreview(),
  moved: draw,
});

// What is said

function busy(text) {
  frame.setAttribute("aria-busy", "true");
  element("problem").hidden = true;
  element("status").textContent = text;
}

function isBusy() {
  return frame.getAttribute("aria-busy") === "true";
}

function done(text) {
  frame.setAttribute("aria-busy", "false");
  element("problem").hidden = true;
  element("status").textContent = text;
}

function failed(error, retry) {
  const isMissing = error.reason === "not_found"; // the route, that is: a photograph would be image_not_cached
  frame.setAttribute("aria-busy", "false");
  element("status").textContent = "";
  element("problem-text").textContent = isMissing ? "This server has no everything-mode." : sentence(error.message);
  if (isMissing) element("everything").disabled = true;
  again = isMissing ? null : retry;
  element("again").hidden = !again;
  element("problem").hidden = false;
}

function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

// What is shown

function layerOf(rle, options) {
  if (!layers.has(rle)) layers.set(rle, layerFromRle(rle, view.columns, view.rows, options));
  return layers.get(rle);
}

function shownLayers() {
  if (session.records) {
    const shown = [layerFromRecords()];
    const record = session.records[session.selected];
    if (record) shown.push(layerOf(record.segmentation, RECORD));
    return shown;
  }
  if (session.mask) return [layerOf(session.mask.rle)];
  if (session.preview) return [layerFromRle(session.preview.rle, view.columns, view.rows, PREVIEW)];
  return [];
}

function layerFromRecords() {
  const { records } = session;
  if (labels?.records !== records) {
    const map = labelsFromRecords(records, view.columns, view.rows);
    labels = { records, map, layer: layerFromLabels(map, view.columns, view.rows) };
  }
  return labels.layer;
}

function recordAt(x, y) {
  const { photo } = session;
  const column = Math.min(view.columns - 1, Math.floor((x / photo.width) * view.columns));
  const row = Math.min(view.rows - 1, Math.floor((y / photo.height) * view.rows));
  return labels.map[row * view.columns + column] - 1;
}

function forgetLayers() {
  layers = new Map();
  labels = null;
}

function draw() {
  if (!session) return;
  const { points, box } = session.state;
  view.draw({ layers: shownLayers(), points, box: dragged ?? box, crosshair: gestures.crosshair });
}

function show() {
  draw();
  const { records, state } = session;
  element("undo").disabled = !session.canUndo && !records;
  element("clear").disabled = element("undo").disabled;
  element("everything").setAttribute("aria-pressed", String(Boolean(records)));
  element("save-png").disabled = !(session.mask ?? records?.[session.selected]);
  element("save-coco").disabled = !(session.mask ?? records?.length);
  element("candidates").hidden = state.masks.length < 2;
  element("ratings").hidden = !session.found?.length;
  element("least").value = session.least;
  element("least-text").textContent = session.least.toFixed(2);
  showChoices(state);
  element("facts").replaceChildren(...factsFromSession(session));
}

function showChoices({ masks, choice }) {
  const choices = element("choices");
  if (choices.children.length !== masks.length) {
    choices.replaceChildren(...masks.map((_, index) => choiceButton(index)));
  }
  masks.forEach((mask, index) => {
    choices.children[index].textContent = `${index + 1} · ${mask.score.toFixed(2)}`;
    choices.children[index].setAttribute("aria-pressed", String(index === choice));
  });
}

function choiceButton(index) {
  const button = document.createElement("button");
  button.type = "button";
  button.addEventListener("click", () => session.choose(index));
  return button;
}

// What is done

async function open(blobOf, name, sample = "") {
  const turn = ++opening;
  session?.close();
  busy(`Opening ${name} …`);
  let photo;
  try {
    photo = await photoFromBlob(await blobOf(), name);
  } catch (error) {
    if (turn === opening) failed(error, null);
    return;
  }
  if (turn !== opening) return;
  forgetLayers();
  session = new Session(api, photo, { changed: () => session?.photo === photo && show(), busy, done, failed });
  view.fit(photo);
  gestures.reset();
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.setAttribute("aria-pressed", String(button.dataset.sample === sample));
  }
  canvas.setAttribute("aria-label", `Photograph ${name}, ${photo.width} by ${photo.height} pixels`);
  await session.open();
}

function openSample(sample) {
  const name = `${sample}.jpg`;
  return open(async () => {
    const response = await fetch(`static/samples/${name}`).catch(() => null);
    if (!response?.ok) throw new Error(`The service at ${location.host} does not answer. Is it still running?`);
    return response.blob();
  }, name, sample);
}

function openFile(file) {
  if (file) open(() => file, file.name || "pasted.png");
}

function nextChoice(step, isRound) {
  const { masks, choice } = session?.state ?? { masks: [] };
  const next = isRound ? (choice + step) % masks.length : choice + step;
  if (masks.length < 2 || next < 0 || next >= masks.length) return false;
  session.choose(next);
  return true;
}

function toggleEverything() {
  if (element("everything").disabled || !session) return;
  if (session.records) session.clear();
  else session.everything();
}

function saveAsCoco() {
  const { mask, photo, records } = session;
  saveCoco(photo, records ? records.map(maskFromRecord) : [mask]);
}

function onCanvasKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "tab") {
    if (!nextChoice(event.shiftKey ? -1 : 1, false)) return; // past the last one Tab goes on: no trap
  } else if (key === "c") nextChoice(1, true);
  else if (key === "e") toggleEverything();
  else return;
  event.preventDefault();
}

function onKey(event) {
  if (!session || isAskingForKey()) return;
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !event.shiftKey) session.undo();
  else if (event.key === "Escape" && (session.canUndo || session.records || isBusy())) session.clear();
  else return;
  event.preventDefault();
}

function connect() {
  const listen = (id, react) => element(id).addEventListener("click", react);
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", () => openSample(button.dataset.sample));
  }
  listen("undo", () => session.undo());
  listen("clear", () => session.clear());
  listen("everything", toggleEverything);
  element("least").addEventListener("input", ({ target }) => session.setLeast(target.valueAsNumber));
  listen("save-png", () => savePng(session.photo, session.mask?.rle ?? session.records[session.selected].segmentation));
  listen("save-coco", saveAsCoco);
  listen("again", () => again?.());
  element("file").addEventListener("change", ({ target }) => {
    openFile(target.files[0]);
    target.value = ""; // the same file may be chosen again
  });
  canvas.addEventListener("keydown", onCanvasKey);
  document.addEventListener("keydown", onKey);
  document.addEventListener("paste", (event) => openFile(event.clipboardData.files[0]));
  connectDrops();
  new ResizeObserver(fitAgain).observe(frame);
  window.addEventListener("resize", fitAgain);
}

function fitAgain() {
  const { width, height } = room();
  if (width === fitted.width && height === fitted.height) return; // the frame also grows with the canvas in it
  fitted = { width, height };
  forgetLayers();
  view.fit();
  draw();
}

function connectDrops() {
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    frame.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || frame.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    frame.classList.remove("dropping");
    openFile(event.dataTransfer.files[0]);
  });
}

connect();
element("help").open = window.innerWidth > 820;
openSample("coins"); // encoded at once, so that the first click is fast
