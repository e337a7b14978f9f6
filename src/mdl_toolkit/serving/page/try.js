"use strict";
(() => {
// Texts in both languages; whatever comes from the server becomes text, never markup.
const TEXTS = {
  title: ["Try the model", "试用模型"],
  token: ["Token", "令牌"],
  enter: ["Enter", "确定"],
  drop: ["Record, or drop an audio file here", "录一段音，或把音频文件拖到这里"],
  record: ["Record", "录音"],
  stop: ["Stop", "停止"],
  choose: ["Choose a file", "选择文件"],
  system: ["System prompt", "系统提示词"],
  user: ["User prompt", "用户提示词"],
  left: ["Model", "模型"],
  right: ["Beside it", "对照"],
  none: ["(none)", "（无）"],
  most: ["Most tokens", "最多词元数"],
  ask: ["Ask", "提问"],
  recorded: ["recorded, {0} s", "录音，{0} 秒"],
  noMicrophone: ["the browser gives no microphone here: {0}", "浏览器未能提供麦克风：{0}"],
  insecure: ["open this page by https or on the machine itself", "请通过 https 或在服务器本机打开本页"],
  noRecording: ["record something or choose a file first", "请先录音或选择文件"],
  working: ["listening …", "正在听……"],
  done: ["{0} s, {1} tokens", "{0} 秒，{1} 个词元"],
  cut: ["{0} s, {1} tokens, cut at the limit", "{0} 秒，{1} 个词元，已达上限"],
  failed: ["the server does not answer ({0})", "服务器没有响应（{0}）"],
};
const find = (id) => document.getElementById(id);
let chinese = navigator.language.toLowerCase().startsWith("zh");
let recording = null;
let recorder = null;
let models = [];

function say(name, ...values) {
  return TEXTS[name][chinese ? 1 : 0].replace(/\{(\d)\}/g, (_, place) => values[place]);
}

function make(kind, text = "") {
  const element = document.createElement(kind);
  element.textContent = text;
  return element;
}

function complain(text) {
  find("problem").textContent = text;
}

// --- the server ---

async function call(path, body) {
  const headers = { "Accept-Language": chinese ? "zh" : "en" };
  if (find("token").value) headers.Authorization = `Bearer ${find("token").value}`;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { headers, method: body ? "POST" : "GET", body: body && JSON.stringify(body) })
    .catch((problem) => { throw new Error(say("failed", problem.message)); });
  if (response.status === 401) find("login").hidden = false;
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Error(answer?.error?.message ?? say("failed", response.status));
  }
  return response;
}

/** The objects of a stream of events, as they come. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const text = part.replace(/^data: /, "");
      if (text !== "[DONE]") yield JSON.parse(text);
    }
  }
}

async function loadModels() {
  const { data, limits } = await (await call("/v1/models")).json();
  models = data;
  find("login").hidden = true;
  find("most").max = limits.new_tokens;
  find("most").value = Math.min(find("most").value, limits.new_tokens);
  fillModels();
  find("right").value = models.length > 1 ? models[models.length - 1].id : "";
  const trained = models.find((model) => model.id === find("right").value) ?? models[0];
  find("system").value = trained.prompts.system ?? "";
  find("user").value = trained.prompts.user ?? "";
}

function fillModels() {
  for (const id of ["left", "right"]) {
    const select = find(id);
    const chosen = select.value;
    const options = models.map((model) => Object.assign(make("option", model.id), { value: model.id }));
    if (id === "right") options.unshift(Object.assign(make("option", say("none")), { value: "" }));
    select.replaceChildren(...options);
    if (options.some((option) => option.value === chosen)) select.value = chosen;
  }
}

// --- the recording ---

function take(blob, name) {
  recording = blob;
  find("source").textContent = name;
  const player = find("listen");
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(blob);
  player.hidden = false;
  complain("");
}

function showRecorder() {
  find("record").textContent = say(recorder ? "stop" : "record");
  find("record").setAttribute("aria-pressed", String(recorder !== null));
}

async function record() {
  if (recorder) {
    recorder.stop();
    return;
  }
  if (!navigator.mediaDevices) throw new Error(say("noMicrophone", say("insecure")));
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true })
    .catch((problem) => { throw new Error(say("noMicrophone", problem.message)); });
  const parts = [];
  const begun = performance.now();
  recorder = new MediaRecorder(stream);
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  recorder.addEventListener("stop", () => {
    stream.getTracks().forEach((track) => track.stop());
    take(new Blob(parts, { type: recorder.mimeType }), say("recorded", ((performance.now() - begun) / 1000).toFixed(1)));
    recorder = null;
    showRecorder();
  });
  recorder.start();
  showRecorder();
}

async function inBase64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  return btoa(text);
}

// --- questions and answers ---

async function answer(model, audio, place) {
  const [text, state] = [make("p"), make("small", say("working"))];
  place.replaceChildren(make("h2", model), text, state);
  const content = [{ type: "input_audio", input_audio: { data: audio, format: "wav" } }, { type: "text", text: find("user").value }];
  const begun = performance.now();
  let reason = null;
  let tokens = 0;
  try {
    const messages = [{ role: "system", content: find("system").value }, { role: "user", content }];
    const asked = { model, messages, max_tokens: Number(find("most").value), stream: true, stream_options: { include_usage: true } };
    for await (const event of events(await call("/v1/chat/completions", asked))) {
      if (event.error) throw new Error(event.error.message);
      text.textContent += event.choices[0]?.delta.content ?? "";
      reason = event.choices[0]?.finish_reason ?? reason;
      tokens = event.usage?.completion_tokens ?? tokens;
    }
    state.textContent = say(reason === "length" ? "cut" : "done", ((performance.now() - begun) / 1000).toFixed(1), tokens);
  } catch (problem) {
    state.textContent = problem.message;
  }
}

async function ask() {
  if (!recording) throw new Error(say("noRecording"));
  const chosen = [...new Set([find("left").value, find("right").value])].filter(Boolean);
  const places = chosen.map(() => make("article"));
  find("answers").replaceChildren(...places);
  find("ask").disabled = true;
  try {
    const audio = await inBase64(recording);
    await Promise.all(chosen.map((model, place) => answer(model, audio, places[place])));
  } finally {
    find("ask").disabled = false;
  }
}

// --- what is pressed and dropped ---

/** Do something, and say what went wrong. */
const trying = (work) => async (event) => {
  event?.preventDefault();
  complain("");
  await work(event).catch((problem) => complain(problem.message));
};

function translate() {
  document.documentElement.lang = chinese ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  find("language").textContent = chinese ? "English" : "中文";
  showRecorder();
  if (models.length) fillModels();
}

find("language").addEventListener("click", () => {
  chinese = !chinese;
  translate();
});
find("login").addEventListener("submit", trying(loadModels));
find("record").addEventListener("click", trying(record));
find("ask").addEventListener("click", trying(ask));
find("choose").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", () => {
  const [file] = find("file").files;
  if (file) take(file, file.name);
});
const drop = find("drop");
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    const file = kind === "drop" ? event.dataTransfer.files[0] : null;
    if (file) take(file, file.name);
  });
}
translate();
trying(loadModels)();
})();
