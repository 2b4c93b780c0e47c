// The page of mmgen's server: tabs, toggles and the key dialog, then the Draw and Edit views. Dialogue: talk.js.
import { call, dataUrl, drawOne, keys, server } from "./api.js";
import { attach, newDialogue, send, undo } from "./talk.js";
import { $, actions, clearNotice, keep, makeCard, painter, readPicture, remind, say, stops, trouble, working } from "./ui.js";
import { setWord, stored, toggleLanguage, translate } from "./words.js";

// --- Tabs, language, theme, key ---

const VIEWS = ["draw", "edit", "talk", "gallery"];
let active;

function open(view) {
  active = view;
  for (const name of VIEWS) {
    $(name).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === view));
    $(`tab-${name}`).tabIndex = name === view ? 0 : -1;
  }
}

document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const tabs = VIEWS.filter((name) => !$(`tab-${name}`).hidden);
  const here = tabs.indexOf(active);
  const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  open(tabs[(to + tabs.length) % tabs.length]);
  $(`tab-${active}`).focus();
});
for (const name of VIEWS) $(`tab-${name}`).addEventListener("click", () => open(name));

function setTheme(theme) { if (theme) document.documentElement.dataset.theme = theme; }
$("theme-toggle").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  setTheme(stored("localStorage", "theme", now === "dark" ? "light" : "dark"));
});
$("lang-toggle").addEventListener("click", toggleLanguage);

keys.ask = (wrong) => new Promise((resolve) => {
  const dialog = $("key-dialog");
  setWord($("key-title"), wrong ? "key_wrong" : "key_title");
  $("key-field").value = "";
  dialog.returnValue = "";
  dialog.addEventListener("close", () => resolve(dialog.returnValue || null), { once: true });
  dialog.showModal();
});
const acceptKey = () => $("key-dialog").close($("key-field").value.trim());
$("key-ok").addEventListener("click", acceptKey);
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !$("key-dialog").open) stops[active]?.();
});

// --- Draw and Edit: a run is n jobs, each one stream that fills one card ---

// A job: {path, body, card, recipe}; after runJob it has error, or its card is done.
async function runJob(view, job, signal) {
  const began = performance.now();
  job.error = null;
  job.card.state("partial", "drawing");
  try {
    const event = await drawOne(job.path, job.body, signal, (part) => job.card.show(dataUrl(part.b64_json, part.output_format)));
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const recipe = { ...job.recipe, size: event.size ?? job.recipe.size, seed: event.seed ?? job.recipe.seed, seconds, at: new Date().toISOString() };
    const format = event.output_format ?? "png";
    const entry = { src: dataUrl(event.b64_json, format), format, recipe, again: () => useAgain(view, recipe, job.source) };
    job.card.finish(entry);
    keep(entry);
  } catch (error) {
    job.error = error;
    if (signal.aborted) job.card.state("partial", "stopped");
    else if (error.refused) job.card.state("refused", "declined");
    else job.card.state("error", "failed");
  }
}

async function run(view, jobs, tries = 0) {
  const controller = new AbortController();
  const began = performance.now();
  clearNotice(view);
  working(view, () => controller.abort());
  say(view, "drawing");
  await Promise.all(jobs.map((job) => runJob(view, job, controller.signal)));
  working(view, null);
  const failed = jobs.filter((job) => job.error && !job.error.refused);
  const worst = (failed.find((job) => job.error.busy) ?? failed[0] ?? jobs.find((job) => job.error))?.error;
  if (controller.signal.aborted) return say(view, "stopped");
  if (!worst) return say(view, "done", { seconds: ((performance.now() - began) / 1000).toFixed(1) });
  say(view, worst.refused ? "declined" : "failed");
  trouble(view, worst, (more) => run(view, failed, more), tries);
}

// The fields of a view; null (and the browser's own hint at the field) when one is not valid.
function settings(view) {
  const field = (name) => $(`${view}-${name}`);
  if (!["number", "seed", "guidance"].every((name) => field(name).reportValidity())) return null;
  const prompt = field("prompt").value.trim();
  if (!prompt) { remind(view, "need_prompt"); field("prompt").focus(); return null; }
  const number = Number(field("number").value);
  const seed = field("seed").value === "" ? Math.floor(Math.random() * 1e9) : Number(field("seed").value);
  const guidance = field("guidance").value === "" ? undefined : Number(field("guidance").value);
  return { number, recipe: { prompt, size: field("size").value, seed, guidance, model: server.model.id, kind: view } };
}

