// The pieces the views share: elements, picture cards, the gallery, notices, and the mask painter.
import { setWord } from "./words.js";

export const $ = (id) => document.getElementById(id);

// el("button", {word: "stop", onclick: f}, child...): text goes in as text, never as markup.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "word") setWord(node, ...[value].flat());
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const button = (word, onclick) => el("button", { type: "button", word, onclick });

// Small pictures are shown enlarged: under 128 pixels as the pixels they are.
export function picture(src, alt) {
  const img = el("img", { alt });
  img.addEventListener("load", () => img.classList.toggle("pixels", Math.max(img.naturalWidth, img.naturalHeight) < 128));
  if (src) img.src = src;
  return img;
}

export const say = (view, ...word) => setWord($(`${view}-status`), ...word);

// While a view works, its stop button and Escape call stop(); null: it rests. In a countdown there is
// something to stop too, but its main button may start something new.
export const stops = {};
export function working(view, stop, countdown = false) {
  stops[view] = stop;
  $(`${view}-stop`).setAttribute("aria-disabled", String(!stop));
  $(`${view}-button`).setAttribute("aria-disabled", String(Boolean(stop) && !countdown));
}

// --- Cards: a picture on its way (data-state partial), done, refused or failed ---

// An entry is a finished picture: {src, format, recipe, again()}; recipe is what "copy recipe" copies.
export const actions = { edit: null }; // app.js puts its editor here

export function makeCard(testid, prompt, size, entry) {
  const img = picture(null, prompt);
  const frame = el("div", { class: "frame" }, img);
  const meta = el("p", { class: "meta", word: "drawing" });
  const root = el("figure", { class: "card", "data-testid": testid }, frame);
  const bar = el("div", { class: "actions" });
  root.append(el("figcaption", {}, el("p", { class: "prompt" }, prompt), meta, bar));
  const show = (src) => { img.src = src; root.classList.add("begun"); };
  const state = (name, word) => {
    root.dataset.state = name;
    if (word) setWord(meta, word);
    root.classList.toggle("waiting", word === "drawing");
  };
  const finish = (entry) => {
    const { size, seed, guidance, model, seconds } = entry.recipe;
    state("done");
    show(entry.src);
    delete meta.dataset.word; // the facts are translated one by one
    meta.replaceChildren(el("span", {}, size.replace("x", "×")), el("span", { word: ["seed_is", { seed }] }));
    if (guidance !== undefined) meta.append(el("span", { word: ["guidance_is", { guidance }] }));
    if (model) meta.append(el("span", {}, model));
    meta.append(el("span", { word: ["took", { seconds }] }));
    const name = `${prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "")}-${seed}.${entry.format}`;
    bar.append(button("again", entry.again), button("edit", () => actions.edit(entry.src)),
      el("a", { href: entry.src, download: name, word: "download" }), button("copy", (event) => copyRecipe(event.target, entry.recipe)));
  };
  const [width, height] = size.split("x");
  if (height) frame.style.aspectRatio = `${width} / ${height}`;
  if (entry) finish(entry); else state("partial", "drawing");
  return { root, show, state, finish };
}

async function copyRecipe(pressed, recipe) {
  const json = JSON.stringify(recipe, null, 2);
  // Over plain http on a home network browsers have no clipboard object: the old way still works there.
  const copied = await (navigator.clipboard?.writeText(json).then(() => true) ?? Promise.reject()).catch(() => {
    const area = el("textarea", {}, json);
    pressed.after(area);
    area.select();
    const worked = document.execCommand("copy");
    area.remove();
    pressed.focus();
    return worked;
  });
  setWord(pressed, copied ? "copied" : "copy_failed");
  setTimeout(() => setWord(pressed, "copy"), 2000);
}

// --- The gallery: newest first, in memory only ---

const GALLERY_MOST = 200;

export function keep(entry) {
  const list = $("gallery-list");
  list.prepend(makeCard("gallery-item", entry.recipe.prompt, entry.recipe.size, entry).root);
  if (list.children.length > GALLERY_MOST) list.lastChild.remove();
  $("gallery-count").textContent = list.children.length;
}

// --- Notices ---

const noticeBox = (kind, word, message, ...more) => el("div", { class: `notice ${kind}`, "data-testid": "notice", "data-kind": kind },
  el("strong", { word }), ...(message ? [el("p", {}, message)] : []), ...more);

export const refusalBox = (message) => noticeBox("refused", "refused", message, el("p", { class: "hint", word: "refused_hint" }));

export const clearNotice = (view) => $(`${view}-notices`).replaceChildren();
const notify = (view, box) => {
  $(`${view}-notices`).replaceChildren(box);
  box.scrollIntoView({ block: "nearest" });
};
export const remind = (view, word) => notify(view, noticeBox("error", word));

