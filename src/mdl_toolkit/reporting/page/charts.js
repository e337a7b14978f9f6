// Curves as SVG: a grid, lines and dots, values under the pointer or the arrow keys, a legend that switches them.

const SVG = "http://www.w3.org/2000/svg";
const PLOT = { height: 230, left: 56, right: 10, top: 12, bottom: 26 };

function draw(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** Round numbers from `low` to `high`, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, place) => (first + place) * step);
}

class Chart {
  /** `series`: `{name, x, y, style, dots}`; `name` gives the text in the language of the moment. */
  constructor(key, series, fromZero) {
    Object.assign(this, { key, series: series.filter((each) => each.x.length), fromZero, hidden: new Set(), at: null });
    this.svg = draw("svg", { tabindex: 0, role: "img" });
    this.legend = make("div", { class: "legend" });
    this.caption = make("figcaption");
    this.figure = make("figure", { class: "chart" }, this.caption, this.svg, this.legend);
    this.steps = [...new Set(this.series.flatMap((each) => each.x))].sort((a, b) => a - b);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.moveTo(null));
    this.svg.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(this.figure);
  }

  translate() {
    this.caption.textContent = say(this.key);
    this.svg.setAttribute("aria-label", say(this.key));
    this.legend.replaceChildren(...this.series.map((each) => this.entry(each)));
    this.draw();
  }

  entry(each) {
    const mark = each.dots ? "dots" : each.style.includes("dashed") ? "dashed" : "";
    const entry = make("button", { type: "button", "aria-pressed": String(!this.hidden.has(each)) },
      make("i", { class: `${each.style.split(" ")[0]} ${mark}` }), each.name(), make("output"));
    entry.addEventListener("click", () => {
      if (!this.hidden.delete(each)) this.hidden.add(each);
      entry.setAttribute("aria-pressed", String(!this.hidden.has(each)));
      this.draw();
    });
    return entry;
  }

  draw() {
    const width = Math.max(this.figure.clientWidth - 24, 200);
    const shown = this.series.filter((each) => !this.hidden.has(each));
    const values = shown.flatMap((each) => each.y);
    const [first, last] = [this.steps[0], this.steps[this.steps.length - 1]];
    const low = this.fromZero ? 0 : Math.min(...values);
    const high = Math.max(...values);
    const margin = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    const bounds = values.length ? [this.fromZero ? 0 : low - margin, high + margin] : [0, 1];
    this.x = (step) => PLOT.left + ((step - first) / (last - first || 1)) * (width - PLOT.left - PLOT.right);
    this.y = (value) => PLOT.height - PLOT.bottom - ((value - bounds[0]) / (bounds[1] - bounds[0])) * (PLOT.height - PLOT.top - PLOT.bottom);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${PLOT.height}`);
    this.svg.setAttribute("height", PLOT.height);
    this.svg.replaceChildren(...this.grid(bounds, [first, last], width), ...shown.flatMap((each) => this.curve(each)));
    this.cursor = draw("line", { class: "cursor", y1: PLOT.top, y2: PLOT.height - PLOT.bottom, visibility: "hidden" });
    this.svg.append(this.cursor);
    this.moveTo(this.at);
  }

  grid(bounds, [first, last], width) {
    const lines = ticks(...bounds, 4).flatMap((value) => [
      draw("line", { class: "grid", x1: PLOT.left, x2: width - PLOT.right, y1: this.y(value), y2: this.y(value) }),
      draw("text", { x: PLOT.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, number(value, 3)),
    ]);
    const steps = ticks(first, last, width / 110).filter(Number.isInteger);
    return [...lines, ...steps.map((step) =>
      draw("text", { x: this.x(step), y: PLOT.height - 8, "text-anchor": step === last ? "end" : "middle" }, number(step, 6)))];
  }

  curve(each) {
    if (each.dots || each.x.length === 1) {
      return each.x.map((step, place) => draw("circle", { class: each.style, cx: this.x(step), cy: this.y(each.y[place]), r: 3.5 }));
    }
    const path = each.x.map((step, place) => `${place ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(each.y[place]).toFixed(1)}`);
    return [draw("path", { class: each.style, d: path.join("") })];
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const place = event.clientX - box.left;
    this.moveTo(this.steps.reduce((best, step) => (Math.abs(this.x(step) - place) < Math.abs(this.x(best) - place) ? step : best)));
  }

  press(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const place = this.at === null ? (move > 0 ? -1 : this.steps.length) : this.steps.indexOf(this.at);
    this.moveTo(this.steps[Math.min(Math.max(place + move, 0), this.steps.length - 1)]);
  }

  /** Show the values at a step beside the names in the legend, or none. */
  moveTo(step) {
    this.at = step;
    this.cursor?.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(step));
    this.caption.textContent = say(this.key) + (step === null ? "" : ` · ${say("step")} ${number(step, 6)}`);
    this.legend.querySelectorAll("output").forEach((output, place) => {
      const found = step === null ? -1 : this.series[place].x.indexOf(step);
      output.textContent = found < 0 ? "" : number(this.series[place].y[found]);
    });
  }
}

/** The charts of a run. */
function chartsOf(curves) {
  const named = (key) => () => say(key);
  const line = (name, values, style, dots = false) => ({ name, x: values?.x ?? [], y: values?.y ?? [], style, dots });
  const styles = ["blue", "orange dashed", "grey"];
  const metrics = Object.entries(curves.metrics).map(([name, values], place) => line(() => name, values, styles[place % 3]));
  return [
    new Chart("loss", [
      line(named("eachStep"), curves.loss, "pale"),
      line(named("smoothed"), curves.smoothed, "blue"),
      line(named("evalLoss"), curves.eval_loss, "orange", true),
    ], false),
    new Chart("rate", [line(named("rate"), curves.learning_rate, "grey dashed")], true),
    new Chart("metric", metrics, false),
  ].filter((chart) => chart.series.length);
}