// body(fields) makes the request of one job out of its fields.
function start(view, path, { number, recipe }, body, source) {
  const jobs = Array.from({ length: number }, (_, i) => {
    const { prompt, size, guidance } = recipe;
    const seed = recipe.seed + i;
    const fields = { prompt, size, seed, stream: true, partial_images: 3, ...(guidance !== undefined && { guidance }) };
    return { path, body: body(fields), card: makeCard(`${view}-result`, prompt, size), recipe: { ...recipe, seed }, source };
  });
  $(`${view}-results`).replaceChildren(...jobs.map((job) => job.card.root));
  jobs[0].card.root.scrollIntoView({ block: "nearest" }); // on a phone they begin below the fields
  run(view, jobs);
}

function draw() {
  const chosen = settings("draw");
  if (chosen) start("draw", "/v1/images/generations", chosen, (fields) => fields);
}

const paint = painter();

async function edit() {
  if ($("editor").hidden) return remind("edit", "need_picture");
  const chosen = settings("edit");
  if (!chosen) return;
  working("edit", () => {}); // the pictures take a moment: a second Enter starts no second run
  const [image, mask, painted] = await Promise.all([paint.picture(), paint.mask(), paint.painted()]);
  start("edit", "/v1/images/edits", chosen, (fields) => {
    const form = new FormData();
    form.append("image[]", image, "image.png");
    if (mask) form.append("mask", mask, "mask.png");
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    return form;
  }, { image, painted });
}

async function openEditor(source, painted) { // a file or a data URL
  open("edit");
  const canvas = await readPicture(source).catch(() => null);
  if (!canvas) return remind("edit", "not_picture");
  clearNotice("edit");
  $("editor").hidden = false;
  paint.load(canvas, painted);
  scrollTo(0, 0);
}
actions.edit = openEditor;

function useAgain(view, recipe, source) {
  open(view);
  if (source) openEditor(source.image, source.painted);
  for (const name of ["prompt", "size", "seed", "guidance"]) $(`${view}-${name}`).value = recipe[name] ?? "";
  if (!$(`${view}-size`).value) $(`${view}-size`).selectedIndex = 0; // a size this model does not offer
  $(`${view}-prompt`).focus();
}

// --- Buttons, Enter, and pictures dropped or pasted ---

function press(id, action) {
  $(id).addEventListener("click", () => { if ($(id).getAttribute("aria-disabled") !== "true") action(); });
}
function onEnter(id, action) {
  $(id).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Enter also ends a Chinese word
    event.preventDefault();
    action();
  });
}
for (const [view, action] of [["draw", draw], ["edit", edit], ["talk", send]]) {
  press(`${view}-button`, action);
  press(`${view}-stop`, () => stops[view]());
  onEnter(view === "talk" ? "talk-box" : `${view}-prompt`, () => $(`${view}-button`).click());
}
onEnter("key-field", acceptKey);
press("edit-clear", paint.clear);
press("talk-undo", undo);
press("talk-new", newDialogue);

async function takeFiles(files) {
  for (const file of [...files].filter((file) => file.type.startsWith("image/"))) {
    if (active === "talk") await attach(file);
    else return openEditor(file);
  }
}
for (const view of ["edit", "talk"])
  $(`${view}-file`).addEventListener("change", async ({ target }) => { await takeFiles(target.files); target.value = ""; });
document.addEventListener("paste", (event) => takeFiles(event.clipboardData.files));
document.addEventListener("drop", (event) => { event.preventDefault(); takeFiles(event.dataTransfer.files); });
document.addEventListener("dragover", (event) => event.preventDefault());

// --- Start ---

let keyless = false; // the dialog for the key was cancelled: don't ask again before there is one

async function findModel() {
  const [model] = (await (await call("/v1/models")).json()).data;
  server.model = model;
  $("model").textContent = model.id;
  for (const view of ["draw", "edit"]) $(`${view}-size`).append(...model.sizes.map((size) => new Option(size.replace("x", " × "), size)));
  $("draw-size").value = model.default_size;
  document.body.classList.toggle("no-edits", model.edits === false);
  $("tab-edit").hidden = model.edits === false;
}

// Until the server can draw, ask now and then; drawing is allowed meanwhile, the 503 has its own countdown.
async function watchServer() {
  const state = await fetch("/readyz").then((answer) => (answer.status === 503 ? "warming" : "ready"), () => "offline");
  $("server-state").dataset.state = state;
  setWord($("server-state"), state);
  if (state !== "offline" && !server.model.id && !(keyless && !stored("sessionStorage", "key")))
    await findModel().catch((error) => { keyless = error.status === 401; });
  if (state !== "ready" || !server.model.id) setTimeout(watchServer, 3000);
}

setTheme(stored("localStorage", "theme"));
translate();
open("draw");
watchServer();
