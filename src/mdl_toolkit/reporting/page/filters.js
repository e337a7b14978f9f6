// Which rows are shown, and in which order: the fields above the table, and the confusion matrix.

const PAUSE = 120; // ms after the last key before the text is looked for
const SORTS = {
  worst: () => 0,
  errorsDown: (a, b) => ROWS.errors[b] - ROWS.errors[a],
  lengthDown: (a, b) => lengthOf(b) - lengthOf(a),
  lengthUp: (a, b) => lengthOf(a) - lengthOf(b),
  scoreDown: (a, b) => scoreOf(b, -1) - scoreOf(a, -1),
  scoreUp: (a, b) => scoreOf(a, 1) - scoreOf(b, 1),
  line: (a, b) => ROWS.line[a] - ROWS.line[b],
};

/** The score for an order in which rows without one come last. */
function scoreOf(row, sign) {
  return ROWS.score[row] ?? sign * Number.MAX_VALUE;
}

function lengthOf(row) {
  return ROWS.length?.[row] ?? ROWS.prediction[row].length;
}

class Filters {
  constructor(list, changed) {
    Object.assign(this, { list, changed, chosen: {}, search: "", sort: ROWS.state ? "worst" : "line", timer: null, texts: null });
    this.form = document.getElementById("filters");
    this.form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Rows as numbers by which they can be chosen: what is chosen, title, and names of the numbers. */
  fields() {
    const labels = ROWS.labels?.map((label) => short(label) || say("empty"));
    return [
      ["state", say("result"), ROWS.state, [say("wrong"), say("right"), say("failed")]],
      ["expected", say("expected"), ROWS.expected, labels],
      ["given", say("given"), ROWS.given, labels && [...labels, `(${say("other")})`]],
      ...ROWS.groups.map((group, place) => [`group${place}`, group.title, group.codes, group.names]),
    ].filter(([, , codes]) => codes);
  }

  translate() {
    const sorts = Object.keys(SORTS).filter((name) =>
      ({ worst: ROWS.state, errorsDown: ROWS.errors, scoreDown: ROWS.score, scoreUp: ROWS.score })[name] !== null);
    const search = make("input", { type: "search", id: "search", value: this.search });
    search.addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.find(search.value), PAUSE);
    });
    const reset = make("button", { type: "button", id: "reset" }, say("reset"));
    reset.addEventListener("click", () => this.reset());
    this.form.replaceChildren(
      ...this.fields().map(([name, title, codes, names]) => this.choice(name, title, codes, names)),
      make("label", {}, say("search"), search),
      make("label", {}, say("sort"), this.select("sort", sorts.map((name) => [name, say(name)]), this.sort, (name) => { this.sort = name; })),
      reset);
    this.apply();
  }

  choice(name, title, codes, names) {
    const used = new Set(codes);
    const options = [["", say("all")], ...names.map((each, code) => [String(code), short(each) || say("empty")]).filter(([code]) => used.has(Number(code)))];
    return make("label", {}, title, this.select(name, options, String(this.chosen[name] ?? ""), (code) => this.choose({ [name]: code })));
  }

  select(name, options, value, chosen) {
    const select = make("select", { id: `by-${name}` }, ...options.map(([key, text]) => make("option", { value: key }, text)));
    select.value = value;
    select.addEventListener("change", () => {
      chosen(select.value);
      this.apply();
    });
    return select;
  }

  /** Choose rows by numbers; an empty one takes a choice back. */
  choose(codes) {
    for (const [name, code] of Object.entries(codes)) {
      if (code === "") delete this.chosen[name];
      else this.chosen[name] = Number(code);
    }
  }

  reset() {
    Object.assign(this, { chosen: {}, search: "" });
    this.translate();
    document.getElementById("reset").focus();
  }

  find(text) {
    this.search = text;
    this.apply();
  }

  rows() {
    const fields = this.fields().filter(([name]) => name in this.chosen);
    const wanted = this.search.trim().toLowerCase();
    if (wanted) this.texts ??= ROWS.line.map((_, row) => textOf(row));
    const rows = [];
    for (let row = 0; row < ROWS.line.length; row++) {
      if (fields.every(([name, , codes]) => codes[row] === this.chosen[name]) && (!wanted || this.texts[row].includes(wanted))) rows.push(row);
    }
    return rows.sort(SORTS[this.sort]); // rows are kept the worst first, and sorting is stable
  }

  apply() {
    const rows = this.rows();
    document.getElementById("count").textContent = say("count", number(rows.length), number(ROWS.line.length));
    this.list.showAll(rows);
    this.changed();
  }
}

/** All that can be searched in a row. */
function textOf(row) {
  const name = ROWS.audio ? nameOf(row) : "";
  return [ROWS.reference?.[row], ROWS.prediction[row], ROWS.error?.[row], name].join("\n").toLowerCase();
}

/** The confusion matrix; a click on a number chooses its rows. */
class Confusion {
  constructor(place, confusion, filters) {
    Object.assign(this, { place, confusion, filters });
    place.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) this.click(Number(button.dataset.expected), Number(button.dataset.given));
    });
  }

  click(expected, given) {
    const { chosen } = this.filters;
    const isChosen = chosen.expected === expected && chosen.given === given;
    this.filters.choose(isChosen ? { expected: "", given: "" } : { expected, given });
    this.filters.translate();
  }

  translate() {
    const { labels, counts } = this.confusion;
    const hasOther = counts.some((row) => row[labels.length] > 0);
    const names = [...labels.map((label) => short(label) || say("empty")), `(${say("other")})`].slice(0, labels.length + hasOther);
    const head = make("tr", {}, make("th"), ...names.map((name) => make("th", { scope: "col", title: name }, name)));
    const body = counts.map((row, expected) => make("tr", {}, make("th", { scope: "row", title: names[expected] }, names[expected]),
      ...names.map((_, given) => this.cell(row, expected, given))));
    this.place.replaceChildren(make("table", { class: "matrix" }, make("thead", {}, head), make("tbody", {}, ...body)));
    this.press();
  }

  cell(row, expected, given) {
    if (!row[given]) return make("td", {}, "·");
    const names = [...this.confusion.labels.map(short), `(${say("other")})`];
    const button = make("button", {
      type: "button", "data-expected": expected, "data-given": given, class: expected === given ? "right" : null,
      "aria-label": `${names[expected]} → ${names[given]}: ${row[given]}`,
    }, number(row[given]));
    const share = row[given] / row.reduce((sum, count) => sum + count, 0);
    button.style.background = `color-mix(in srgb, var(${expected === given ? "--blue" : "--orange"}) ${Math.round(8 + 40 * share)}%, transparent)`;
    return make("td", {}, button);
  }

  /** Show which cell is chosen. */
  press() {
    const { chosen } = this.filters;
    for (const button of this.place.querySelectorAll("button")) {
      const isChosen = chosen.expected === Number(button.dataset.expected) && chosen.given === Number(button.dataset.given);
      button.setAttribute("aria-pressed", String(isChosen));
    }
  }
}
