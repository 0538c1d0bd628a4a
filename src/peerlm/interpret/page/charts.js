// Charts: the curve of use, and heat maps of sub-keys.

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, what] of Object.entries(value)) element.addEventListener(event, what);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function draw(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function narrow() {
  return matchMedia("(max-width: 560px)").matches;
}

function useCurve(layer) {
  const width = narrow() ? 360 : 600;  // text is not scaled down on a phone
  const box = { left: 52, right: width - 8, top: 14, bottom: 270 };
  const alive = layer.curve.filter(([, use]) => use > 0);
  if (!alive.length) return make("p", {}, "No expert has any weight in this text.");
  const highest = Math.ceil(Math.log10(Math.max(...alive.map(([, use]) => use), 1)) + 1e-9);
  const lowest = Math.max(-6, Math.min(-1, Math.floor(Math.log10(Math.min(...alive.map(([, use]) => use))))));
  const x = (rank) => box.left + ((rank - 1) / Math.max(1, layer.num_experts - 1)) * (box.right - box.left);
  const y = (use) => box.bottom - ((Math.max(lowest, Math.log10(use)) - lowest) / (highest - lowest)) * (box.bottom - box.top);
  const label = `Use of experts, sorted. The most used has ${figure(alive[0][1])} times even use; ` +
    `${count(layer.dead)} of ${count(layer.num_experts)} are dead.`;
  const svg = draw("svg", { viewBox: `0 0 ${width} 320`, role: "img", "aria-label": label });
  for (let power = lowest; power <= highest; power++) {
    svg.append(
      draw("line", { class: "axis", x1: box.left, x2: box.right, y1: y(10 ** power), y2: y(10 ** power) }),
      draw("text", { x: box.left - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, power < -3 ? `1e${power}` : `${10 ** power}×`),
    );
  }
  for (let quarter = 0; quarter <= 4; quarter += narrow() ? 2 : 1) {
    const rank = 1 + (quarter / 4) * (layer.num_experts - 1);
    const anchor = quarter === 0 ? "start" : quarter === 4 ? "end" : "middle";
    svg.append(draw("text", { x: x(rank), y: box.bottom + 20, "text-anchor": anchor }, count(rank)));
  }
  const points = alive.map(([rank, use]) => `${x(rank).toFixed(1)},${y(use).toFixed(1)}`);
  const end = x(alive[alive.length - 1][0]).toFixed(1);
  svg.append(
    draw("text", { x: (box.left + box.right) / 2, y: box.bottom + 42, "text-anchor": "middle" }, "experts, from the most used to the least"),
    draw("line", { class: "even", x1: box.left, x2: box.right, y1: y(1), y2: y(1) }),
    draw("text", { x: box.right, y: y(1) - 5, "text-anchor": "end" }, "even use"),
    draw("polygon", { class: "under", points: `${x(1)},${box.bottom} ${points.join(" ")} ${end},${box.bottom}` }),
    draw("polyline", { class: "line", points: points.join(" ") }),
  );
  return svg;
}

function ramp() {
  const style = getComputedStyle(document.documentElement);
  const stops = style.getPropertyValue("--ramp").trim().split(" ").map((stop) => stop.split(",").map(Number));
  const dead = style.getPropertyValue("--dead").trim();
  return { stops, dead: [1, 3, 5].map((start) => parseInt(dead.slice(start, start + 2), 16)) };
}

// 0 at a hundredth of even use, 1 at a hundred times.
function heat(use) {
  return Math.min(1, Math.max(0, (Math.log10(use) + 2) / 4));
}

function heatColour({ stops, dead }, use) {
  if (!(use > 0)) return dead;
  const place = heat(use) * (stops.length - 1);
  const below = Math.min(stops.length - 2, Math.floor(place)), share = place - below;
  return stops[below].map((channel, c) => Math.round(channel + share * (stops[below + 1][c] - channel)));
}

// A heat map of rows x columns; `say` describes a cell, `choose` opens it. Arrow keys move the cell, Enter opens it.
function heatMap(values, rows, columns, { label, say, choose, height }) {
  const canvas = make("canvas", { width: columns, height: rows, tabindex: choose ? 0 : null, role: choose ? "application" : "img", "aria-label": label });
  canvas.style.aspectRatio = height ? "auto" : `${columns} / ${rows}`;
  if (height) canvas.style.height = height;
  const readout = make("p", { class: "readout", "aria-live": "polite" }, "Point at a cell, or tap it.");
  const context = canvas.getContext("2d");
  let cell = 0;
  const paint = () => {
    const image = context.createImageData(columns, rows), colours = ramp();
    values.forEach((use, place) => image.data.set([...heatColour(colours, use), 255], 4 * place));
    context.putImageData(image, 0, 0);
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    const line = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    return line * columns + column;
  };
  const show = (place) => { cell = place; readout.textContent = say(Math.floor(place / columns), place % columns, values[place]); };
  canvas.addEventListener("pointermove", (event) => show(at(event)));
  canvas.addEventListener("click", (event) => { show(at(event)); if (choose) choose(Math.floor(cell / columns), cell % columns); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step && cell + step >= 0 && cell + step < values.length) { event.preventDefault(); show(cell + step); }
    if (event.key === "Enter" && choose) choose(Math.floor(cell / columns), cell % columns);
  });
  paint();
  return [canvas, readout];
}

function heatLegend() {
  const { stops, dead } = ramp();
  const bar = make("i"), none = make("i");
  bar.style.background = `linear-gradient(to right, ${stops.map((stop) => `rgb(${stop})`).join(", ")})`;
  none.style.cssText = `background: rgb(${dead}); width: .9rem`;
  return make("div", { class: "scale" }, "0.01×", bar, "100× even use", none, "none");
}

// Bars of (string, value), the longest as long as its column.
function bars(items, { kind = "", text = figure } = {}) {
  const longest = Math.max(...items.map(([, value]) => Math.abs(value)), 1e-30);
  return make("ul", { class: "bars" }, ...items.map(([string, value]) => {
    const bar = make("span", { class: `bar ${kind}` });
    bar.style.width = `${(100 * Math.abs(value)) / longest}%`;
    return make("li", {}, chip(string), make("span", {}, bar), make("span", { class: "value" }, text(value)));
  }));
}

function visible(string) {
  if (string === "") return "·";
  return string.replace(/ /g, "\u00a0").replace(/\r/g, "␍").replace(/\n/g, "⏎").replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f\u007f]/g, (control) => `\\x${control.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

function chip(string, kind = "") {
  return make("span", { class: `chip ${kind}`, title: JSON.stringify(string) }, visible(string));
}