// Says what went wrong. A busy server is asked again by itself, after the time it asked for and at most
// AUTOMATIC times; after that, and for other failures, again() waits for its button.
const AUTOMATIC = 5;
export function trouble(view, error, again, tries = 0) {
  if (error.refused) return notify(view, refusalBox(error.message));
  const word = error.status === 429 ? "busy" : error.status === 503 ? "unavailable"
    : ["network", "cut"].includes(error.code) ? error.code : "error";
  const retry = () => { clearNotice(view); again(tries + 1); };
  const count = el("p", { class: "hint", "aria-hidden": "true" }); // not read aloud every second
  const box = noticeBox(error.busy ? "busy" : "error", word, error.message, count, button("retry", retry));
  if (word === "network") setWord(count, "network_hint");
  notify(view, box);
  if (!error.busy || tries >= AUTOMATIC) return;
  let seconds = Math.ceil(error.retryAfter || 5);
  const tick = () => {
    if (!box.isConnected) clearInterval(timer); // something else took its place
    else if (seconds === 0) retry();
    else setWord(count, "retry_in", { seconds: seconds-- });
  };
  const timer = setInterval(tick, 1000);
  working(view, () => { clearNotice(view); working(view, null); say(view, "stopped"); }, true);
  tick();
}

// --- Pictures from outside, and the mask painted over one ---

const LONGEST = 1024; // the models draw 256 at most: a phone's photo need not travel whole

// A file or data URL as a canvas: turned upright, in sRGB, not longer than LONGEST.
export async function readPicture(source) {
  const url = source instanceof Blob ? URL.createObjectURL(source) : source;
  const img = new Image();
  img.src = url;
  await img.decode().finally(() => { if (url !== source) URL.revokeObjectURL(url); });
  const scale = Math.min(1, LONGEST / Math.max(img.naturalWidth, img.naturalHeight));
  const canvas = el("canvas", { width: Math.max(1, Math.round(img.naturalWidth * scale)), height: Math.max(1, Math.round(img.naturalHeight * scale)) });
  canvas.getContext("2d").drawImage(img, 0, 0, canvas.width, canvas.height);
  return canvas;
}

export const toPng = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

// The painted area is a canvas of the picture's own size, so that its pixels are the mask's.
export function painter() {
  const [base, paint, cursor, brush, erase] = ["picture", "canvas", "cursor", "brush", "erase"].map((name) => $(`edit-${name}`));
  const pen = paint.getContext("2d", { willReadFrequently: true });
  const thickness = () => Math.max(1, Math.max(paint.width, paint.height) * brush.value / 100);
  let last = null; // the last point of the stroke being drawn

  const place = (event) => {
    const box = paint.getBoundingClientRect();
    const scale = paint.width / box.width;
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    cursor.hidden = false;
    cursor.style.width = cursor.style.height = `${thickness() / scale}px`;
    cursor.style.left = `${x}px`;
    cursor.style.top = `${y}px`;
    return [x * scale, y * scale];
  };
  const stroke = (from, to) => {
    pen.globalCompositeOperation = erase.checked ? "destination-out" : "source-over";
    Object.assign(pen, { lineWidth: thickness(), lineCap: "round", strokeStyle: "#e0218a" });
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(...to);
    pen.stroke();
  };
  paint.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button) return;
    paint.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  paint.addEventListener("pointermove", (event) => {
    const point = place(event);
    if (last && event.isPrimary) { stroke(last, point); last = point; }
  });
  for (const name of ["pointerup", "pointercancel"]) paint.addEventListener(name, () => { last = null; });
  paint.addEventListener("pointerleave", () => { cursor.hidden = true; });

  return {
    load(picture, painted) {
      for (const canvas of [base, paint]) Object.assign(canvas, { width: picture.width, height: picture.height });
      base.getContext("2d").drawImage(picture, 0, 0);
      if (painted) pen.drawImage(painted, 0, 0);
      const small = Math.max(picture.width, picture.height) < 128;
      for (const canvas of [base, paint]) canvas.classList.toggle("pixels", small);
    },
    clear: () => pen.clearRect(0, 0, paint.width, paint.height),
    picture: () => toPng(base),
    painted: () => createImageBitmap(paint), // to load again with the picture
    // Alpha 0 where painted, 255 elsewhere and nothing between; null when nothing is painted.
    mask() {
      const pixels = pen.getImageData(0, 0, paint.width, paint.height);
      let painted = false;
      for (let i = 0; i < pixels.data.length; i += 4) {
        const here = pixels.data[i + 3] >= 128;
        painted ||= here;
        pixels.data.set([0, 0, 0, here ? 0 : 255], i);
      }
      if (!painted) return null;
      const canvas = el("canvas", { width: paint.width, height: paint.height });
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      return toPng(canvas);
    },
  };
}
