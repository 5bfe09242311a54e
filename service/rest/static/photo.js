// A photograph: its bytes, the id it is cached under, and something to draw.

const MAX_DRAWN_SIDE = 2560; // a 64-megapixel picture would keep 256 MB

/** Return {name, blob, id, width, height, bitmap}; throws when the browser cannot show the file. */
export async function photoFromBlob(blob, name) {
  const whole = await createImageBitmap(blob, { imageOrientation: "from-image" }).catch(() => {
    throw new Error(`This browser cannot show ${name}. Choose a JPEG, PNG or WebP.`);
  });
  const { width, height } = whole;
  return { name, blob, id: await idFromBlob(blob), width, height, bitmap: await drawable(whole) };
}

async function drawable(whole) {
  const scale = MAX_DRAWN_SIDE / Math.max(whole.width, whole.height);
  if (scale >= 1) return whole;
  const [resizeWidth, resizeHeight] = [whole.width, whole.height].map((side) => Math.max(1, Math.round(scale * side)));
  const smaller = await createImageBitmap(whole, { resizeWidth, resizeHeight, resizeQuality: "high" });
  whole.close();
  return smaller;
}

/** The same bytes have the same id, so that the server need not encode them again after a reload. */
async function idFromBlob(blob) {
  if (!crypto.subtle) return `page-${hex(crypto.getRandomValues(new Uint8Array(16)))}`; // plain http: no digests
  return `sha256-${hex(new Uint8Array(await crypto.subtle.digest("SHA-256", await blob.arrayBuffer())))}`;
}

function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
