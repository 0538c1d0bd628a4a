// What each part of the page shows for the state: a layer, an expert, a token, an edit.

function tokenText(D, position) {
  return D.strings[D.text.values[position]];
}

function expertLink(layer, expert) {
  return make("a", { href: `#layer=${layer.number}&expert=${expert}`, class: "mono" }, String(expert));
}

function editsOf(D, layer, expert) {
  return D.edits.list.map((edit, place) => ({ ...edit, place }))
    .filter((edit) => edit.layer === layer.number && edit.expert === expert);
}

function editName(factor) {
  return factor === 0 ? "Knock out" : factor === 2 ? "Double" : `× ${factor}`;
}

function contextOf(D, position, before = 14, after = 6) {
  const piece = (from, to) => {
    let text = "";
    for (let place = Math.max(0, from); place < Math.min(D.text.values.length, to); place++) text += tokenText(D, place);
    return text.replace(/\n+/g, "⏎");
  };
  const fired = make("mark", {}, tokenText(D, position).replace(/\n/g, "⏎") || "·");
  return make("div", { class: "context" }, piece(position - before, position), fired, piece(position + 1, position + 1 + after));
}

function tokenView(D, state) {
  const position = state.token, layer = D.layers[state.layer];
  if (position === null) return [make("p", { class: "quiet" }, "Tap a token of the text.")];
  const nats = D.nats.values[position];
  const next = row(D.predicted, position), probability = row(D.probability, position);
  const what = make("p", {}, chip(tokenText(D, position)), ` number ${count(position)} of ${count(D.text.values.length)}`,
    Number.isFinite(nats) ? ` · loss ${figure(nats)} nats (the model gave it ${percent(Math.exp(-nats))})` : " · first of a window, not scored");
  const list = [...next].map((string, place) => [D.strings[string], probability[place]]);
  const slots = row(layer.tokens.slot, position), weights = row(layer.tokens.weight, position);
  const activations = row(layer.tokens.activation, position);
  const rows = [...slots].map((slot, place) => [slot - 1, weights[place], activations[place]]).filter(([slot]) => slot >= 0);
  const body = rows.map(([slot, weight, activation]) => {
    const strength = weight * activation, expert = layer.experts.id.values[slot];
    const [up, down] = strength < 0 ? ["down", "up"] : ["up", "down"];
    const pushed = (end, kind) => [...row(layer.experts[end], slot)].slice(0, 4).map((string) => chip(D.strings[string], kind));
    return make("tr", expert === state.expert ? { class: "on" } : {},
      make("td", { "data-label": "expert" }, expertLink(layer, expert)),
      make("td", { class: "n", "data-label": "weight" }, figure(weight)),
      make("td", { class: "n", "data-label": "activation" }, signed(activation)),
      make("td", { class: "n", "data-label": "strength" }, signed(strength)),
      make("td", { class: "all" }, make("span", { class: "up" }, "▲ "), ...pushed(up, "up"), make("br"), make("span", { class: "down" }, "▼ "), ...pushed(down, "down")));
  });
  const fired = layer.tokens.fired.values[position], share = layer.tokens.share.values[position];
  return [
    what,
    make("h3", {}, "What the model expects next"),
    bars(list, { text: percent }),
    make("h3", {}, `Experts of layer ${layer.number} here`),
    make("p", { class: "quiet" }, `${count(rows.length)} of the ${count(fired)} that were retrieved, those that write most; they have ${percent(share)} of |strength| · |v|. ▲ made likelier, ▼ less likely.`),
    make("div", { class: "scroll" }, make("table", { class: "cards" },
      make("thead", {}, make("tr", {}, ...["expert", "weight", "activation", "strength", "pushes"].map((name, place) =>
        make("th", { scope: "col", class: place && place < 4 ? "n" : null }, name)))),
      make("tbody", {}, ...body))),
  ];
}

