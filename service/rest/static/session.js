// One photograph and what was asked about it: the prompt, its history, the answers.

import { ApiError, sleep } from "./api.js";

const PREVIEW_PAUSE_S = 0.08;
const PAUSE_AFTER_FAILURE_S = 2;
const GOOD_RATING = 0.88; // the original's threshold, out of reach for a small model:
const PART_OF_BEST = 0.85; // it gets this part of its own best
const SENT_AGAIN = "The server had forgotten the photograph; it was sent again.";
const NOTHING = { points: [], box: null, masks: [], choice: 0, answer: null };

export class Session {
  #asking = new AbortController();
  #previewing = new AbortController();
  #working = null; // the signal of the work under way
  #embedding = null;
  #wanted = null; // where the pointer was last, if no preview was asked for there yet
  #isPreviewing = false;

  /** `on` has changed(), busy(sentence), done(sentence) and failed(error, again), `again` being what to call. */
  constructor(api, photo, on) {
    this.api = api;
    this.photo = photo;
    this.on = on;
    this.history = [NOTHING];
    this.embedded = null; // the answer to the upload
    this.wasSentAgain = false;
    this.preview = null; // a mask
    this.found = null; // all records of everything-mode
    this.records = null; // those that are rated well enough to be shown
    this.least = 0;
    this.selected = -1;
  }

  /** The prompt as it stands: {points, box, masks, choice, answer, roundTripMs}. */
  get state() {
    return this.history[this.history.length - 1];
  }

  /** The mask on view, with its rle, bbox, area and score; undefined if there is none. */
  get mask() {
    return this.state.masks[this.state.choice];
  }

  get canUndo() {
    return this.history.length > 1;
  }

