// The dialogue over /v1/responses. The server keeps the history: we keep the id of its last answer.
import { call, dataUrl, events, server } from "./api.js";
import { $, clearNotice, el, keep, makeCard, picture, readPicture, refusalBox, remind, say, stops, trouble, working } from "./ui.js";

let previous = null; // id of the last answer
let attached = []; // data URLs that go with the next message
const exchanges = []; // {text, pictures, before: the id it follows, turns: [user's, model's]}

function showAttached() {
  $("talk-attached").replaceChildren(...attached.map((src) => el("button", {
    type: "button", "data-word-aria-label": "remove", "data-word-title": "remove",
    onclick: () => { attached = attached.filter((other) => other !== src); showAttached(); },
  }, picture(src, ""))));
}

export async function attach(file) {
  const canvas = await readPicture(file).catch(() => null);
  if (!canvas) return remind("talk", "not_picture");
  attached.push(canvas.toDataURL("image/png"));
  showAttached();
}

function addTurn(role) {
  const turn = el("li", { class: `turn ${role}`, "data-testid": "talk-turn", "data-role": role }, el("span", { class: "who", word: role }));
  $("talk-log").append(turn);
  return turn;
}

// Keeps the end in sight, unless the reader has scrolled back.
function follow(always) {
  const page = document.documentElement;
  if (always || page.scrollHeight - page.scrollTop - page.clientHeight < 500) $("talk").scrollIntoView({ block: "end" });
}

export function send() {
  const text = $("talk-box").value.trim();
  if (!text && !attached.length) return remind("talk", "need_prompt");
  const turn = addTurn("user");
  turn.append(el("p", { class: "text" }, text), ...attached.map((src) => picture(src, "")));
  const exchange = { text, pictures: attached, before: previous, turns: [turn, addTurn("assistant")] };
  exchanges.push(exchange);
  $("talk-box").value = "";
  attached = [];
  showAttached();
  ask(exchange);
}

async function ask(exchange, tries = 0) {
  const { text, pictures, before, turns: [, turn] } = exchange;
  const controller = new AbortController();
  const { signal } = controller;
  const began = performance.now();
  const body = el("div", { class: "body" }, el("p", { class: "meta", word: "thinking" }));
  turn.replaceChildren(turn.firstChild, body);
  clearNotice("talk");
  working("talk", () => controller.abort());
  say("talk", "thinking");
  allowUndo();
  follow(true);

  const content = [{ type: "input_text", text }, ...pictures.map((url) => ({ type: "input_image", image_url: url }))];
  const request = {
    model: server.model.id, input: pictures.length ? [{ role: "user", content: text ? content : content.slice(1) }] : text,
    tools: [{ type: "image_generation", partial_images: 3 }], stream: true,
    truncation: "auto", // a long talk goes on without its oldest turns
  };
  if (before) request.previous_response_id = before;

  const parts = new Map(); // item_id -> the paragraph or card it fills
  const part = (id, make) => {
    if (!parts.size) body.replaceChildren();
    if (!parts.has(id)) { parts.set(id, make()); body.append(parts.get(id).root ?? parts.get(id)); }
    return parts.get(id);
  };
  const newText = () => el("p", { class: "text" });
  const newCard = () => makeCard("talk-picture", text, "auto");
  const seconds = () => ((performance.now() - began) / 1000).toFixed(1);

  // The whole answer replaces what was streamed, so nothing depends on having caught every event.
  const finish = (response) => {
    previous = response.id;
    for (const item of response.output) {
      if (item.result) finishPicture(item);
      for (const piece of item.content ?? [])
        if (piece.type === "refusal") part(item.id, () => el("div")).replaceChildren(refusalBox(piece.refusal));
        else part(item.id, newText).textContent = piece.text;
    }
  };
  const finishPicture = (item) => {
    const format = item.output_format ?? "png";
    const recipe = { prompt: text, size: item.size, seed: item.seed, model: server.model.id, seconds: seconds(), at: new Date().toISOString(), kind: "talk" };
    const again = () => { $("tab-talk").click(); $("talk-box").value = text; $("talk-box").focus(); };
    const entry = { src: dataUrl(item.result, format), format, recipe, again };
    part(item.id, newCard).finish(entry);
    keep(entry);
  };

  try {
    for await (const event of events(await call("/v1/responses", request, signal), signal)) {
      if (event.type === "response.output_text.delta") part(event.item_id, newText).textContent += event.delta;
      else if (event.type === "response.image_generation_call.in_progress") part(event.item_id, newCard);
      else if (event.type === "response.image_generation_call.partial_image") part(event.item_id, newCard).show(dataUrl(event.partial_image_b64, event.output_format));
      else if (event.type === "response.completed") { finish(event.response); break; }
      follow();
    }
    working("talk", null);
    say("talk", "done", { seconds: seconds() });
  } catch (error) {
    if (!exchanges.includes(exchange)) return; // undone while it ran
    working("talk", null);
    const word = signal.aborted ? "stopped" : error.refused ? "declined" : "failed";
    say("talk", word);
    for (const card of parts.values()) card.state?.(signal.aborted ? "partial" : "error", word);
    if (!signal.aborted && error.refused) body.replaceChildren(refusalBox(error.message));
    else {
      if (!parts.size) body.replaceChildren(el("p", { class: "meta", word }));
      if (!signal.aborted) trouble("talk", error, (more) => ask(exchange, more), tries);
    }
  }
  allowUndo();
  follow();
}

const allowUndo = () => $("talk-undo").setAttribute("aria-disabled", String(!exchanges.length));

// Back to the answer before, with the words and pictures of the last turn in the box again.
export function undo() {
  const last = exchanges.pop();
  if (!last) return;
  stops.talk?.();
  working("talk", null);
  clearNotice("talk");
  last.turns.forEach((turn) => turn.remove());
  previous = last.before;
  $("talk-box").value = last.text;
  attached = last.pictures;
  $("talk-status").textContent = "";
  showAttached();
  allowUndo();
  $("talk-box").focus();
}

export function newDialogue() {
  while (exchanges.length) undo();
  previous = null;
  attached = [];
  showAttached();
  $("talk-box").value = "";
}
