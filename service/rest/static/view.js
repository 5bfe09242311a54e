// The canvas: the photograph, masks over it, and the prompt. Everything outside counts in pixels of the photograph.

const MAX_ENLARGEMENT = 3;
const MAX_PIXELS = 2_000_000; // of the canvas; more would make outlines slow, not finer
const POINT_RADIUS = 7; // CSS pixels, as the other lengths here
const FOREGROUND = "#1a9e4b";
const BACKGROUND = "#d92d3a";
const LINE = "#3d8bfd";

export class View {
  /** `room()` returns {width, height}: the room there is, in CSS pixels. */
  constructor(canvas, room) {
    this.canvas = canvas;
    this.room = room;
    this.photo = null;
    this.context = canvas.getContext("2d");
  }

  /** Show another photograph, or the same one in another room. */
  fit(photo = this.photo) {
    this.photo = photo;
    if (!photo) return;
    const room = this.room();
    const scale = Math.min(room.width / photo.width, room.height / photo.height, MAX_ENLARGEMENT);
    const [width, height] = [photo.width * scale, photo.height * scale];
    const ratio = Math.min(devicePixelRatio, Math.sqrt(MAX_PIXELS / (width * height)));
    this.canvas.width = Math.max(1, Math.round(width * ratio));
    this.canvas.height = Math.max(1, Math.round(height * ratio));
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.ratio = ratio;
  }

  get columns() {
    return this.canvas.width;
  }

  get rows() {
    return this.canvas.height;
  }

  /** Return [x, y] in the photograph of a place on the screen, kept inside. */
  toPhoto(clientX, clientY) {
    const bounds = this.canvas.getBoundingClientRect();
    const { width, height } = this.photo;
    const x = ((clientX - bounds.left) / bounds.width) * width;
    const y = ((clientY - bounds.top) / bounds.height) * height;
    return [Math.min(width, Math.max(0, x)), Math.min(height, Math.max(0, y))];
  }

  /** Draw `layers` (canvases of this one's size), `points` [x, y, label], a `box` and a `crosshair` [x, y]. */
  draw({ layers = [], points = [], box = null, crosshair = null }) {
    if (!this.photo) return;
    const { context } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.photo.bitmap, 0, 0, this.columns, this.rows);
    for (const layer of layers) context.drawImage(layer, 0, 0);
    context.scale(this.ratio, this.ratio);
    if (box) this.#drawBox(box);
    for (const [x, y, label] of points) this.#drawPoint(...this.#onCanvas(x, y), label);
    if (crosshair) this.#drawCrosshair(...this.#onCanvas(...crosshair));
  }

  #onCanvas(x, y) {
    const { width, height } = this.photo;
    return [(x / width) * (this.columns / this.ratio), (y / height) * (this.rows / this.ratio)];
  }

  /** Draw `path` twice: white below, `color` above, so that it shows on any photograph. */
  #stroke(path, color, width) {
    for (const [style, extra] of [
      ["white", 2],
      [color, 0],
    ]) {
      this.context.strokeStyle = style;
      this.context.lineWidth = width + extra;
      this.context.stroke(path);
    }
  }

  #drawBox([x0, y0, x1, y1]) {
    const [left, top] = this.#onCanvas(Math.min(x0, x1), Math.min(y0, y1));
    const [right, bottom] = this.#onCanvas(Math.max(x0, x1), Math.max(y0, y1));
    const path = new Path2D();
    path.rect(left, top, right - left, bottom - top);
    this.#stroke(path, LINE, 1.5);
  }

  /** A disc with a plus or a minus: the colour alone says nothing to some. */
  #drawPoint(x, y, label) {
    const disc = new Path2D();
    disc.arc(x, y, POINT_RADIUS, 0, 2 * Math.PI);
    this.context.fillStyle = label ? FOREGROUND : BACKGROUND;
    this.context.fill(disc);
    this.context.strokeStyle = "white";
    this.context.lineWidth = 2;
    this.context.stroke(disc);
    const sign = new Path2D();
    sign.moveTo(x - 3.5, y);
    sign.lineTo(x + 3.5, y);
    if (label) {
      sign.moveTo(x, y - 3.5);
      sign.lineTo(x, y + 3.5);
    }
    this.context.stroke(sign);
  }

  #drawCrosshair(x, y) {
    const path = new Path2D();
    for (const [dx, dy] of [
      [1, 0],
      [-1, 0],
      [0, 1],
      [0, -1],
    ]) {
      path.moveTo(x + 4 * dx, y + 4 * dy);
      path.lineTo(x + 16 * dx, y + 16 * dy);
    }
    this.#stroke(path, "#111", 2);
  }
}