  /** Have the photograph encoded. */
  async open() {
    await this.#work("Encoding the photograph …", async (signal) => {
      await this.#ensureEmbedded(signal);
      return "Ready. Click on something, or drag a box around it.";
    }, () => this.open());
  }

  /** End all that is under way. */
  close() {
    this.#asking.abort();
    this.stopPreview();
  }

  addPoint(x, y, label) {
    const { points, box } = this.state;
    return this.#ask({ ...NOTHING, points: [...points, [rounded(x), rounded(y), label]], box });
  }

  setBox(box) {
    return this.#ask({ ...NOTHING, points: this.state.points, box: box.map(rounded) });
  }

  undo() {
    if (this.records) return this.clear();
    if (!this.canUndo) return undefined;
    this.history.pop();
    return this.#answer(this.state);
  }

  clear() {
    this.close();
    this.history = [NOTHING];
    this.found = this.records = null;
    this.on.done("Cleared.");
    this.on.changed();
  }

  choose(index) {
    this.state.choice = index;
    const { score } = this.mask;
    this.on.done(`Candidate ${index + 1} of ${this.state.masks.length}, score ${score.toFixed(2)}.`);
    this.on.changed();
  }

  /** Find everything there is. */
  async everything() {
    this.history = [NOTHING];
    this.stopPreview();
    await this.#work("Looking for everything; this takes a while. Esc stops it.", async (signal) => {
      const start = performance.now();
      const answer = await this.#recovering((id) => this.api.everything(id, signal), signal);
      this.#show(answer.records);
      this.history = [{ ...NOTHING, answer, roundTripMs: performance.now() - start }];
      return this.#countOfRecords();
    }, () => this.everything());
  }

  /** Show what everything-mode rated at least so, 0 to 1; nothing is asked for again. */
  setLeast(rating) {
    this.#show(this.found, rating);
    this.on.done(this.#countOfRecords());
    this.on.changed();
  }

  #show(found, least = leastRating(found)) {
    this.found = found;
    this.least = least;
    this.records = found.filter((record) => record.predicted_iou >= least);
    this.selected = -1;
  }

  #countOfRecords() {
    if (!this.found.length) return "Nothing was found.";
    return `${this.records.length} of ${this.found.length} things shown. Click on one to pick it; Esc leaves.`;
  }

  select(index) {
    this.selected = index;
    const record = this.records[index];
    this.on.done(record ? `${pixels(record.area)}, score ${record.predicted_iou.toFixed(2)}.` : "Nothing there.");
    this.on.changed();
  }

  /** Show what a click at (x, y) would give. One request is under way at most; after it, the latest place counts. */
  async hover(x, y) {
    if (this.canUndo || this.records || this.#working || !this.embedded) return;
    this.#wanted = [rounded(x), rounded(y), 1];
    if (this.#isPreviewing) return;
    this.#isPreviewing = true;
    const { signal } = (this.#previewing = new AbortController());
    try {
      while (this.#wanted && !signal.aborted) {
        const prompt = { points: [this.#wanted] };
        this.#wanted = null;
        const answer = await this.#recovering((id) => this.api.segment(id, prompt, { signal, patient: false }), signal);
        [this.preview] = answer.results[0].masks;
        if (this.wasSentAgain) this.on.done(SENT_AGAIN);
        this.on.changed();
        await sleep(PREVIEW_PAUSE_S, signal);
      }
    } catch (error) {
      if (!signal.aborted) await this.#pausePreviews(error);
    } finally {
      this.#isPreviewing = false;
    }
  }

  stopPreview() {
    this.#wanted = null;
    this.#previewing.abort();
    if (this.preview) {
      this.preview = null;
      this.on.changed();
    }
  }

  /** After a failure the next preview waits. One that is only refused for now is no event; anything else is told. */
  async #pausePreviews(error) {
    if (error.retryAfterS === null) this.on.failed(error, null);
    await sleep(error.retryAfterS ?? PAUSE_AFTER_FAILURE_S);
  }

  #ask(state) {
    this.history.push(state);
    return this.#answer(state);
  }

  /** Show the answer to `state`, asking for it if it is not there. */
  async #answer(state) {
    this.stopPreview();
    const isEmpty = !state.points.length && !state.box;
    await this.#work(isEmpty || state.answer ? "" : "Segmenting …", async (signal) => {
      if (isEmpty) return "Nothing is marked now.";
      if (!state.answer) await this.#segment(state, signal);
      const [best] = state.masks;
      if (!best.area) return "Nothing was found there.";
      const choices = state.masks.length > 1 ? ` ${state.masks.length} candidates.` : "";
      return `Mask of ${pixels(best.area)}, score ${best.score.toFixed(2)}.${choices}`;
    }, () => this.#answer(state));
  }

  async #segment(state, signal) {
    const prompt = { points: state.points, ...(state.box && { box: state.box }) };
    const multimask = state.points.length === 1 && !state.box ? true : null; // a lone point may mean three things
    const start = performance.now();
    const answer = await this.#recovering((id) => this.api.segment(id, prompt, { multimask, signal }), signal);
    Object.assign(state, { answer, masks: answer.results[0].masks, roundTripMs: performance.now() - start });
  }

  /** Return what `ask(id)` does; if the server has forgotten the photograph, send it again and ask once more. */
  async #recovering(ask, signal) {
    this.wasSentAgain = false;
    await this.#ensureEmbedded(signal);
    try {
      return await ask(this.photo.id);
    } catch (error) {
      if (error.reason !== "image_not_cached") throw error;
      this.on.busy("The server has forgotten this photograph; sending it again …");
      this.#embedding = null;
      await this.#ensureEmbedded(signal);
      this.wasSentAgain = true;
      return ask(this.photo.id);
    }
  }

  /** Upload once, whoever asks; an upload that failed is tried again by the next who needs it. */
  async #ensureEmbedded(signal) {
    this.#embedding ??= this.#embed();
    await this.#embedding;
    signal.throwIfAborted();
  }

  async #embed() {
    try {
      this.embedded = await this.api.embed(this.photo.id, this.photo.blob);
    } catch (error) {
      this.#embedding = null;
      throw error;
    }
  }

  /** Do `work(signal)`, which returns a closing sentence, in place of whatever was being done. */
  async #work(sentence, work, again) {
    this.#asking.abort();
    const { signal } = (this.#asking = new AbortController());
    this.#working = signal;
    if (sentence) this.on.busy(sentence);
    this.on.changed();
    try {
      const closing = await work(signal);
      this.on.done(this.wasSentAgain ? `${closing} ${SENT_AGAIN}` : closing);
    } catch (error) {
      if (signal.aborted) return;
      this.on.failed(error, error instanceof ApiError ? again : null);
    } finally {
      if (this.#working === signal) this.#working = null;
    }
    this.wasSentAgain = false;
    this.on.changed();
  }
}

/** Return the rating to begin with, in hundredths like the slider. */
function leastRating(records) {
  const best = Math.max(0, ...records.map((record) => record.predicted_iou));
  return Math.floor(100 * Math.min(GOOD_RATING, PART_OF_BEST * best)) / 100;
}

function rounded(value) {
  return Math.round(10 * value) / 10;
}

function pixels(area) {
  return `${area.toLocaleString("en")} pixels`;
}
