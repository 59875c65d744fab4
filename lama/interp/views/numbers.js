// The page's data and state, colours, and drawing of matrices and lines on canvases. The page puts
// numbers.js, views.js and page.js into one block.

const $ = (id) => document.getElementById(id);
const meta = JSON.parse($("meta").textContent);
const { kinds, recorded } = meta;
const views = recorded ? ["training"] : ["head", "matrix", "model", "neuron"];
if (recorded) recorded.queries = recorded.keys = recorded.labels;
for (const k of recorded ? [recorded] : kinds) {
  [k.T, k.S] = [k.queries.length, k.keys.length];
  k.long = Math.max(k.T, k.S) > 60;
  k.rows = k.same ? "token" : "output";
}
const ONE = 65535; // a weight of 1
const state = { kind: 0, layer: 0, heads: new Set(), query: null, frame: 0, thumbs: "matrix", ...meta.start };
state.head ??= 0;
const kindNow = () => kinds[state.kind];
const headName = (layer, head) => `layer ${layer}, head ${head}`;
const range = (n) => Array.from({ length: n }, (_, i) => i);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const pixelRatio = () => window.devicePixelRatio || 1;

// Sets text, event handlers (on...) and attributes.
function set(target, options) {
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") target.textContent = value;
    else if (name.startsWith("on")) target.addEventListener(name.slice(2), value);
    else target.setAttribute(name, value);
  }
  return target;
}

function element(tag, options = {}, ...children) {
  const made = set(document.createElement(tag), options);
  made.append(...children);
  return made;
}

const div = (name, ...children) => element("div", name ? { class: name } : {}, ...children);
const option = (value, text) => element("option", { value, text });
const token = (text) => element("span", { class: "token", text });
const say = (...parts) => $("readout").replaceChildren(...parts);

// A handler of keys: `move` gets a key's step. If it returns false, the browser handles the key.
const onKeys = (steps, move) => (event) => {
  if (event.key in steps && move(steps[event.key], event) !== false) event.preventDefault();
};

// Numbers are base64 of deflated bytes, with one piece for each layer, unpacked on first use.

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Weights of n matrices (T, S): all high bytes, then all low bytes; causal ones without later keys.
function matrices(bytes, n, T, S, causal) {
  const half = bytes.length / 2;
  let at = 0;
  return range(n).map(() => {
    const values = new Uint16Array(T * S);
    for (let t = 0; t < T; t++) {
      const end = causal ? t + 1 : S;
      for (let s = 0; s < end; s++, at++) values[t * S + s] = (bytes[at] << 8) | bytes[half + at];
    }
    return values;
  });
}

const unpacked = new Map();
function once(name, make) {
  if (!unpacked.has(name)) unpacked.set(name, unpack(name).then(make));
  return unpacked.get(name);
}

function patterns(kind, layer) {
  const k = kinds[kind];
  return once(`p-${kind}-${layer}`, (bytes) => matrices(bytes, k.heads, k.T, k.S, k.causal));
}

// A function of head and row; the rows of a head are its queries, then its keys.
function vectors(kind, layer) {
  const k = kinds[kind], rows = k.T + k.S, n = k.heads * rows * k.d;
  return once(`v-${kind}-${layer}`, (bytes) => {
    const numbers = new Int8Array(bytes.buffer, 0, n), scales = new Float32Array(bytes.slice(n).buffer);
    return (head, row) => {
      const at = head * rows + row;
      return Float32Array.from(numbers.subarray(at * k.d, (at + 1) * k.d), (v) => v * scales[at]);
    };
  });
}

const colours = {};
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const css = (name) => style.getPropertyValue(`--${name}`).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const stops = ["ramp0", "ramp1", "ramp2"].map((name) => rgb(css(name)));
  colours.ramp = range(256).map((i) => {
    const place = (i / 255) * 2, low = Math.min(1, Math.floor(place)), share = place - low;
    return stops[low].map((value, c) => Math.round(value + (stops[low + 1][c] - value) * share));
  });
  for (const name of ["soft", "line", "cross", "positive", "negative", "head-s", "head-l"]) {
    colours[name] = css(name);
  }
}
function headColour(head, alpha = 1) {
  const hue = Math.round((360 * head) / kindNow().heads + 210) % 360;
  return `hsl(${hue} ${colours["head-s"]} ${colours["head-l"]} / ${alpha})`;
}
const lift = (weight) => (state.faint ? Math.sqrt(weight) : weight);
const shade = (value) => Math.round(lift(value / ONE) * 255); // an index into the ramp

