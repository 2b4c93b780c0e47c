// The server: one call with the key and readable errors, and the event stream.
import { stored } from "./words.js";

// code: "network" (no answer) and "cut" (the stream ended early) are ours, the others the server's.
export class ServerError extends Error {
  constructor(message, code, status = 0, retryAfter = 0) {
    super(message);
    Object.assign(this, { code, status, retryAfter });
  }
  get refused() { return this.code === "moderation_blocked"; }
  get busy() { return this.status === 429 || this.status === 503; }
}

export const server = { model: {} }; // its entry of /v1/models, once app.js has asked

// app.js puts the dialog here: ask(wrong) -> a promise of the key, or of null when cancelled.
export const keys = { ask: async () => null };
let asking = null; // the streams of one run share one dialog

async function newKey(used) {
  if (stored("sessionStorage", "key") !== used) return true; // another call has asked meanwhile
  asking ??= keys.ask(used !== null).finally(() => { asking = null; });
  const key = await asking;
  if (key) stored("sessionStorage", "key", key);
  return Boolean(key);
}

async function errorOf(response) {
  const { error = {} } = await response.json().catch(() => ({}));
  const wait = Number(response.headers.get("Retry-After")) || 0;
  return new ServerError(error.message ?? `HTTP ${response.status}`, error.code, response.status, wait);
}

// body: nothing (GET), FormData, or an object sent as JSON.
export async function call(path, body, signal) {
  for (;;) {
    const key = stored("sessionStorage", "key");
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const form = body instanceof FormData;
    if (body && !form) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, body: body && !form ? JSON.stringify(body) : body,
    }).catch((error) => { throw signal?.aborted ? error : new ServerError("", "network"); });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || !(await newKey(key))) throw error;
    signal?.throwIfAborted();
  }
}

// The data of each server-sent event; an error event is thrown.
export async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw signal?.aborted ? error : new ServerError("", "cut");
      });
      if (done) throw new ServerError("", "cut"); // who has seen the last event reads no further
      const blocks = (buffer + value).split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5)).join("\n").trim();
        if (!data || data === "[DONE]") continue; // a comment that keeps the line open, or an end mark
        const event = JSON.parse(data);
        if (event.type === "error") throw new ServerError(event.error.message, event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// One picture of /v1/images/*: partial ones go to show(event), the completed event is returned.
export async function drawOne(path, body, signal, show) {
  for await (const event of events(await call(path, body, signal), signal)) {
    if (event.type.endsWith(".partial_image")) show(event);
    else if (event.type.endsWith(".completed")) return event;
  }
}

export const dataUrl = (base64, format = "png") => `data:image/${format};base64,${base64}`;
