// COCO's compressed run lengths, the form in which the server sends masks: runs down the columns, zeros first.

const FIRST_CHARACTER = 48;

/** Return the run lengths in a compressed string: 5 bits a character, from the fourth on differences. */
export function runsFromCounts(counts) {
  const runs = [];
  for (let at = 0; at < counts.length; ) {
    let value = 0;
    let weight = 1;
    let digit;
    do {
      digit = counts.charCodeAt(at++) - FIRST_CHARACTER;
      if (!(digit >= 0 && digit < 64)) throw new RangeError("not COCO's compressed run lengths");
      value += (digit & 31) * weight;
      weight *= 32;
    } while (digit & 32);
    if (digit & 16) value -= weight;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/**
 * Call `paint(index)` for each pixel of the mask, sampled to a picture of `columns` x `rows` (row-major indices).
 * Takes time for the runs and for what is painted, not for what is empty.
 */
export function paintRle({ size: [height, width], counts }, columns, rows, paint) {
  const runs = runsFromCounts(counts);
  if (runs.reduce((sum, run) => sum + run, 0) !== height * width) {
    throw new RangeError(`the run lengths do not describe a mask of ${height} x ${width} pixels`);
  }
  let [firstRun, firstStart] = [0, 0]; // of the column on view: an enlarged picture reads a column more than once
  for (let column = 0; column < columns; column++) {
    const top = Math.floor(((column + 0.5) * width) / columns) * height;
    const bottom = top + height;
    while (firstStart + runs[firstRun] <= top) firstStart += runs[firstRun++];
    for (let run = firstRun, start = firstStart; start < bottom; start += runs[run++]) {
      if (run % 2 === 0) continue;
      const first = Math.ceil(((Math.max(start, top) - top) * rows) / height - 0.5);
      const last = Math.ceil(((Math.min(start + runs[run], bottom) - top) * rows) / height - 0.5);
      for (let row = first; row < last; row++) paint(row * columns + column);
    }
  }
}

/** Return the mask as bytes 0 or 1, row-major, sampled to `columns` x `rows`; by default at its own size. */
export function maskFromRle(rle, columns = rle.size[1], rows = rle.size[0]) {
  const mask = new Uint8Array(columns * rows);
  paintRle(rle, columns, rows, (index) => (mask[index] = 1));
  return mask;
}