function expertView(D, state, act) {
  const layer = D.layers[state.layer], expert = state.expert;
  if (expert === null) return [make("p", { class: "quiet" }, "Choose an expert: at a token, in the grid, or below.")];
  const [i, j] = subKeys(layer, expert), slot = slotOf(layer, expert);
  const head = make("p", {}, make("b", { class: "mono" }, String(expert)), ` of ${count(layer.num_experts)} in layer ${layer.number} · sub-keys (${i}, ${j})`);
  if (expert < 0 || expert >= layer.num_experts) return [make("p", {}, `Layer ${layer.number} has no expert ${expert}.`)];
  if (slot < 0) {
    const why = layer.all_listed ? "It was never retrieved in this text: dead here."
      : "It is not among the experts that this page holds one by one; --experts N makes it hold more.";
    return [head, make("p", {}, why)];
  }
  const E = layer.experts, tiles = make("div", { class: "tiles" });
  for (const [value, what] of [
    [`${figure(E.use.values[slot])}×`, "even use (weight)"], [count(E.retrievals.values[slot]), "retrievals"],
    [percent(E.importance.values[slot]), "of what the layer's experts wrote"], [figure(E.norm.values[slot]), "length of v"],
  ]) tiles.append(make("div", { class: "tile" }, make("b", {}, value), make("span", {}, what)));
  const lens = (end) => [...row(E[end], slot)].map((string, place) => [D.strings[string], row(E[`${end}_value`], slot)[place]]);
  const places = [...row(E.place, slot)].map((place, rank) => [place - 1, row(E.strength, slot)[rank]]).filter(([place]) => place >= 0);
  const contexts = places.map(([place, strength]) => make("li", {}, contextOf(D, place),
    make("span", { class: "quiet" }, `strength ${signed(strength)} · `,
      place < D.shown ? make("a", { href: `#layer=${layer.number}&expert=${expert}&token=${place}` }, `token ${count(place)}`) : `token ${count(place)}`)));
  const edits = editsOf(D, layer, expert);
  const buttons = edits.map((edit) => make("button", { class: "plain", type: "button", "aria-pressed": String(state.edit === edit.place), on: { click: () => act({ edit: state.edit === edit.place ? null : edit.place, tint: "edit" }) } },
    `${editName(edit.factor)}: loss ${signed(edit.loss)} nats`));
  return [
    head, tiles,
    make("div", { class: "two" },
      make("div", {}, make("h3", {}, "Pushes up (nats per unit of strength)"), bars(lens("up"), { kind: "up", text: signed })),
      make("div", {}, make("h3", {}, "Pushes down"), bars(lens("down"), { kind: "down", text: signed }))),
    make("h3", {}, "Without it, or with twice of it"),
    edits.length ? make("p", {}, ...buttons.flatMap((button) => [button, " "]))
      : make("p", { class: "quiet" }, "Not measured in this page. Measure it: ", make("code", {}, `peerlm inspect ${D.model} --text ${D.file} --knock-out ${layer.number}:${expert}`)),
    make("h3", {}, "Where it fires most"),
    make("ul", { class: "bars contexts" }, ...contexts.map((item) => { item.style.display = "block"; return item; })),
  ];
}

