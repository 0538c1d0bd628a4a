// The state, its address (#layer=1&expert=123&token=45), and who redraws what.

const state = { layer: 0, expert: null, token: null, edit: null, tint: "loss", query: "" };
let D = null;
const byId = (name) => document.getElementById(name);
const fill = (name, children) => byId(name).replaceChildren(...children);

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d+$/.test(asked.get(name) ?? "") ? Number(asked.get(name)) : null);
  const layer = D.layers.findIndex((candidate) => candidate.number === whole("layer"));
  if (layer >= 0) state.layer = layer;
  if (asked.has("expert")) state.expert = whole("expert");
  if (whole("token") !== null && whole("token") < D.shown) state.token = whole("token");
}

function writeAddress() {
  const parts = [`layer=${D.layers[state.layer].number}`];
  if (state.expert !== null) parts.push(`expert=${state.expert}`);
  if (state.token !== null) parts.push(`token=${state.token}`);
  history.replaceState(null, "", `#${parts.join("&")}`);
}

function act(change, show = false) {
  Object.assign(state, change);
  if ("layer" in change && !("expert" in change)) state.expert = null;
  if ("expert" in change && state.tint === "loss" && change.expert !== null) state.tint = "expert";
  writeAddress();
  redraw();
  if (show) byId("expert").scrollIntoView({ block: "nearest" });
}

function shades() {
  const layer = D.layers[state.layer], values = new Float32Array(D.shown);
  if (state.tint === "loss") return D.nats.values;
  if (state.tint === "edit") return state.edit === null ? values : row(D.edits.change, state.edit);
  const slot = state.expert === null ? -1 : slotOf(layer, state.expert);
  for (let place = 0; slot >= 0 && place < D.shown; place++) {
    const kept = row(layer.tokens.slot, place).indexOf(slot + 1);
    if (kept >= 0) values[place] = row(layer.tokens.weight, place)[kept] * row(layer.tokens.activation, place)[kept];
  }
  return values;
}

function tintStrip() {
  const values = shades(), sizes = [...values].filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
  const top = sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
  const colour = (value) => (state.tint === "loss" ? "--warm" : value > 0 ? "--rise" : "--fall");
  const wanted = state.query.toLowerCase();
  byId("strip").querySelectorAll(".t").forEach((button, place) => {
    const value = values[place], depth = Number.isFinite(value) ? Math.min(1, Math.abs(value) / top) : 0;
    button.style.background = depth > 0.02 ? `rgba(var(${colour(value)}), ${(0.6 * depth).toFixed(2)})` : "";
    button.setAttribute("aria-pressed", String(place === state.token));
    button.tabIndex = place === (state.token ?? 0) ? 0 : -1;
    button.classList.toggle("found", wanted !== "" && tokenText(D, place).toLowerCase().includes(wanted));
  });
  const low = make("i"), high = make("i");
  low.style.background = "linear-gradient(to right, rgba(var(--fall), .6), rgba(var(--fall), 0))";
  high.style.background = `linear-gradient(to right, rgba(var(${state.tint === "loss" ? "--warm" : "--rise"}), 0), rgba(var(${state.tint === "loss" ? "--warm" : "--rise"}), .6))`;
  const missing = { expert: state.expert === null ? "no expert is chosen" : "", edit: state.edit === null ? "no edit is chosen" : "" }[state.tint];
  const parts = state.tint === "loss" ? ["0", high, `${figure(top)} nats`] : [signed(-top), low, "0", high, signed(top)];
  fill("scale", missing ? [missing] : parts);
}

function drawStrip() {
  const buttons = [];
  for (let place = 0; place < D.shown; place++) {
    const text = tokenText(D, place);
    const lines = text.replace(/\n/g, "⏎\n") || "·";
    buttons.push(make("span", { role: "button", class: "t", "data-place": place, "aria-label": `token ${place}: ${JSON.stringify(text)}` }, lines));
  }
  const strip = byId("strip");
  strip.replaceChildren(...buttons);
  strip.addEventListener("click", (event) => {
    const button = event.target.closest(".t");
    if (button) act({ token: Number(button.dataset.place) });
  });
  strip.addEventListener("keydown", (event) => {
    const here = Number(event.target.dataset?.place);
    const there = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: D.shown - 1, Enter: here, " ": here }[event.key];
    if (there === undefined || !(there in buttons)) return;
    event.preventDefault();
    act({ token: there });
    buttons[there].focus();
  });
}

function redraw() {
  D.layers.forEach((layer, place) => { byId(`layer-${place}`).checked = place === state.layer; });
  byId("tint").value = state.tint;
  tintStrip();
  fill("token-body", tokenView(D, state));
  fill("expert-body", expertView(D, state, act));
  fill("edits-body", editsView(D, state, act));
  if (drawn !== state.layer) fill("use-body", useView(D, state, act));
  drawn = state.layer;
  byId("found").hidden = state.query === "";
}
let drawn = null;

// Without an address: the measured expert whose knock-out or doubling changes the loss most, and where.
function firstLook() {
  const strongest = [...D.edits.list].sort((a, b) => Math.abs(b.loss) - Math.abs(a.loss))[0];
  if (strongest) {
    state.layer = D.layers.findIndex((layer) => layer.number === strongest.layer);
    state.expert = strongest.expert;
  }
  state.token = strongest?.places[0]?.position ?? 0;
}

async function start() {
  if (!("DecompressionStream" in window)) {
    byId("about").textContent = "This browser is too old to open the page's data; use one from 2023 or later.";
    return;
  }
  D = await unpackAll(JSON.parse(byId("data").textContent));
  byId("about").textContent = `${D.model} on ${D.file}: ${count(D.tokens)} tokens in windows of ${count(D.context)}; loss ${figure(D.loss, 4)} nats per token, perplexity ${figure(D.perplexity, 4)}. ` +
    (D.tokens > D.shown ? `The first ${count(D.shown)} tokens are shown one by one.` : "");
  fill("layers", [byId("layers").querySelector("legend"), ...D.layers.flatMap((layer, place) => [
    make("input", { type: "radio", name: "layer", id: `layer-${place}`, on: { change: () => act({ layer: place }) } }),
    make("label", { for: `layer-${place}`, title: layer.name }, String(layer.number))])]);
  drawStrip();
  readAddress();
  byId("tint").addEventListener("change", (event) => act({ tint: event.target.value }));
  byId("search").addEventListener("submit", (event) => event.preventDefault());
  byId("query").addEventListener("input", (event) => {
    state.query = event.target.value;
    if (state.query) fill("found-body", foundView(D, state.query));
    redraw();
  });
  window.addEventListener("hashchange", () => {
    const before = { ...state };
    readAddress();
    if (state.expert !== null && state.expert !== before.expert && state.tint === "loss") state.tint = "expert";
    redraw();
    if (state.expert !== before.expert) byId("expert").scrollIntoView({ block: "nearest" });
    else if (state.token !== before.token) byId("text").scrollIntoView({ block: "nearest" });
  });
  for (const query of ["(prefers-color-scheme: dark)", "(max-width: 560px)"]) {
    matchMedia(query).addEventListener("change", () => { drawn = null; redraw(); });
  }
  if (location.hash.length < 2) firstLook();
  redraw();
  document.documentElement.dataset.ready = "yes";
}
start();
