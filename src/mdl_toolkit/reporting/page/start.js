// What is shown of the values, in the language and the colours chosen.

const { run, evaluation } = VALUES;
const charts = run?.curves ? chartsOf(run.curves) : [];
let filters = null;
let confusion = null;

function card(title, value, ...more) {
  return make("div", { class: "card" }, make("span", {}, title), make("b", {}, value), ...more.map((text) => make("span", {}, text)));
}

function bounds(low, high, each, sign = false) {
  return [low, high].map((value) => figure(value, each.is_share, sign));
}

function pValue(p) {
  return p < 1e-3 ? "< 0.001" : `= ${p.toPrecision(2)}`;
}

function figureCard(each) {
  const more = [];
  if (each.low !== null) more.push(say("interval", ...bounds(each.low, each.high, each)));
  if (each.other !== undefined) {
    more.push(say("compared", figure(each.other, each.is_share), figure(each.difference, each.is_share, true)));
    if (each.difference_low !== null) more.push(say("differenceInterval", ...bounds(each.difference_low, each.difference_high, each, true)));
    if (each.p_value !== null) more.push(say("p", pValue(each.p_value)));
  }
  return card(each.title, figure(each.value, each.is_share), ...more);
}

function runCards() {
  const cards = run.outcome.map((each) => card(either(each.title), number(each.value), ...(each.best ? [say("best", number(each.best.value), number(each.best.step, 6))] : [])));
  return cards;
}

function showFigures() {
  const cards = [...(evaluation ? evaluation.figures.map(figureCard) : []), ...(run ? runCards() : [])];
  if (!cards.length) return;
  const section = show("figures");
  section.querySelector(".cards").replaceChildren(...cards);
  section.querySelector("ul").replaceChildren(...(evaluation?.notes ?? []).map((note) => make("li", {}, either(note))));
}

function fill(id, table) {
  show(id).querySelector(".wide").replaceChildren(table);
}

function showRun() {
  if (charts.length) show("curves").querySelector(".charts").replaceChildren(...charts.map((chart) => chart.figure));
  charts.forEach((chart) => chart.translate());
  if (run.evaluations.length) {
    const names = Object.keys(run.evaluations[run.evaluations.length - 1]);
    fill("evaluations", tableOf(names.map((name) => TEXTS[name] ? say(name) : name), run.evaluations.map((line) => names.map((name) => line[name] ?? ""))));
  }
  if (run.base) fillFacts();
  if (run.data.length) {
    const lines = run.data[0].figures.map((each, place) => [either(each.title), ...run.data.map((part) => part.figures[place].value)]);
    fill("data", tableOf(["", ...run.data.map((part) => either(part.title))], lines));
  }
  if (run.settings.length) {
    fill("settings", tableOf([say("name"), say("value"), say("meaning")], run.settings.map((each) => [each.name, each.value, either(each.help)])));
    document.querySelectorAll("#settings tbody tr").forEach((line, place) => {
      line.classList.toggle("changed", run.settings[place].is_changed);
      line.children[1].classList.add("value");
      line.children[2].classList.add("help");
    });
  }
}

function fillFacts() {
  const facts = [[say("base"), run.base], ...run.prompts.map((prompt) => [either(prompt.title), prompt.text])];
  show("data").querySelector("ul").replaceChildren(...facts.map(([title, text]) => make("li", {}, `${title}: ${text}`)));
}

function showGroups() {
  if (!evaluation?.groups.length) return;
  const { groups } = evaluation;
  const lines = groups.map((group) => [`${group.column}: ${short(group.name) || say("empty")}`, group.rows, ...group.figures.flatMap(groupCells)]);
  const heads = groups[0].figures.flatMap((each) => [each.title, ...(each.other === undefined ? [] : [say("otherModel"), say("difference")])]);
  fill("groups", tableOf([say("group"), say("rows"), ...heads], lines));
}

/** A figure with its interval; of two models the other's, and the difference with its interval and p. */
function groupCells(each) {
  const between = (low, high, sign) => (low === null ? "" : ` (${say("range", ...bounds(low, high, each, sign))})`);
  const cells = [figure(each.value, each.is_share) + between(each.low, each.high, false)];
  if (each.other === undefined) return cells;
  const p = each.p_value === null ? "" : `, ${say("p", pValue(each.p_value))}`;
  return [...cells, figure(each.other, each.is_share),
    figure(each.difference, each.is_share, true) + between(each.difference_low, each.difference_high, true) + p];
}

function showRows() {
  if (!filters) {
    filters = new Filters(new List(show("predictions").querySelector("#list")), () => confusion?.press());
    const place = document.querySelector("#confusion .wide");
    if (evaluation?.confusion) confusion = new Confusion(place, evaluation.confusion, filters);
  }
  if (confusion) show("confusion");
  confusion?.translate();
  filters.translate();
}

function translate() {
  document.documentElement.lang = chinese ? "zh-CN" : "en";
  document.title = `${VALUES.name} · mdl-toolkit`;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  document.getElementById("language").textContent = chinese ? "English" : "中文";
  document.getElementById("name").textContent = VALUES.name;
  document.querySelector("footer").textContent = say("made", VALUES.toolkit, VALUES.made);
  showFigures();
  if (run) showRun();
  showGroups();
  if (ROWS) showRows();
}

document.getElementById("language").addEventListener("click", () => {
  chinese = !chinese;
  translate();
});
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});
for (const details of document.querySelectorAll("details")) details.open = !ROWS;
translate();
