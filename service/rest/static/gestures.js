// What hands do on the canvas, by mouse, finger or keyboard, as points and boxes in pixels of the photograph.

const DRAG_PX = 6; // a hand is never quite still
const LONG_PRESS_MS = 500;
const STEPS = 50; // arrow presses from edge to edge of the longer side
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Gestures {
  #down = null;
  #timer = 0;
  #corner = null;

  /**
   * `on` has point(x, y, label), box([x0, y0, x1, y1]), dragging(box or null), hover(x, y), leave() and moved():
   * the crosshair did. `isRemoving()` tells which of the two kinds of point a plain click means.
   */
  constructor(view, isRemoving, on) {
    this.view = view;
    this.isRemoving = isRemoving;
    this.on = on;
    this.crosshair = null;
    const listen = (name, react) => view.canvas.addEventListener(name, react);
    listen("pointerdown", (event) => this.#press(event));
    listen("pointermove", (event) => this.#move(event));
    listen("pointerup", (event) => this.#release(event));
    listen("pointercancel", () => this.#drop());
    listen("pointerleave", () => this.#down || on.leave());
    listen("contextmenu", (event) => this.#down && event.preventDefault()); // a finger that rests
    listen("keydown", (event) => this.#key(event));
    listen("blur", () => this.hideCrosshair());
  }

  /** Begin anew, as for another photograph. */
  reset() {
    this.#drop();
    this.crosshair = null;
  }

  hideCrosshair() {
    if (!this.crosshair) return;
    this.#corner = null;
    this.crosshair = null;
    this.on.dragging(null);
    this.on.leave();
  }

  #label(shift) {
    return shift === this.isRemoving() ? 1 : 0;
  }

  #press(event) {
    if (!this.view.photo || event.button !== 0 || !event.isPrimary) return;
    this.hideCrosshair();
    this.view.canvas.setPointerCapture(event.pointerId);
    this.#down = { x: event.clientX, y: event.clientY, dragging: false };
    if (event.pointerType === "touch") this.#timer = setTimeout(() => this.#longPress(), LONG_PRESS_MS);
  }

  #longPress() {
    const at = this.view.toPhoto(this.#down.x, this.#down.y);
    this.#drop();
    navigator.vibrate?.(15);
    this.on.point(...at, this.#label(true));
  }

  #move(event) {
    if (!this.view.photo || !event.isPrimary) return;
    const at = this.view.toPhoto(event.clientX, event.clientY);
    if (!this.#down) {
      if (event.pointerType !== "touch") this.on.hover(...at);
      return;
    }
    const [dx, dy] = [event.clientX - this.#down.x, event.clientY - this.#down.y];
    if (!this.#down.dragging && Math.hypot(dx, dy) < DRAG_PX) return;
    clearTimeout(this.#timer);
    this.#down.dragging = true;
    this.on.dragging([...this.view.toPhoto(this.#down.x, this.#down.y), ...at]);
  }

  #release(event) {
    if (!this.#down) return;
    const { x, y, dragging } = this.#down;
    this.#drop();
    if (dragging) this.#finishBox([...this.view.toPhoto(x, y), ...this.view.toPhoto(event.clientX, event.clientY)]);
    else this.on.point(...this.view.toPhoto(x, y), this.#label(event.shiftKey));
  }

  #drop() {
    clearTimeout(this.#timer);
    this.#down = null;
    this.#corner = null;
    this.on.dragging(null);
  }

  #finishBox([xa, ya, xb, yb]) {
    const [x0, y0, x1, y1] = [Math.min(xa, xb), Math.min(ya, yb), Math.max(xa, xb), Math.max(ya, yb)];
    if (x0 < x1 && y0 < y1) this.on.box([x0, y0, x1, y1]);
  }

  #key(event) {
    if (!this.view.photo || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = ARROWS[event.key];
    if (arrow) this.#step(arrow, event.shiftKey);
    else if (event.key === "Enter" || event.key === " ") this.#place(event.shiftKey);
    else if (event.key.toLowerCase() === "b") this.#corner = [...this.#shownCrosshair()];
    else if (event.key === "Escape" && this.#corner) this.#drop();
    else return;
    event.preventDefault();
    event.stopPropagation();
    this.on.moved();
  }

  #shownCrosshair() {
    this.crosshair ??= [this.view.photo.width / 2, this.view.photo.height / 2];
    return this.crosshair;
  }

  #step([dx, dy], isFine) {
    const { width, height } = this.view.photo;
    const step = isFine ? 1 : Math.max(1, Math.round(Math.max(width, height) / STEPS));
    const [x, y] = this.#shownCrosshair();
    this.crosshair = [Math.min(width, Math.max(0, x + step * dx)), Math.min(height, Math.max(0, y + step * dy))];
    if (this.#corner) this.on.dragging([...this.#corner, ...this.crosshair]);
    else this.on.hover(...this.crosshair);
  }

  #place(isShifted) {
    const at = this.#shownCrosshair();
    const corner = this.#corner;
    this.#drop();
    if (corner) this.#finishBox([...corner, ...at]);
    else this.on.point(...at, this.#label(isShifted));
  }
}
