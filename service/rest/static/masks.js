// Masks as pictures to lie over the photograph: a tint inside a crisp outline.

import { maskFromRle, paintRle } from "./rle.js";

export const BLUE = [61, 139, 253];
const GOLDEN_ANGLE = 137.508; // neighbouring numbers get hues far apart

function newCanvas(columns, rows) {
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  return canvas;
}

function canvasFromPixels(pixels, columns, rows) {
  const canvas = newCanvas(columns, rows);
  canvas.getContext("2d").putImageData(new ImageData(pixels, columns, rows), 0, 0);
  return canvas;
}

/** Return the mask at `columns` x `rows`, bytes 0 or 1; one that is enlarged gets smooth edges, not steps. */
function silhouette(rle, columns, rows) {
  const [height, width] = rle.size;
  if (columns <= width) return maskFromRle(rle, columns, rows);
  const pixels = new Uint8ClampedArray(4 * width * height);
  paintRle(rle, width, height, (index) => (pixels[4 * index + 3] = 255));
  const enlarged = newCanvas(columns, rows);
  const context = enlarged.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(canvasFromPixels(pixels, width, height), 0, 0, columns, rows);
  const { data } = context.getImageData(0, 0, columns, rows);
  const mask = new Uint8Array(columns * rows);
  for (let index = 0; index < mask.length; index++) mask[index] = data[4 * index + 3] >> 7;
  return mask;
}

/** Return a canvas with the mask tinted (opacity 0 to 1) and outlined, `thickness` device pixels thick. */
export function layerFromRle(rle, columns, rows, { color = BLUE, opacity = 0.45, thickness = 2 } = {}) {
  const mask = silhouette(rle, columns, rows);
  const [tint, line, rim] = [word(color, 255 * opacity), word(color, 255), word([255, 255, 255], 200)];
  const words = new Uint32Array(columns * rows);
  for (let row = 0, index = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, index++) {
      const set = mask[index];
      let near = false; // whether a pixel of the other kind, or the picture's edge, is that near
      for (let step = 1; step <= (set ? thickness : 1) && !near; step++) {
        near =
          (column < step ? 0 : mask[index - step]) !== set ||
          (column + step >= columns ? 0 : mask[index + step]) !== set ||
          (row < step ? 0 : mask[index - step * columns]) !== set ||
          (row + step >= rows ? 0 : mask[index + step * columns]) !== set;
      }
      if (set) words[index] = near ? line : tint;
      else if (near) words[index] = rim; // light, so that the outline shows on any photograph
    }
  }
  return canvasFromPixels(new Uint8ClampedArray(words.buffer), columns, rows);
}

/** Return the 32-bit word of a pixel, in this machine's byte order. */
function word([red, green, blue], alpha) {
  return new Uint32Array(Uint8ClampedArray.of(red, green, blue, alpha).buffer)[0];
}

/** Return which record covers each pixel (its index plus one, 0 for none), smaller records over larger ones. */
export function labelsFromRecords(records, columns, rows) {
  const labels = new Uint16Array(columns * rows);
  const order = records.map((_, index) => index).sort((one, other) => records[other].area - records[one].area);
  for (const index of order) {
    paintRle(records[index].segmentation, columns, rows, (pixel) => (labels[pixel] = index + 1));
  }
  return labels;
}

/** Return a canvas with each label in a colour of its own. */
export function layerFromLabels(labels, columns, rows) {
  const words = new Uint32Array(columns * rows);
  const hues = new Map();
  labels.forEach((label, index) => {
    if (label === 0) return;
    if (!hues.has(label)) {
      const color = rgbFromHue((label * GOLDEN_ANGLE) % 360);
      hues.set(label, [word(color, 115), word(color, 255)]);
    }
    const isEdge = label !== labels[index + 1] || label !== labels[index + columns];
    words[index] = hues.get(label)[Number(isEdge)];
  });
  return canvasFromPixels(new Uint8ClampedArray(words.buffer), columns, rows);
}

/** Return [red, green, blue] of a strong colour; hue in degrees. */
function rgbFromHue(hue) {
  return [0, 8, 4].map((offset) => {
    const k = (offset + hue / 30) % 12;
    return Math.round(255 * (0.55 - 0.4 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

/** Return a canvas of the mask at its own size, white on black. */
export function pictureFromRle(rle) {
  const [height, width] = rle.size;
  const pixels = new Uint8ClampedArray(4 * width * height);
  for (let index = 3; index < pixels.length; index += 4) pixels[index] = 255;
  paintRle(rle, width, height, (index) => pixels.fill(255, 4 * index, 4 * index + 3));
  return canvasFromPixels(pixels, width, height);
}
