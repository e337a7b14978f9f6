// Texts in both languages, and what makes elements. Whatever comes from data becomes text, never markup.

const TEXTS = {
  report: ["Report", "报告"],
  theme: ["Dark / light", "深色 / 浅色"],
  figures: ["Results", "结果"],
  curves: ["Curves", "曲线"],
  evaluations: ["Evaluations during training", "训练中的评估"],
  data: ["Data", "数据"],
  base: ["base model", "基础模型"],
  settings: ["Settings", "设置"],
  groups: ["By group", "分组结果"],
  confusion: ["Confusion matrix", "混淆矩阵"],
  confusionHint: [
    "Rows: reference; columns: answer. Click a number to see these rows below, again to see all.",
    "行：参考答案；列：模型回答。点击数字，下方只显示对应的行；再次点击则显示全部。",
  ],
  predictions: ["Predictions", "预测"],
  loss: ["Loss", "损失"],
  rate: ["Learning rate", "学习率"],
  metric: ["Metrics on the evaluation data", "评估指标"],
  eachStep: ["training loss, each step", "训练损失（每步）"],
  smoothed: ["training loss, smoothed", "训练损失（平滑）"],
  evalLoss: ["evaluation loss", "评估损失"],
  step: ["step", "步数"],
  epoch: ["epoch", "epoch"],
  name: ["option", "选项"],
  value: ["value", "值"],
  meaning: ["meaning", "含义"],
  rows: ["rows", "行数"],
  group: ["group", "组"],
  other: ["other", "其他"],
  empty: ["(empty)", "（空）"],
  all: ["all", "全部"],
  result: ["Result", "结果"],
  right: ["right", "正确"],
  wrong: ["wrong", "错误"],
  failed: ["failed", "失败"],
  expected: ["Reference is", "参考答案为"],
  given: ["Answer is", "回答为"],
  search: ["Search", "搜索"],
  sort: ["Sort by", "排序"],
  worst: ["worst first", "最差优先"],
  errorsDown: ["most errors first", "错误最多优先"],
  lengthDown: ["longest first", "最长优先"],
  lengthUp: ["shortest first", "最短优先"],
  scoreDown: ["highest score first", "得分最高优先"],
  scoreUp: ["lowest score first", "得分最低优先"],
  line: ["as in the file", "文件顺序"],
  reset: ["Show all", "显示全部"],
  count: ["{0} of {1} rows", "共 {1} 行，显示 {0} 行"],
  reference: ["Reference", "参考答案"],
  prediction: ["Prediction", "预测"],
  lineNumber: ["line {0}", "第 {0} 行"],
  errorsOf: ["errors: {0} of {1}", "错误：{0}/{1}"],
  score: ["score {0}", "得分 {0}"],
  recording: ["Recording", "录音"],
  play: ["recording of line {0}", "第 {0} 行的录音"],
  notPlayed: ["cannot be played here", "无法在此播放"],
  printed: ["The first {0} of {1} rows are printed.", "仅打印前 {0} 行，共 {1} 行。"],
  interval: ["95 % interval: {0} to {1}", "95% 置信区间：{0} 至 {1}"],
  compared: ["other: {0}; difference {1}", "对比：{0}；差值 {1}"],
  differenceInterval: ["95 % interval of the difference: {0} to {1}", "差值的 95% 置信区间：{0} 至 {1}"],
  range: ["{0} to {1}", "{0} 至 {1}"],
  p: ["p {0}", "p {0}"],
  otherModel: ["other model", "对比模型"],
  difference: ["difference", "差值"],
  best: ["best: {0} at step {1}", "最佳：{0}（第 {1} 步）"],
  made: ["Made by mdl-toolkit {0} on {1}. Nothing on this page is fetched or sent, except a recording at an address when you play it.",
    "由 mdl-toolkit {0} 于 {1} 生成。除播放网络地址上的录音外，本页面不读取也不发送任何数据。"],
};

const VALUES = JSON.parse(document.getElementById("values").textContent);
let chinese = (navigator.language || "").toLowerCase().startsWith("zh");

function say(key, ...values) {
  return TEXTS[key][chinese ? 1 : 0].replace(/\{(\d)\}/g, (_, place) => values[place]);
}

/** One of a pair `{en, zh}`. */
function either(text) {
  return chinese ? text.zh : text.en;
}

/** An element with attributes, and with children that are elements or texts. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function show(id) {
  const section = document.getElementById(id);
  section.hidden = false;
  return section;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return value.toLocaleString(chinese ? "zh-CN" : "en-US", { maximumSignificantDigits: Math.max(digits, String(Math.trunc(Math.abs(value))).length) });
}

function figure(value, isShare, sign = false) {
  if (value === null) return "–";
  const text = isShare ? `${(100 * value).toFixed(2)}%` : value.toFixed(2);
  return sign && value >= 0 ? `+${text}` : text;
}

/** A name that may have a million letters, as a table or a list shows it. */
function short(name) {
  return name.length > 60 ? `${name.slice(0, 59)}…` : name;
}

/** A table of cells; numbers stand to the right. */
function tableOf(heads, lines) {
  const isNumber = (column) => lines.every((line) => typeof line[column] === "number" || line[column] === "");
  const kinds = heads.map((_, column) => (isNumber(column) ? "number" : null));
  const cell = (tag, content, column) =>
    make(tag, { class: kinds[column] }, typeof content === "number" ? number(content) : content);
  return make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head, column) => cell("th", head, column)))),
    make("tbody", {}, ...lines.map((line) => make("tr", {}, ...line.map((each, column) => cell("td", each, column))))));
}
