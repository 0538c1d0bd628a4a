// The page: what is asked, what has been said, and the experts of a token.

import { chunks, models, setKey } from "./stream.js";

const byId = (name) => document.getElementById(name);
const state = { base: "", mode: "chat", turns: [], running: null };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function complain(error) {
  byId("problem").hidden = !error;
  byId("problem").textContent = error ? error.message : "";
  if (error?.status === 401) byId("locked").hidden = false;
}

function chosenModel() {
  const packs = [...document.querySelectorAll("#packs input:checked")].map((box) => box.value);
  return packs.length ? `${state.base}:${packs.join("+")}` : state.base;
}

function setMode(mode) {
  state.mode = mode;
  byId(`mode-${mode}`).checked = true;
  byId("prompt-label").textContent = mode === "chat" ? "Your message" : "Text to continue";
  clear();
}

function clear() {
  state.running?.abort();
  state.turns = [];
  byId("said").replaceChildren();
  byId("token").hidden = true;
  byId("speed").textContent = "";
  complain(null);
}

async function open() {
  try {
    const found = await models();
    const base = found.find((model) => !model.parent);
    const packs = found.filter((model) => model.parent);
    state.base = base.id;
    byId("model").textContent = base.id;
    document.title = base.id;
    byId("packs").hidden = !packs.length;
    const ticked = new Set([...document.querySelectorAll("#packs input:checked")].map((box) => box.value));
    byId("packs").replaceChildren(element("legend", "", "Packs"), ...packs.flatMap(packBox));
    for (const box of document.querySelectorAll("#packs input")) box.checked = ticked.has(box.value);
    byId("mode-chat").disabled = base.chat === false;
    setMode(base.chat === false ? "completion" : "chat");
    byId("locked").hidden = true;
    complain(null);
  } catch (error) {
    complain(error);
  }
  document.documentElement.dataset.ready = "yes";
}

function packBox(model) {
  const name = model.id.slice(model.parent.length + 1);
  const box = element("input");
  box.type = "checkbox";
  box.id = `pack-${name}`;
  box.value = name;
  const label = element("label", "", name);
  label.htmlFor = box.id;
  return [box, label];
}

function settings() {
  const number = (name) => (byId(name).value === "" ? null : Number(byId(name).value));
  return {
    model: chosenModel(),
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    top_p: number("top-p"),
    seed: number("seed"),
    experts: byId("experts").checked,
  };
}

function addTurn(role) {
  const turn = element("div", `turn ${role}`);
  byId("said").append(turn);
  return turn;
}

function showToken(button, token) {
  document.querySelector('.t[aria-pressed="true"]')?.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", "true");
  byId("token-title").textContent = `Token ${JSON.stringify(token.text)}`;
  byId("token-body").replaceChildren(...token.layers.map((layer) => {
    const block = element("div", "layer");
    const list = element("ul", "chips");
    const pairs = layer.ids.map((id, place) => [id, layer.weights[place]]).sort((a, b) => b[1] - a[1]);
    list.append(...pairs.map(([id, weight]) => element("li", "", `${id} · ${weight.toFixed(3)}`)));
    block.append(element("h3", "", layer.layer), list);
    return block;
  }));
  byId("token").hidden = false;
}

function write(turn, text, experts) {
  if (!experts?.length) {
    turn.append(text);
    return;
  }
  experts.forEach((layers, place) => {
    const last = place === experts.length - 1;
    const button = element("button", "t", last ? text || "·" : "·");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => showToken(button, { text: button.textContent, layers }));
    turn.append(button);
  });
}

async function ask() {
  const prompt = byId("prompt").value;
  if (state.running) return;
  complain(null);
  const chat = state.mode === "chat";
  let body = { ...settings(), prompt };
  if (chat) {
    if (!prompt) return;
    state.turns.push({ role: "user", content: prompt });
    addTurn("user").textContent = prompt;
    body = { ...settings(), messages: state.turns };
    byId("prompt").value = "";
  }
  const turn = addTurn("assistant");
  if (!chat) turn.append(element("span", "given", prompt));
  let written = "";
  state.running = new AbortController();
  byId("send").disabled = true;
  byId("stop").hidden = false;
  const started = performance.now();
  try {
    for await (const chunk of chunks(chat ? "/v1/chat/completions" : "/v1/completions", body, state.running.signal)) {
      const choice = chunk.choices[0];
      if (chunk.usage) {
        const seconds = (performance.now() - started) / 1000;
        byId("speed").textContent = `${chunk.usage.completion_tokens} tokens, ${(chunk.usage.completion_tokens / seconds).toFixed(1)} a second`;
      }
      if (!choice) continue;
      const text = (chat ? choice.delta.content : choice.text) ?? "";
      if (text || choice.experts) write(turn, text, choice.experts);
      written += text;
      if (choice.finish_reason === "length") turn.append(element("span", "end", " [most tokens reached]"));
    }
  } catch (error) {
    if (error.name === "AbortError") turn.append(element("span", "end", " [stopped]"));
    else complain(error);
  } finally {
    state.running = null;
    byId("send").disabled = false;
    byId("stop").hidden = true;
    if (chat && written) state.turns.push({ role: "assistant", content: written });
    else if (chat) state.turns.pop();
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (state.mode === "chat" && !event.shiftKey))) {
    event.preventDefault();
    ask();
  }
});
byId("stop").addEventListener("click", () => state.running?.abort());
byId("clear").addEventListener("click", clear);
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  open();
});
for (const mode of ["chat", "completion"]) byId(`mode-${mode}`).addEventListener("change", () => setMode(mode));
open();
