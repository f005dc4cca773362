"use strict";
// Text of the model is shown as text, never as HTML.

const element = (id) => document.getElementById(id);
let messages = [];
let running = null; // AbortController of the answer in progress
let model = null;

const headers = () => {
  const found = { "Content-Type": "application/json" };
  if (element("key").value) found.Authorization = `Bearer ${element("key").value}`;
  return found;
};

function show(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  box.textContent = text;
  element("messages").append(box);
  box.scrollIntoView();
  return box;
}

async function checked(response) {
  if (response.ok) return response;
  if (response.status === 401) element("options").open = true;
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `HTTP status ${response.status}`);
}

async function findModel() {
  const response = await checked(await fetch("v1/models", { headers: headers() }));
  model = (await response.json()).data[0].id;
  element("model").textContent = model;
  document.title = `${model} - tjx chat`;
}

// Yields the objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer is incomplete: the connection was closed");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function requestBody() {
  const system = element("system").value.trim();
  const body = {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number(element("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (element("max_tokens").value) body.max_tokens = Number(element("max_tokens").value);
  if (element("seed").value) body.seed = Number(element("seed").value);
  return body;
}

async function answer(box) {
  if (model === null) await findModel();
  const start = performance.now();
  const response = await checked(await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(requestBody()), signal: running.signal,
  }));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const text = event.choices[0]?.delta.content;
    if (text) {
      box.textContent += text;
      box.scrollIntoView();
    }
    if (event.usage) {
      const seconds = (performance.now() - start) / 1000;
      const { completion_tokens: tokens, prompt_tokens: prompt } = event.usage;
      element("status").textContent =
        `${prompt} tokens read, ${tokens} generated in ${seconds.toFixed(1)} s`;
    }
  }
}

async function send() {
  const text = element("input").value.trim();
  if (!text) return;
  element("input").value = "";
  element("status").textContent = "";
  messages.push({ role: "user", content: text });
  show("user", text);
  const box = show("assistant", "");
  running = new AbortController();
  const conversation = messages;
  element("send").textContent = "Stop";
  let failure = null;
  try {
    await answer(box);
  } catch (error) {
    failure = error;
  }
  if (failure !== null && failure.name !== "AbortError") {
    show("error", failure.message);
  }
  if (box.textContent) {
    conversation.push({ role: "assistant", content: box.textContent });
  } else {
    // Without an answer the message is not part of the conversation; it can be sent again.
    conversation.pop();
    box.remove();
    if (failure !== null) element("input").value = text;
  }
  running = null;
  element("send").textContent = "Send";
  element("input").focus();
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running !== null) running.abort();
  else send();
});
element("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (running === null) send();
  }
});
element("new").addEventListener("click", () => {
  if (running !== null) running.abort();
  messages = [];
  element("messages").replaceChildren();
  element("status").textContent = "";
});
findModel().catch((error) => { element("status").textContent = error.message; });
