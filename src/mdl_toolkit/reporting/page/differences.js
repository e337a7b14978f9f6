// Where a prediction differs from its reference: by words, or by characters; as the error rates compare them.

const MOST_PAIRS = 4_000_000; // of units that are compared in one row
const EDIT = 10_000; // what an edit costs; a substitution 1 more, so that of equal ways the one with more in common wins

/** What remains of a unit when it is compared; like `normalized` in Python. */
function comparable(unit, normalize) {
  if (!normalize) return unit;
  return unit.normalize("NFKC").toUpperCase().toLowerCase().replaceAll("ς", "σ").replace(/\p{P}/gu, "").trim();
}

/** A text as units with the white space between them: `[{text, key}]`; an empty key is never an error. */
function unitsOf(text, byCharacter, normalize) {
  const parts = byCharacter ? Array.from(text) : text.split(/(\s+)/u).filter((part) => part !== "");
  return parts.map((part) => ({ text: part, key: /^\s+$/u.test(part) ? "" : comparable(part, normalize) }));
}

/** Both texts as pieces `[{text, marked}]`, with a fewest number of edits marked. */
function differences(reference, prediction, byCharacter, normalize) {
  const sides = [reference, prediction].map((text) => unitsOf(text, byCharacter, normalize));
  const kept = sides.map((units) => units.filter((unit) => unit.key !== ""));
  for (const unit of align(...kept)) unit.marked = true;
  return sides.map(joined);
}

/** The units of both sides that are substituted, deleted or inserted. */
function align(left, right) {
  let start = 0;
  while (start < left.length && start < right.length && left[start].key === right[start].key) start++;
  let ends = [left.length, right.length];
  while (ends[0] > start && ends[1] > start && left[ends[0] - 1].key === right[ends[1] - 1].key) ends = [ends[0] - 1, ends[1] - 1];
  const a = left.slice(start, ends[0]);
  const b = right.slice(start, ends[1]);
  if (a.length * b.length > MOST_PAIRS) return [...a, ...b];
  return traced(a, b);
}

function traced(a, b) {
  const width = b.length + 1;
  const cost = new Uint32Array((a.length + 1) * width);
  for (let i = 0; i <= a.length; i++) {
    for (let j = 0; j <= b.length; j++) {
      const here = i * width + j;
      if (i === 0 || j === 0) cost[here] = EDIT * (i + j);
      else if (a[i - 1].key === b[j - 1].key) cost[here] = cost[here - width - 1];
      else cost[here] = EDIT + Math.min(cost[here - width - 1] + 1, cost[here - width], cost[here - 1]);
    }
  }
  const marked = [];
  let [i, j] = [a.length, b.length];
  while (i > 0 || j > 0) {
    const here = i * width + j;
    if (i > 0 && j > 0 && a[i - 1].key === b[j - 1].key) [i, j] = [i - 1, j - 1];
    else if (i > 0 && j > 0 && cost[here] === cost[here - width - 1] + EDIT + 1) marked.push(a[--i], b[--j]);
    else if (i > 0 && cost[here] === cost[here - width] + EDIT) marked.push(a[--i]);
    else marked.push(b[--j]);
  }
  return marked;
}

/** Units to pieces; marked neighbours become one, with the white space between them. */
function joined(units) {
  const pieces = [];
  units.forEach((unit, place) => {
    const last = pieces[pieces.length - 1];
    const isBetween = unit.key === "" && last && last.marked && units[place + 1] && units[place + 1].marked;
    const marked = Boolean(unit.marked || isBetween);
    if (last && last.marked === marked) last.text += unit.text;
    else pieces.push({ text: unit.text, marked });
  });
  return pieces;
}
