// The rows: only those near the window are in the page, however many there are.

const ROWS = VALUES.rows;
const AHEAD = 500; // pixels above and below the window that are filled too
const GUESS = 84; // pixels of a row that was never shown
const MARKED = 200_000; // characters of a row beyond which differences are not looked for
const PRINTED = 300; // rows on paper

/** The address of a row's recording; null without one. */
function addressOf(row) {
  if (!ROWS.audio || ROWS.audio.names[row] === "") return null;
  return ROWS.audio.embedded[row] ?? ROWS.audio.folder + ROWS.audio.names[row];
}

function nameOf(row) {
  try {
    return decodeURIComponent(ROWS.audio.names[row]);
  } catch {
    return ROWS.audio.names[row];
  }
}

function textCell(key, pieces, tag) {
  const text = make("div", { class: "text" });
  for (const piece of pieces) text.append(piece.marked ? make(tag, {}, piece.text) : piece.text);
  if (!text.textContent) text.append(make("span", { class: "empty" }, say("empty")));
  return make("div", { role: "cell", class: key }, make("span", { class: "label" }, say(key)), text);
}

function marks(row) {
  const state = ROWS.state ? ["wrong", "right", "failed"][ROWS.state[row]] : null;
  const lines = [say("lineNumber", ROWS.line[row])];
  if (ROWS.errors && !ROWS.labels) lines.push(say("errorsOf", ROWS.errors[row], ROWS.length[row]));
  if (ROWS.score && ROWS.score[row] !== null) lines.push(say("score", number(ROWS.score[row])));
  for (const group of ROWS.groups) lines.push(`${group.title}: ${short(group.names[group.codes[row]]) || say("empty")}`);
  const sign = { right: "✓ ", wrong: "✗ ", failed: "! " }[state];
  return make("div", { role: "cell", class: "first" },
    state ? make("span", { class: `mark ${state === "right" ? "right" : "wrong"}` }, sign + say(state)) : "",
    ...lines.map((line) => make("small", {}, line)));
}

function player(row) {
  const cell = make("div", { role: "cell" });
  const address = addressOf(row);
  if (address === null) return cell;
  const audio = make("audio", { controls: true, preload: "none", src: address, "aria-label": say("play", ROWS.line[row]) });
  const name = make("small", { title: nameOf(row) }, nameOf(row));
  audio.addEventListener("error", () => { name.textContent = `${nameOf(row)}: ${say("notPlayed")}`; });
  cell.append(audio, name);
  return cell;
}

function rowElement(row) {
  const [reference, prediction] = [ROWS.reference?.[row], ROWS.prediction[row]];
  const sides = ROWS.reference && ROWS.state[row] !== 2 && reference.length + prediction.length < MARKED
    ? differences(reference, prediction, ROWS.by_character, ROWS.normalize)
    : [reference, prediction].map((text) => [{ text: text ?? "", marked: false }]);
  const answer = textCell("prediction", sides[1], "ins");
  if (ROWS.error?.[row]) answer.append(make("small", { class: "wrong" }, ROWS.error[row]));
  const kind = ["row", ROWS.reference ? "" : "bare", ROWS.audio ? "" : "mute"].filter(Boolean).join(" ");
  return make("div", { role: "row", class: kind, "data-row": row },
    marks(row), ...(ROWS.reference ? [textCell("reference", sides[0], "del")] : []), answer, ...(ROWS.audio ? [player(row)] : []));
}

class List {
  constructor(element) {
    this.element = element;
    this.above = make("div", { role: "presentation" });
    this.below = make("div", { role: "presentation" });
    this.heights = new Float64Array(ROWS.line.length).fill(GUESS);
    this.there = new Map();
    this.order = [];
    this.isDue = false;
    const later = () => {
      if (!this.isDue) requestAnimationFrame(() => this.fill());
      this.isDue = true;
    };
    addEventListener("scroll", later, { passive: true });
    addEventListener("resize", () => { this.heights.fill(GUESS); later(); });
    addEventListener("beforeprint", () => this.print());
    addEventListener("afterprint", () => this.showAll(this.order));
  }

  /** Show other rows, or the same in another language. */
  showAll(order) {
    this.order = order;
    this.there.clear();
    this.element.setAttribute("aria-rowcount", order.length);
    this.element.replaceChildren(this.above, this.below);
    document.getElementById("printed").textContent = "";
    this.fill();
  }

  /** Where each row begins, in pixels from the first, and where the last one ends. */
  begins() {
    const begins = new Float64Array(this.order.length + 1);
    this.order.forEach((row, place) => { begins[place + 1] = begins[place] + this.heights[row]; });
    return begins;
  }

  fill() {
    this.isDue = false;
    for (let round = 0; round < 4; round++) {
      const begins = this.begins();
      const top = -this.element.getBoundingClientRect().top;
      const first = Math.max(placeOf(begins, top - AHEAD), 0);
      const last = Math.min(placeOf(begins, top + innerHeight + AHEAD), this.order.length - 1);
      this.put(first, last, begins);
      if (!this.measure(placeOf(begins, top))) break;
    }
  }

  /** Have exactly the rows from `first` to `last` in the page, and one that is being played. */
  put(first, last, begins) {
    const wanted = new Set(this.order.slice(first, last + 1));
    for (const [row, element] of this.there) {
      const isPlayed = !wanted.has(row) && element.querySelector("audio")?.paused === false;
      element.classList.toggle("away", isPlayed);
      if (wanted.has(row) || isPlayed) continue;
      element.remove();
      this.there.delete(row);
    }
    this.above.style.height = `${begins[first] ?? 0}px`;
    this.below.style.height = `${begins[this.order.length] - begins[Math.max(last + 1, 0)]}px`;
    let before = this.above;
    for (let place = first; place <= last; place++) {
      const row = this.order[place];
      if (!this.there.has(row)) {
        this.there.set(row, rowElement(row));
        this.there.get(row).setAttribute("aria-rowindex", place + 1);
        before.after(this.there.get(row));
      }
      before = this.there.get(row);
    }
  }

  /** Learn how high the rows are; what is in the window stays where it is. Returns whether any was new. */
  measure(inWindow) {
    let [moved, isNew] = [0, false];
    for (const [row, element] of this.there) {
      if (element.classList.contains("away")) continue;
      const height = element.getBoundingClientRect().height;
      const more = height - this.heights[row];
      if (Math.abs(more) < 0.5) continue;
      isNew = true;
      if (Number(element.getAttribute("aria-rowindex")) <= inWindow) moved += more;
      this.heights[row] = height;
    }
    if (moved) scrollBy({ top: moved, behavior: "instant" });
    return isNew;
  }

  print() {
    const count = Math.min(this.order.length, PRINTED);
    this.there.clear();
    this.element.replaceChildren(...this.order.slice(0, count).map(rowElement));
    if (count < this.order.length) document.getElementById("printed").textContent = say("printed", count, this.order.length);
  }
}

/** The last place that begins at or before a height. */
function placeOf(begins, height) {
  let [low, high] = [0, begins.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (begins[middle] <= height) low = middle;
    else high = middle - 1;
  }
  return low;
}
