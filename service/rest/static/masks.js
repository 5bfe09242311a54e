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
  const pixels = new Uint8ClampedArray(4 * columns * rows);
  const inside = (column, row) =>
    column >= 0 && row >= 0 && column < columns && row < rows && mask[row * columns + column] === 1;
  const touches = (column, row, distance, wanted) =>
    inside(column - distance, row) === wanted ||
    inside(column + distance, row) === wanted ||
    inside(column, row - distance) === wanted ||
    inside(column, row + distance) === wanted;
  for (let row = 0, index = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, index++) {
      if (mask[index]) {
        let edge = false;
        for (let distance = 1; distance <= thickness && !edge; distance++) edge = touches(column, row, distance, false);
        pixels.set([...color, edge ? 255 : 255 * opacity], 4 * index);
      } else if (touches(column, row, 1, true)) {
        pixels.set([255, 255, 255, 200], 4 * index); // a light rim, so that the outline shows on any photograph
      }
    }
  }
  return canvasFromPixels(pixels, columns, rows);
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
  const pixels = new Uint8ClampedArray(4 * columns * rows);
  const colors = new Map();
  labels.forEach((label, index) => {
    if (label === 0) return;
    if (!colors.has(label)) colors.set(label, rgbFromHue((label * GOLDEN_ANGLE) % 360));
    const edge = label !== labels[index + 1] || label !== labels[index + columns];
    pixels.set([...colors.get(label), edge ? 255 : 115], 4 * index);
  });
  return canvasFromPixels(pixels, columns, rows);
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