function sized(canvas, width, height) {
  const ratio = Math.min(pixelRatio(), 16000 / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

// Draws one matrix; of weights that share a pixel, the largest is shown.
function drawPicture(context, values, { T, S }, x0, y0, width, height, most) {
  const rows = Math.min(T, most), columns = Math.min(S, most);
  const canvas = element("canvas", { width: columns, height: rows });
  const picture = canvas.getContext("2d"), image = picture.createImageData(columns, rows);
  for (let y = 0; y < rows; y++) {
    const t0 = Math.floor((y * T) / rows), t1 = Math.max(t0 + 1, Math.floor(((y + 1) * T) / rows));
    for (let x = 0; x < columns; x++) {
      const s0 = Math.floor((x * S) / columns), s1 = Math.max(s0 + 1, Math.floor(((x + 1) * S) / columns));
      let largest = 0;
      for (let t = t0; t < t1; t++) {
        for (let s = s0; s < s1; s++) if (values[t * S + s] > largest) largest = values[t * S + s];
      }
      const colour = colours.ramp[shade(largest)], at = (y * columns + x) * 4;
      for (let c = 0; c < 3; c++) image.data[at + c] = colour[c];
      image.data[at + 3] = 255;
    }
  }
  picture.putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, x0, y0, width, height);
}

// Draws a matrix with labels into `width`; returns a function that finds the cell at a point.
function drawMatrix(canvas, values, k, width, marked) {
  const { T, S } = k, font = '11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';
  const measure = canvas.getContext("2d");
  measure.font = font;
  const longest = (labels) => {
    return Math.min(width / 4, Math.max(0, ...labels.map((label) => measure.measureText(label).width))) + 8;
  };
  const left = longest(k.queries), above = longest(k.keys);
  const largest = T > 60 ? Math.max(4, 900 / T) : 34;
  const cell = Math.max(Math.min((width - left - 2) / S, 34, largest), 0.2);
  const w = cell * S, h = cell * T;
  const context = sized(canvas, left + w + 2, above + h + 2);
  drawPicture(context, values, k, left, above, w, h, Math.max(64, Math.round(w * pixelRatio())));
  context.strokeStyle = colours.line;
  context.strokeRect(left - 0.5, above - 0.5, w + 1, h + 1);
  context.font = font;
  context.textBaseline = "middle";
  const every = Math.ceil(10 / cell);
  const write = (labels, upright, mark) => labels.forEach((label, i) => {
    const near = mark !== undefined && Math.abs(i - mark) * cell < 10; // would touch the marked label
    if (i !== mark && (near || i % every)) return;
    const middle = (upright ? left : above) + (i + 0.5) * cell, room = (upright ? above : left) - 6;
    let text = label;
    for (let n = label.length - 1; n > 0 && context.measureText(text).width > room; n--) {
      text = `${label.slice(0, n)}…`;
    }
    context.save();
    context.translate(...(upright ? [middle, above - 4] : [left - 4, middle]));
    if (upright) context.rotate(-Math.PI / 2);
    context.textAlign = upright ? "left" : "right";
    context.fillStyle = i === mark ? colours.cross : colours.soft;
    context.fillText(text, 0, 0);
    context.restore();
  });
  write(k.queries, false, marked?.t);
  write(k.keys, true, marked?.s);
  if (marked) {
    const x = left + marked.s * cell - 0.5, y = above + marked.t * cell - 0.5, side = Math.max(cell, 3) + 1;
    context.strokeStyle = colours.cross;
    context.strokeRect(x, y, side, side);
    context.globalAlpha = 0.35;
    context.strokeRect(left - 0.5, y, w + 1, cell + 1);
    context.strokeRect(x, above - 0.5, cell + 1, h + 1);
  }
  return ({ offsetX, offsetY }) => {
    const t = Math.floor((offsetY - above) / cell), s = Math.floor((offsetX - left) / cell);
    return t >= 0 && t < T && s >= 0 && s < S ? { t, s } : null;
  };
}

// Draws the lines of some heads, the strongest last.
function drawLines(context, heads, shown, { T, S }, width, row, only, least) {
  const LEVELS = 12, thin = row < 4, floor = least * ONE;
  const limits = (side, n) => (only?.side === side ? [only.index, only.index + 1] : [0, n]);
  const [t0, t1] = limits("query", T), [s0, s1] = limits("key", S);
  const levels = range(LEVELS + 1).map(() => new Map());
  for (const head of shown) {
    for (let t = t0; t < t1; t++) {
      for (let s = s0; s < s1; s++) {
        const value = heads[head][t * S + s];
        if (value < floor) continue;
        const paths = levels[Math.ceil((only ? lift(value / ONE) : value / ONE) * LEVELS)];
        if (!paths.has(head)) paths.set(head, new Path2D());
        paths.get(head).moveTo(0, (t + 0.5) * row);
        paths.get(head).lineTo(width, (s + 0.5) * row);
      }
    }
  }
  levels.forEach((paths, i) => {
    const share = i / LEVELS;
    context.lineWidth = only ? 1 + 2.5 * share : thin ? 0.6 : 0.8 + 1.4 * share;
    for (const [head, path] of paths) {
      context.strokeStyle = headColour(head, (only || thin ? share : share ** 1.25).toFixed(3));
      context.stroke(path);
    }
  });
}

// The smallest weight that gets a line: more than LINES lines cannot be distinguished.
const LINES = 2000;
function threshold(heads, shown) {
  const counts = new Uint32Array(101);
  for (const head of shown) for (const value of heads[head]) counts[Math.floor((100 * value) / ONE)]++;
  let least = 100, lines = counts[100];
  while (least > 2 && lines + counts[least - 1] <= LINES) lines += counts[--least];
  return least / 100;
}

// Texts for the readout: the keys with a query's largest weights, and the weight of a cell.
function sayQuery(values, k, query, head) {
  const row = Array.from(values.subarray(query * k.S, (query + 1) * k.S), (v, s) => [v / ONE, s]);
  const best = row.sort((a, b) => b[0] - a[0]).slice(0, 4).filter(([weight]) => weight >= 0.001);
  const parts = best.flatMap(([weight, s]) => [token(k.keys[s]), ` ${weight.toFixed(3)}   `]);
  say(token(k.queries[query]), ` looks at, ${headName(state.layer, head)}: `, ...parts);
}

function sayCell(values, k, { t, s }, where) {
  const weight = element("b", { text: (values[t * k.S + s] / ONE).toFixed(4) });
  say(token(k.queries[t]), ` (${t}) → `, token(k.keys[s]), ` (${s})   `, weight, `   ${where}`);
}