function editsView(D, state, act) {
  if (!D.edits.list.length || D.shown_loss === null) return [make("p", { class: "quiet" }, "None was measured: --edits N measures the N most important experts.")];
  const parts = [];
  if (state.edit !== null) {
    const edit = D.edits.list[state.edit], before = D.shown_loss;
    parts.push(make("p", {}, make("b", {}, `${editName(edit.factor)} expert ${edit.expert} of layer ${edit.layer}`),
      `: the shown text's loss goes from ${before.toFixed(4)} to ${(before + edit.loss).toFixed(4)} nats per token (${signed(edit.loss)}). The text is coloured by the change.`));
    if (edit.places.length) parts.push(make("h3", {}, "Where the next token changes most"));
    for (const place of edit.places) {
      const old = row(D.predicted, place.position), oldP = row(D.probability, place.position);
      parts.push(contextOf(D, place.position, 10, 0), make("div", { class: "two" },
        make("div", {}, make("span", { class: "quiet" }, "as it is"), bars([...old].map((s, k) => [D.strings[s], oldP[k]]), { text: percent })),
        make("div", {}, make("span", { class: "quiet" }, `edited (divergence ${figure(place.nats)} nats)`), bars(place.tokens.map((s, k) => [D.strings[s], place.probabilities[k]]), { text: percent }))));
    }
  } else parts.push(make("p", { class: "quiet" }, `Measured for the experts that wrote most in the shown text: how its loss of ${D.shown_loss.toFixed(4)} nats per token changes. Choose one to see where.`));
  const groups = new Map();
  D.edits.list.forEach((edit, place) => {
    const key = `${edit.layer}:${edit.expert}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push({ ...edit, place });
  });
  const size = (group) => Math.max(...group.map((edit) => Math.abs(edit.loss)));
  const sorted = [...groups.values()].sort((a, b) => size(b) - size(a));
  const body = sorted.map((group) => make("tr", group.some((edit) => edit.place === state.edit) ? { class: "on" } : {},
    make("td", {}, String(group[0].layer)),
    make("td", {}, expertLink({ number: group[0].layer }, group[0].expert)),
    ...group.map((edit) => make("td", { class: "n" }, make("button", { class: "plain", type: "button", "aria-pressed": String(edit.place === state.edit), "aria-label": `${editName(edit.factor)} expert ${edit.expert} of layer ${edit.layer}: ${signed(edit.loss)} nats`, on: { click: () => act({ edit: state.edit === edit.place ? null : edit.place, tint: "edit" }) } }, signed(edit.loss, 2))))));
  parts.push(make("h3", {}, "Change of the loss, nats per token"), make("div", { class: "scroll tall" }, make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"), make("th", { scope: "col" }, "expert"),
      ...D.factors.map((factor) => make("th", { scope: "col", class: "n" }, editName(factor).toLowerCase())))),
    make("tbody", {}, ...body))));
  return parts;
}

function useView(D, state, act) {
  const layer = D.layers[state.layer], tiles = make("div", { class: "tiles" });
  for (const [value, what] of [
    [percent(layer.usage), `of ${count(layer.num_experts)} experts have any weight`],
    [count(layer.dead), `dead: never retrieved (${layer.dead_if_even < 0.5 ? "none" : count(layer.dead_if_even)} if use were even)`],
    [count(layer.crowded), `crowded: 10× even use or more; they hold ${percent(layer.crowded_share)} of the weight`],
    [`${figure(layer.unevenness)} nats`, "unevenness"],
    [count(layer.retrievals), `retrievals: ${layer.heads} heads × ${layer.experts_per_head}, ${count(D.tokens)} tokens`],
  ]) tiles.append(make("div", { class: "tile" }, make("b", {}, value), make("span", {}, what)));
  const side = layer.grid_side, n = layer.sub_keys;
  const span = (cell, step) => step === 1 ? String(cell) : `${cell * step}–${Math.min(n, (cell + 1) * step) - 1}`;
  const grid = heatMap(layer.grid.values, layer.grid.shape[0], layer.grid.shape[1], {
    label: `Use of experts by sub-keys: rows i, columns j. Arrow keys move, Enter opens the expert.`,
    say: (i, j, use) => `i ${span(i, side)}, j ${span(j, side)}` + (side === 1 ? `: expert ${expertOf(layer, i, j)}` : "") + ` · ${figure(use)}× even use`,
    choose: side === 1 ? (i, j) => act({ expert: expertOf(layer, i, j) }, true) : null,
  });
  const heads = layer.heads, cells = layer.halves.shape[2];
  const halves = ["first half, i", "second half, j"].flatMap((name, half) => [
    make("h3", {}, `Heads by sub-key of the ${name}`),
    ...heatMap(layer.halves.values.subarray(half * heads * cells, (half + 1) * heads * cells), heads, cells, {
      label: `Use by head (rows) and sub-key of the ${name} (columns)`, height: `${Math.max(32, 11 * heads)}px`,
      say: (head, key, use) => `head ${head}, sub-key ${span(key, layer.half_side)} · ${figure(use)}× even use`,
    })]);
  const E = layer.experts;
  const top = [...E.use.values.keys()].sort((a, b) => E.use.values[b] - E.use.values[a]).slice(0, 12);
  const crowded = make("table", {}, make("thead", {}, make("tr", {}, ...["expert", "use", "retrievals", "likelier"].map((name, k) => make("th", { scope: "col", class: k === 1 || k === 2 ? "n" : null }, name)))),
    make("tbody", {}, ...top.map((slot) => make("tr", {},
      make("td", {}, expertLink(layer, E.id.values[slot])), make("td", { class: "n" }, `${figure(E.use.values[slot])}×`),
      make("td", { class: "n" }, count(E.retrievals.values[slot])),
      make("td", {}, ...[...row(E.up, slot)].slice(0, 3).map((s) => chip(D.strings[s])))))));
  return [
    make("p", { class: "quiet" }, `Layer ${layer.number}: ${layer.kind}, ${layer.name}; ${count(n)} × ${count(n)} sub-keys, ${layer.shared_keys ? "shared by all heads" : "each head its own"}, numbered ${layer.pairing}.`),
    tiles,
    make("div", { class: "charts" },
      make("div", {}, make("h3", {}, "Use of experts, sorted"), useCurve(layer), make("h3", {}, "The most used"), make("div", { class: "scroll" }, crowded)),
      make("div", {}, make("h3", {}, `Use by sub-keys: row i, column j${side > 1 ? `, each cell ${side} × ${side}` : ""}`), heatLegend(), ...grid, ...halves)),
  ];
}

function foundView(D, query) {
  const wanted = query.toLowerCase(), match = D.strings.map((string) => string.toLowerCase().includes(wanted));
  const exact = D.strings.map((string) => string.trim().toLowerCase() === wanted.trim());
  const places = [];
  for (let place = 0; place < D.text.values.length; place++) if (match[D.text.values[place]]) places.push(place);
  const pushing = [], firing = [];
  for (const layer of D.layers) {
    const E = layer.experts, M = E.up.width;
    for (let k = 0; k < E.up.values.length; k++) {
      const string = E.up.values[k];
      if (match[string]) pushing.push([exact[string], E.up_value.values[k], layer, E.id.values[Math.floor(k / M)], D.strings[string]]);
    }
    for (let slot = 0; slot < E.place.rows; slot++) {
      const place = row(E.place, slot)[0] - 1;
      if (place >= 0 && match[D.text.values[place]]) firing.push([exact[D.text.values[place]], Math.abs(row(E.strength, slot)[0]), layer, E.id.values[slot], tokenText(D, place)]);
    }
  }
  const best = (list) => list.sort((a, b) => b[0] - a[0] || b[1] - a[1]).slice(0, 24);
  const items = (list) => make("p", {}, ...best(list).flatMap(([, value, layer, expert, string]) =>
    [make("span", { class: "nobreak" }, `${layer.number}:`, expertLink(layer, expert), " ", chip(string), make("span", { class: "quiet" }, figure(value))), " "]));
  const shown = places.filter((place) => place < D.shown);
  return [
    make("p", {}, `${count(places.length)} of ${count(D.text.values.length)} tokens of the text have “${query}” in them, ${count(shown.length)} of them in the shown part (underlined). Upper and lower case are alike; exact matches come first.`,
      ...shown.slice(0, 12).flatMap((place) => [" ", make("a", { href: `#token=${place}` }, count(place))])),
    make("h3", {}, `Experts that make it likelier: ${count(pushing.length)} (layer:expert, nats per unit of strength)`), items(pushing),
    make("h3", {}, `Experts that fire most at it: ${count(firing.length)} (layer:expert, strength)`), items(firing),
  ];
}
