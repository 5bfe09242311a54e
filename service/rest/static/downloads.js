// Files to keep: the mask as a picture, or masks as COCO's JSON.

import { pictureFromRle } from "./masks.js";

/** Save the mask as a PNG of the photograph's size, white on black. */
export async function savePng(photo, rle) {
  const blob = await new Promise((resolve) => pictureFromRle(rle).toBlob(resolve, "image/png"));
  save(blob, `${stem(photo)}-mask.png`);
}

/** Save `masks` ({rle, area, bbox, score}) as a COCO data set of one image. */
export function saveCoco(photo, masks) {
  const text = JSON.stringify(cocoFromMasks(photo, masks), null, 1);
  save(new Blob([text], { type: "application/json" }), `${stem(photo)}-coco.json`);
}

/** Return the mask of a record. Its box, like the original's, is one less wide and high than COCO's. */
export function maskFromRecord({ segmentation, area, bbox: [x, y, width, height], predicted_iou }) {
  return { rle: segmentation, area, bbox: [x, y, width + 1, height + 1], score: predicted_iou };
}

function cocoFromMasks(photo, masks) {
  return {
    images: [{ id: 1, file_name: photo.name, width: photo.width, height: photo.height }],
    categories: [{ id: 1, name: "object" }],
    annotations: masks.map(({ rle, area, bbox, score }, index) => ({
      id: index + 1,
      image_id: 1,
      category_id: 1,
      segmentation: rle,
      area,
      bbox,
      iscrowd: 0,
      score,
    })),
  };
}

function stem(photo) {
  return photo.name.replace(/\.[^.]*$/, "") || "photograph";
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
