// The page's data: figures as they are, arrays unpacked from base64 and gzip.
"use strict";

const WIDTH = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, bfloat16: Uint16Array };

async function unpacked(packed) {
  const bytes = Uint8Array.from(atob(packed.gzip), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const stored = new WIDTH[packed.kind](await new Response(stream).arrayBuffer());
  const values = packed.kind === "bfloat16" ? widened(stored) : stored;
  const [rows, ...rest] = packed.shape;
  return { values, rows, width: rest.reduce((a, b) => a * b, 1), shape: packed.shape };
}

// A bfloat16 is the upper half of a float32.
function widened(stored) {
  return new Float32Array(Uint32Array.from(stored, (bits) => bits << 16).buffer);
}

async function unpackAll(value) {
  if (value === null || typeof value !== "object") return value;
  if ("gzip" in value) return unpacked(value);
  for (const key of Object.keys(value)) value[key] = await unpackAll(value[key]);
  return value;
}

function row(array, index) {
  return array.values.subarray(index * array.width, (index + 1) * array.width);
}

// Where an expert stands among the listed ones of its layer, whose ids rise; -1 if it is not listed.
function slotOf(layer, expert) {
  const ids = layer.experts.id.values;
  let low = 0, high = ids.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ids[middle] < expert) low = middle + 1; else high = middle;
  }
  return ids[low] === expert ? low : -1;
}

function subKeys(layer, expert) {
  const n = layer.sub_keys;
  if (layer.pairing === "row-major") return [Math.floor(expert / n), expert % n];
  const shell = Math.floor(Math.sqrt(expert)), rest = expert - shell * shell;
  return rest < shell ? [rest, shell] : [shell, rest - shell];
}

function expertOf(layer, i, j) {
  if (layer.pairing === "row-major") return i * layer.sub_keys + j;
  return i < j ? j * j + i : i * i + i + j;
}

function figure(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(digits - 1);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
}

function signed(value, digits = 3) {
  return (value > 0 ? "+" : value < 0 ? "−" : "") + figure(Math.abs(value), digits);
}

function percent(share) {
  return share > 0 && share < 0.001 ? "<0.1 %" : `${Number((100 * share).toPrecision(3))} %`;
}

function count(value) {
  return Math.round(value).toLocaleString("en");
}
