// What an answer took, by the server's own clock, as entries of a description list.

const SKIPPED = { memory: "skipped (in memory)", redis: "skipped (in Redis)" };

/** Return <dt> and <dd> elements about the session's last answer. */
export function factsFromSession({ photo, embedded, state: { answer, roundTripMs } }) {
  const rows = [["Photograph", `${photo.width} × ${photo.height}`]];
  if (embedded) {
    rows.push(["Upload", embedded.cache === "miss" ? `encoded, ${ms(embedded.timings_ms.encode)}` : "was cached"]);
  }
  if (answer) {
    const { encode, decode, masks, total } = answer.timings_ms;
    rows.push(
      ["Encoder", SKIPPED[answer.cache] ?? ms(encode), answer.cache in SKIPPED ? "skipped" : ""],
      ["Decoder", ms(decode)],
      ["Masks", ms(masks)],
      ["Server, in all", ms(total)],
      ["Seen from here", ms(roundTripMs)],
    );
  }
  if (embedded) rows.push(["Model", embedded.model.replace(/@.*/, "")]);
  return rows.flatMap(([name, value, kind]) => [cell("dt", name), cell("dd", value, kind)]);
}

function cell(tag, text, kind = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = kind;
  return element;
}

function ms(value) {
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}
