// The server's HTTP API: keys, problem documents, and coming back when the server says so.

const KEY = "sam-api-key";
const MAX_TRIES = 8;
const MAX_WAIT_S = 30;
const EVERYTHING = { points_per_side: 16, pred_iou_thresh: 0, stability_score_thresh: 0.8 }; // a quick look

/** What the server, or the way to it, had to say instead of an answer. `reason` is stable, the message for people. */
export class ApiError extends Error {
  constructor(reason, message, { field = "", retryAfterS = null } = {}) {
    super(message);
    this.reason = reason;
    this.field = field;
    this.retryAfterS = retryAfterS;
  }
}

/** Resolve after `seconds`; reject at once when `signal` aborts. */
export function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

export class Api {
  #asking = null;

  /**
   * `askForKey(wasRefused)` resolves to an API key, or to "" when the person gives none;
   * `onWait(message, seconds)` is told when a request waits because the server asked for it.
   */
  constructor({ askForKey, onWait }) {
    this.askForKey = askForKey;
    this.onWait = onWait;
  }

  /** Encode a photograph and cache it under `id`. */
  embed(id, blob, signal) {
    return this.#json("PUT", `v1/images/${encodeURIComponent(id)}`, { body: blob, signal });
  }

  /** Return masks for one prompt {points, box} on a cached image. `patient`: come back when the server is busy. */
  segment(id, prompt, { multimask = null, signal, patient = true }) {
    const body = JSON.stringify({ prompts: [prompt], multimask });
    return this.#json("POST", `v1/images/${encodeURIComponent(id)}/masks`, { body, signal, patient, json: true });
  }

  /** Return a record for each thing found on a cached image, however poorly rated: the page sorts them itself. */
  everything(id, signal) {
    const path = `v1/images/${encodeURIComponent(id)}/everything`;
    return this.#json("POST", path, { body: JSON.stringify(EVERYTHING), signal, json: true });
  }

  async #json(method, path, { body, signal, patient = true, json = false }) {
    for (let tries = 1; ; tries++) {
      const key = sessionStorage.getItem(KEY);
      const headers = {};
      if (key) headers.authorization = `Bearer ${key}`;
      if (json) headers["content-type"] = "application/json";
      const response = await fetched(path, { method, body, signal, headers });
      if (response.ok) return response.json();
      const error = await errorFromResponse(response);
      if (error.reason === "unauthenticated") {
        await this.#newKey(key, error);
      } else if (patient && error.retryAfterS !== null && tries < MAX_TRIES && error.retryAfterS <= MAX_WAIT_S) {
        this.onWait(error.message, error.retryAfterS);
        await sleep(error.retryAfterS, signal);
      } else {
        throw error;
      }
    }
  }

  /** Have another key than the one that was refused; requests that are refused together ask once. */
  async #newKey(refused, error) {
    if (sessionStorage.getItem(KEY) !== refused) return;
    this.#asking ??= this.askForKey(Boolean(refused)).finally(() => (this.#asking = null));
    const key = await this.#asking;
    if (!key) throw error;
    sessionStorage.setItem(KEY, key);
  }
}

async function fetched(path, options) {
  try {
    return await fetch(path, { ...options, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable", `The service at ${location.host} does not answer. Is it still running?`);
  }
}

async function errorFromResponse(response) {
  const problem = await response.json().catch(() => ({}));
  const after = Number.parseFloat(response.headers.get("retry-after"));
  return new ApiError(
    problem.reason ?? `http_${response.status}`,
    problem.detail ?? `The server answered ${response.status} ${response.statusText}.`,
    { field: problem.field, retryAfterS: Number.isFinite(after) ? after : null },
  );
}
