// The page's data and state, colours, and drawing of matrices and lines on canvases. The page puts
// numbers.js, views.js and page.js into one block.

const meta = JSON.parse(document.getElementById("meta").textContent);
const { views, kinds } = meta;
const ONE = 65535; // a weight of 1
const state = {
  view: meta.start.view,
  kind: meta.start.kind,
  layer: meta.start.layer,
  head: meta.start.head ?? 0,
  heads: new Set(),
  query: null,
  frame: 0,
  thumbs: "matrix",
  faint: false,
};
const kindNow = () => kinds[state.kind];
const range = (n) => Array.from({ length: n }, (_, i) => i);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const pixelRatio = () => window.devicePixelRatio || 1;

// Elements

const $ = (id) => document.getElementById(id);

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function option(value, text) {
  return element("option", { value, text });
}

function token(text) {
  return element("span", { class: "token", text });
}

function say(...parts) {
  $("readout").replaceChildren(...parts);
}

// Numbers: base64 of deflated bytes, one piece a layer, unpacked on first use

async function unpack(id) {
  const text = atob($(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Weights of n matrices (T, S): all high bytes, then all low bytes; causal ones without the keys ahead.
function matrices(bytes, n, T, S, causal) {
  const half = bytes.length / 2;
  const found = [];
  let at = 0;
  for (let h = 0; h < n; h++) {
    const values = new Uint16Array(T * S);
    for (let t = 0; t < T; t++) {
      const end = causal ? t + 1 : S;
      for (let s = 0; s < end; s++, at++) values[t * S + s] = (bytes[at] << 8) | bytes[half + at];
    }
    found.push(values);
  }
  return found;
}

const unpacked = new Map();
function once(name, make) {
  if (!unpacked.has(name)) unpacked.set(name, make());
  return unpacked.get(name);
}

function patterns(kind, layer) {
  const k = kinds[kind], name = `p-${kind}-${layer}`;
  return once(name, async () => {
    return matrices(await unpack(name), k.heads, k.queries.length, k.keys.length, k.causal);
  });
}

function vectors(kind, layer) {
  const k = kinds[kind], name = `v-${kind}-${layer}`;
  const rows = k.queries.length + k.keys.length;
  return once(name, async () => {
    const bytes = await unpack(name);
    const numbers = new Int8Array(bytes.buffer, 0, k.heads * rows * k.d);
    const scales = new Float32Array(bytes.slice(k.heads * rows * k.d).buffer);
    // For each head the queries, then the keys.
    return (head, row) => {
      const at = head * rows + row;
      return Float32Array.from(numbers.subarray(at * k.d, (at + 1) * k.d), (v) => v * scales[at]);
    };
  });
}

function frames() {
  const r = meta.recorded, T = r.labels.length;
  return once("frames", async () => matrices(await unpack("r"), r.steps.length * r.heads.length, T, T, true));
}

// Colours

const colours = {
  ramp: [],
  css: (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim(),
};
function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
function readColours() {
  const stops = ["--ramp0", "--ramp1", "--ramp2"].map((name) => rgb(colours.css(name)));
  colours.ramp = range(256).map((i) => {
    const place = (i / 255) * 2, low = Math.min(1, Math.floor(place)), share = place - low;
    return stops[low].map((value, c) => Math.round(value + (stops[low + 1][c] - value) * share));
  });
  const names = ["fg", "soft", "line", "bg", "cross", "positive", "negative", "mark"];
  for (const name of names) colours[name] = colours.css(`--${name}`);
  colours.s = colours.css("--head-s");
  colours.l = colours.css("--head-l");
}
function headColour(head, alpha = 1) {
  const n = kindNow().heads;
  return `hsl(${Math.round((360 * head) / n + 210) % 360} ${colours.s} ${colours.l} / ${alpha})`;
}
function lift(weight) {
  return state.faint ? Math.sqrt(weight) : weight;
}
function shade(value) {
  return colours.ramp[Math.round(lift(value / ONE) * 255)];
}

// Canvases

function sized(canvas, width, height) {
  const ratio = Math.min(pixelRatio(), 16000 / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.clearRect(0, 0, width, height);
  return context;
}

// A picture of one matrix, at most `most` pixels a side; a pixel shows the largest of its weights.
function picture(values, T, S, most) {
  const rows = Math.min(T, most), columns = Math.min(S, most);
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let y = 0; y < rows; y++) {
    const t0 = Math.floor((y * T) / rows), t1 = Math.max(t0 + 1, Math.floor(((y + 1) * T) / rows));
    for (let x = 0; x < columns; x++) {
      const s0 = Math.floor((x * S) / columns), s1 = Math.max(s0 + 1, Math.floor(((x + 1) * S) / columns));
      let largest = 0;
      for (let t = t0; t < t1; t++) {
        for (let s = s0; s < s1; s++) if (values[t * S + s] > largest) largest = values[t * S + s];
      }
      image.data.set([...shade(largest), 255], (y * columns + x) * 4);
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Draws a matrix with labels into `width`; returns a function that finds the cell at a point.
function drawMatrix(canvas, values, k, width, marked) {
  const T = k.queries.length, S = k.keys.length;
  const font = '11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';
  const measure = canvas.getContext("2d");
  measure.font = font;
  const longest = (labels) => {
    const widest = labels.reduce((most, label) => Math.max(most, measure.measureText(label).width), 0);
    return Math.min(width / 4, widest) + 8;
  };
  const left = longest(k.queries), above = longest(k.keys);
  const largest = T > 60 ? Math.max(4, 900 / T) : 34;
  const cell = Math.max(Math.min((width - left - 2) / S, 34, largest), 0.2);
  const w = cell * S, h = cell * T;
  canvas.style.width = `${left + w + 2}px`;
  canvas.style.height = `${above + h + 2}px`;
  const context = sized(canvas, left + w + 2, above + h + 2);
  context.imageSmoothingEnabled = false;
  const pixels = Math.max(64, Math.round(w * pixelRatio()));
  context.drawImage(picture(values, T, S, pixels), left, above, w, h);
  context.strokeStyle = colours.line;
  context.strokeRect(left - 0.5, above - 0.5, w + 1, h + 1);
  context.font = font;
  context.textBaseline = "middle";
  const fit = (label, room) => {
    const shown = (text) => (text === label ? text : `${text}…`);
    let text = label;
    while (text.length > 1 && context.measureText(shown(text)).width > room) text = text.slice(0, -1);
    return shown(text);
  };
  const label = (text, x, y, upright, strong) => {
    context.save();
    context.translate(x, y);
    if (upright) context.rotate(-Math.PI / 2);
    context.textAlign = upright ? "left" : "right";
    context.fillStyle = strong ? colours.cross : colours.soft;
    context.fillText(fit(text, (upright ? above : left) - 6), 0, 0);
    context.restore();
  };
  const every = Math.ceil(10 / cell);
  const isLabelled = (i, at) => {
    const near = at !== undefined && at !== i && Math.abs(i - at) * cell < 10;
    return (i % every === 0 && !near) || i === at;
  };
  k.queries.forEach((text, t) => {
    const y = above + (t + 0.5) * cell;
    if (isLabelled(t, marked?.t)) label(text, left - 4, y, false, t === marked?.t);
  });
  k.keys.forEach((text, s) => {
    const x = left + (s + 0.5) * cell;
    if (isLabelled(s, marked?.s)) label(text, x, above - 4, true, s === marked?.s);
  });
  if (marked) {
    const x = left + marked.s * cell - 0.5, y = above + marked.t * cell - 0.5, side = Math.max(cell, 3) + 1;
    context.strokeStyle = colours.cross;
    context.strokeRect(x, y, side, side);
    context.globalAlpha = 0.35;
    context.strokeRect(left - 0.5, y, w + 1, cell + 1);
    context.strokeRect(x, above - 0.5, cell + 1, h + 1);
  }
  return (x, y) => {
    const t = Math.floor((y - above) / cell), s = Math.floor((x - left) / cell);
    return t >= 0 && t < T && s >= 0 && s < S ? { t, s } : null;
  };
}

// Draws the lines of some heads, the strongest last.
function drawLines(context, heads, shown, k, width, row, only, least) {
  const T = k.queries.length, S = k.keys.length, LEVELS = 12;
  const limits = (side, n) => (only?.side === side ? [only.index, only.index + 1] : [0, n]);
  const [t0, t1] = limits("query", T), [s0, s1] = limits("key", S);
  const paths = Array.from({ length: LEVELS + 1 }, () => new Map());
  for (const head of shown) {
    const values = heads[head], floor = least * ONE;
    for (let t = t0; t < t1; t++) {
      for (let s = s0; s < s1; s++) {
        const value = values[t * S + s];
        if (value < floor) continue;
        const level = paths[Math.ceil((only ? lift(value / ONE) : value / ONE) * LEVELS)];
        if (!level.has(head)) level.set(head, new Path2D());
        const path = level.get(head);
        path.moveTo(0, (t + 0.5) * row);
        path.lineTo(width, (s + 0.5) * row);
      }
    }
  }
  paths.forEach((level, i) => {
    const share = i / LEVELS;
    context.lineWidth = only ? 1 + 2.5 * share : row < 4 ? 0.6 : 0.8 + 1.4 * share;
    for (const [head, path] of level) {
      context.strokeStyle = headColour(head, (only || row < 4 ? share : share ** 1.25).toFixed(3));
      context.stroke(path);
    }
  });
}

// The least weight that gets a line: more than LINES lines could not be told apart.
const LINES = 2000;
function threshold(heads, shown) {
  const counts = new Uint32Array(101);
  for (const head of shown) for (const value of heads[head]) counts[Math.floor((100 * value) / ONE)]++;
  let least = 100, lines = counts[100];
  while (least > 2 && lines + counts[least - 1] <= LINES) lines += counts[--least];
  return least / 100;
}

function strongest(values, k, query, n = 4) {
  const S = k.keys.length;
  const row = Array.from(values.subarray(query * S, query * S + S), (v, s) => [v / ONE, s]);
  return row.sort((a, b) => b[0] - a[0]).slice(0, n).filter(([v]) => v >= 0.001);
}

function listed(values, k, query, head) {
  const parts = [token(k.queries[query]), ` ${k.verb}, layer ${state.layer}, head ${head}: `];
  for (const [weight, s] of strongest(values, k, query)) {
    parts.push(token(k.keys[s]), ` ${weight.toFixed(3)}   `);
  }
  return parts;
}

function cellText(values, k, cell, where) {
  const weight = element("b", { text: (values[cell.t * k.keys.length + cell.s] / ONE).toFixed(4) });
  return [token(k.queries[cell.t]), ` (${cell.t}) → `, token(k.keys[cell.s]), ` (${cell.s})   `, weight,
    `   ${where}`];
}
