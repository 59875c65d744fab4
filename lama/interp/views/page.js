"use strict";
// The page of `lama attention`: four views of the same patterns, and the patterns of a training. Drawn on canvases, only what is looked at.
(() => {
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const $ = (id) => document.getElementById(id);
  const ONE = 65535; // a weight of 1
  const VIEWS = {
    head: ["Head", "Lines from each token to those it looks at, a colour for each head. Point at a token to see only its lines; click to keep it. A double click on a head leaves only that one."],
    matrix: ["Matrix", "One head: a row for each token, darker where it looks. Point at a cell, or move with the arrow keys; a click chooses the token."],
    model: ["Model", "All heads: layers downwards, heads across. Click on one to open it."],
    neuron: ["Neuron", "How one token's weights come about: its query times each key, summed up, through the softmax. Choose the token in the text."],
    training: ["Training", "The same sentence while the model learned: move the slider, or let it play."],
  };
  const views = meta.views;
  const kinds = meta.kinds;
  const state = { view: meta.start.view, kind: meta.start.kind, layer: meta.start.layer, head: meta.start.head ?? 0, heads: new Set(), query: null, frame: 0, thumbs: "matrix", faint: false };
  const kindNow = () => kinds[state.kind];

  // Elements

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

  // Numbers: base64 of deflated bytes, one piece a layer, unpacked when it is first looked at

  async function unpack(id) {
    const text = atob($(id).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // Weights of n matrices of T x S: first all high bytes, then all low ones; of causal ones only what is not ahead.
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

  const kept = new Map();
  function once(name, make) {
    if (!kept.has(name)) kept.set(name, make());
    return kept.get(name);
  }

  function patterns(kind, layer) {
    const k = kinds[kind];
    return once(`p-${kind}-${layer}`, async () => matrices(await unpack(`p-${kind}-${layer}`), k.heads, k.queries.length, k.keys.length, k.causal));
  }

  function vectors(kind, layer) {
    const k = kinds[kind];
    const rows = k.queries.length + k.keys.length;
    return once(`v-${kind}-${layer}`, async () => {
      const bytes = await unpack(`v-${kind}-${layer}`);
      const numbers = new Int8Array(bytes.buffer, 0, k.heads * rows * k.d);
      const scales = new Float32Array(bytes.slice(k.heads * rows * k.d).buffer);
      // Of each head first the queries, then the keys.
      return (head, row) => {
        const at = head * rows + row;
        return Float32Array.from(numbers.subarray(at * k.d, (at + 1) * k.d), (v) => v * scales[at]);
      };
    });
  }

  function frames() {
    const r = meta.recorded;
    return once("frames", async () => matrices(await unpack("r"), r.steps.length * r.heads.length, r.labels.length, r.labels.length, true));
  }

  // Colours

  const colours = { ramp: [], css: (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim() };
  function rgb(hex) {
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }
  function readColours() {
    const stops = ["--ramp0", "--ramp1", "--ramp2"].map((name) => rgb(colours.css(name)));
    colours.ramp = Array.from({ length: 256 }, (_, i) => {
      const place = (i / 255) * 2, low = Math.min(1, Math.floor(place)), share = place - low;
      return stops[low].map((value, c) => Math.round(value + (stops[low + 1][c] - value) * share));
    });
    for (const name of ["fg", "soft", "line", "bg", "cross", "positive", "negative", "mark"]) colours[name] = colours.css(`--${name}`);
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
    const ratio = Math.min(window.devicePixelRatio || 1, 16000 / Math.max(width, height));
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.clearRect(0, 0, width, height);
    return context;
  }

  // A picture of one matrix with at most `most` pixels to a side; a pixel has the largest of the weights it stands for.
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
        for (let t = t0; t < t1; t++) for (let s = s0; s < s1; s++) if (values[t * S + s] > largest) largest = values[t * S + s];
        const colour = shade(largest), at = (y * columns + x) * 4;
        image.data[at] = colour[0];
        image.data[at + 1] = colour[1];
        image.data[at + 2] = colour[2];
        image.data[at + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // A matrix with labels that fits `width`; returns what finds the cell under a point.
  function drawMatrix(canvas, values, k, width, marked) {
    const T = k.queries.length, S = k.keys.length;
    const font = '11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';
    const measure = canvas.getContext("2d");
    measure.font = font;
    const longest = (labels) => Math.min(width / 4, labels.reduce((most, label) => Math.max(most, measure.measureText(label).width), 0)) + 8;
    const left = longest(k.queries), above = longest(k.keys);
    const cell = Math.max(Math.min((width - left - 2) / S, 34, T > 60 ? Math.max(4, 900 / T) : 34), 0.2);
    const w = cell * S, h = cell * T;
    canvas.style.width = `${left + w + 2}px`;
    canvas.style.height = `${above + h + 2}px`;
    const context = sized(canvas, left + w + 2, above + h + 2);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture(values, T, S, Math.max(64, Math.round(w * (window.devicePixelRatio || 1)))), left, above, w, h);
    context.strokeStyle = colours.line;
    context.strokeRect(left - 0.5, above - 0.5, w + 1, h + 1);
    context.font = font;
    context.textBaseline = "middle";
    const every = Math.ceil(10 / cell);
    const fit = (label, room) => {
      let text = label;
      while (text.length > 1 && context.measureText(text === label ? text : `${text}…`).width > room) text = text.slice(0, -1);
      return text === label ? text : `${text}…`;
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
    const near = (i, at) => at !== undefined && at !== i && Math.abs(i - at) * cell < 10;
    for (let t = 0; t < T; t++) if ((t % every === 0 && !near(t, marked?.t)) || t === marked?.t) label(k.queries[t], left - 4, above + (t + 0.5) * cell, false, t === marked?.t);
    for (let s = 0; s < S; s++) if ((s % every === 0 && !near(s, marked?.s)) || s === marked?.s) label(k.keys[s], left + (s + 0.5) * cell, above - 4, true, s === marked?.s);
    if (marked) {
      context.strokeStyle = colours.cross;
      context.strokeRect(left + marked.s * cell - 0.5, above + marked.t * cell - 0.5, Math.max(cell, 3) + 1, Math.max(cell, 3) + 1);
      context.globalAlpha = 0.35;
      context.strokeRect(left - 0.5, above + marked.t * cell - 0.5, w + 1, cell + 1);
      context.strokeRect(left + marked.s * cell - 0.5, above - 0.5, cell + 1, h + 1);
    }
    return (x, y) => {
      const t = Math.floor((y - above) / cell), s = Math.floor((x - left) / cell);
      return t >= 0 && t < T && s >= 0 && s < S ? { t, s } : null;
    };
  }

  // The lines of some heads; the strongest are drawn last, over all others.
  function drawLines(context, heads, shown, k, width, row, only, least) {
    const T = k.queries.length, S = k.keys.length, LEVELS = 12;
    const range = (side, n) => (only?.side === side ? [only.index, only.index + 1] : [0, n]);
    const [t0, t1] = range("query", T), [s0, s1] = range("key", S);
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

  // The weight from which on lines are drawn: such that at most LINES of them are, else nothing could be told apart.
  const LINES = 2000;
  function threshold(heads, shown) {
    const counts = new Uint32Array(101);
    for (const head of shown) for (const value of heads[head]) counts[Math.floor((100 * value) / ONE)]++;
    let least = 100, lines = counts[100];
    while (least > 2 && lines + counts[least - 1] <= LINES) lines += counts[--least];
    return least / 100;
  }

  function strongest(values, k, query, n = 4) {
    const S = k.keys.length, row = Array.from(values.subarray(query * S, query * S + S), (v, s) => [v / ONE, s]);
    return row.sort((a, b) => b[0] - a[0]).slice(0, n).filter(([v]) => v >= 0.001);
  }

  function listed(values, k, query, head) {
    const parts = [token(k.queries[query]), ` ${k.verb}, layer ${state.layer}, head ${head}: `];
    for (const [weight, s] of strongest(values, k, query)) parts.push(token(k.keys[s]), ` ${weight.toFixed(3)}   `);
    return parts;
  }

  function cellText(values, k, cell, where) {
    const weight = values[cell.t * k.keys.length + cell.s] / ONE;
    return [token(k.queries[cell.t]), ` (${cell.t}) → `, token(k.keys[cell.s]), ` (${cell.s})   `, element("b", { text: weight.toFixed(4) }), `   ${where}`];
  }

  // Head view

  let hover = null, pinned = null;
  function headView(heads) {
    const k = kindNow(), many = Math.max(k.queries.length, k.keys.length), row = many > 60 ? 17 : 22;
    const column = (side, labels) => {
      const list = element("div", { class: `column ${side === "query" ? "left" : "right"}`, tabindex: 0, role: "listbox", "aria-label": side === "query" ? k.rows : "looked at" });
      labels.forEach((text, i) => list.append(element("div", { class: "token", role: "option", id: `${side}-${i}`, "data-i": i, text, title: text, style: `height:${row}px` })));
      const find = (event) => event.target.closest("[data-i]");
      list.addEventListener("pointermove", (event) => { const found = find(event); if (found) point({ side, index: Number(found.dataset.i) }); });
      list.addEventListener("pointerleave", () => point(null));
      list.addEventListener("click", (event) => {
        const found = find(event);
        if (!found) return;
        const here = { side, index: Number(found.dataset.i) };
        pinned = pinned?.side === side && pinned.index === here.index ? null : here;
        if (pinned?.side === "query") state.query = here.index;
        point(here);
      });
      list.addEventListener("keydown", (event) => {
        const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
        if (event.key === "Escape") { pinned = null; return point(null); }
        if (!step) return;
        event.preventDefault();
        const now = pinned?.side === side ? pinned.index : step > 0 ? -1 : labels.length;
        pinned = { side, index: Math.max(0, Math.min(labels.length - 1, now + step)) };
        if (side === "query") state.query = pinned.index;
        list.setAttribute("aria-activedescendant", `${side}-${pinned.index}`);
        $(`${side}-${pinned.index}`).scrollIntoView({ block: "nearest" });
        point(pinned);
      });
      return list;
    };
    const canvas = element("canvas", { "aria-hidden": "true" });
    const middle = element("div", {}, canvas), left = column("query", k.queries), right = column("key", k.keys);
    const body = element("div", { class: "columns" }, element("div", { class: "column-name left", text: k.rows }), element("div"), element("div", { class: "column-name", text: k.columns }), left, middle, right);
    $("main").replaceChildren(body);
    const width = middle.clientWidth, height = row * many;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const least = threshold(heads, state.heads), context = sized(canvas, width, height);
    let waiting = false;
    function point(where) {
      hover = where ?? pinned;
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; draw(); });
    }
    function draw() {
      const shown = [...state.heads].sort((a, b) => a - b), S = k.keys.length;
      context.clearRect(0, 0, width, height);
      drawLines(context, heads, shown, k, width, row, hover, hover ? 0.004 : least);
      const weights = (side, i) => shown.map((head) => lift((hover.side === "query" ? heads[head][hover.index * S + i] : heads[head][i * S + hover.index]) / ONE));
      for (const [side, list] of [["query", left], ["key", right]]) {
        for (const [i, item] of [...list.children].entries()) {
          const active = hover?.side === side && hover.index === i;
          item.classList.toggle("active", active);
          item.setAttribute("aria-selected", String(active));
          const seen = !hover || hover.side === side ? [] : weights(side, i), part = 100 / shown.length;
          if (!seen.some((weight) => weight > 0.004)) { if (item.style.background) item.style.background = ""; continue; }
          const stops = seen.map((weight, n) => `${headColour(shown[n], (weight * 0.75).toFixed(3))} ${n * part}% ${(n + 1) * part}%`);
          item.style.background = `linear-gradient(to right, ${stops.join(",")})`;
        }
      }
      if (!hover) return say(`layer ${state.layer}; ${shown.length} of ${k.heads} heads; lines of weights from ${least}`);
      if (hover.side === "key") {
        const best = shown.map((head) => { let t = 0; for (let i = 1; i < k.queries.length; i++) if (heads[head][i * S + hover.index] > heads[head][t * S + hover.index]) t = i; return [heads[head][t * S + hover.index] / ONE, t, head]; }).sort((a, b) => b[0] - a[0])[0];
        if (!best) return say();
        return say(token(k.keys[hover.index]), ` (${hover.index}) is looked at most by `, token(k.queries[best[1]]), ` (${best[1]}) in head ${best[2]}: ${best[0].toFixed(3)}`);
      }
      const loudest = shown.reduce((best, head) => { const top = strongest(heads[head], k, hover.index, 1)[0]?.[0] ?? 0; return top > best[0] ? [top, head] : best; }, [-1, shown[0]])[1];
      if (loudest === undefined) say("no head is chosen");
      else say(...listed(heads[loudest], k, hover.index, loudest));
    }
    hover = pinned;
    draw();
  }

  // The text, each token darker where the chosen one looks

  function strips(values, choose) {
    const k = kindNow(), S = k.keys.length, same = k.same;
    const weights = (i) => values[state.query * S + i] / ONE;
    const tint = (item, i) => {
      const at = Math.round(lift(weights(i)) * 255), colour = colours.ramp[at];
      item.style.background = `rgb(${colour.join(" ")})`;
      item.style.color = (at > 110) === (document.documentElement.dataset.theme !== "dark") ? "#fff" : at > 110 ? "#000" : "";
      item.title = `${weights(i).toFixed(4)}`;
    };
    const strip = (labels, chosen, tinted) => {
      const list = element("div", { class: chosen ? "strip" : "strip fixed", tabindex: chosen ? 0 : null, role: chosen ? "listbox" : null, "aria-label": k.rows });
      labels.forEach((text, i) => {
        const item = element("span", { class: "token", "data-i": i, role: chosen ? "option" : null, id: chosen ? `word-${i}` : null, text });
        if (tinted) tint(item, i);
        if (chosen && i === state.query) { item.classList.add("active"); item.setAttribute("aria-selected", "true"); }
        list.append(item);
      });
      if (chosen) {
        list.setAttribute("aria-activedescendant", `word-${state.query}`);
        list.addEventListener("click", (event) => { const found = event.target.closest("[data-i]"); if (found) choose(Number(found.dataset.i), false); });
        list.addEventListener("keydown", (event) => {
          const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -labels.length, End: labels.length }[event.key];
          if (!step) return;
          event.preventDefault();
          choose(Math.max(0, Math.min(labels.length - 1, state.query + step)), true);
        });
      }
      return list;
    };
    const seen = () => { const list = document.querySelector(".strip[tabindex]"), active = list?.querySelector(".active"); if (active) list.scrollTop = active.offsetTop - list.offsetTop - list.clientHeight / 2; };
    requestAnimationFrame(seen);
    if (same) return [element("div", { class: "strip-name", text: "where the framed token looks:" }), strip(k.queries, true, true)];
    return [element("div", { class: "strip-name", text: `${k.rows}:` }), strip(k.queries, true, false), element("div", { class: "strip-name", text: `${k.columns}:` }), strip(k.keys, false, true)];
  }

  function chooseQuery(index, focus) {
    state.query = index;
    pinned = { side: "query", index };
    render().then(() => { if (focus) document.querySelector(".strip[tabindex]")?.focus(); });
  }

  // Matrix view

  function matrixView(heads) {
    const k = kindNow(), values = heads[state.head];
    const canvas = element("canvas", { tabindex: 0, role: "img", "aria-label": `weights of layer ${state.layer}, head ${state.head}; the arrow keys move from cell to cell` });
    const holder = element("div", {}, canvas);
    $("main").replaceChildren(...strips(values, chooseQuery), holder);
    const width = holder.clientWidth, where = `layer ${state.layer}, head ${state.head}`;
    let cell = null;
    let find = drawMatrix(canvas, values, k, width, null);
    const show = (next) => {
      if (next?.t === cell?.t && next?.s === cell?.s) return;
      cell = next;
      find = drawMatrix(canvas, values, k, width, cell);
      if (cell) say(...cellText(values, k, cell, where));
      else say(...listed(values, k, state.query, state.head));
    };
    canvas.addEventListener("pointermove", (event) => show(find(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerleave", () => show(null));
    canvas.addEventListener("click", () => { if (cell) chooseQuery(cell.t, false); });
    canvas.addEventListener("keydown", (event) => {
      const [dt, ds] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [0, 0];
      if (!dt && !ds) return;
      event.preventDefault();
      const now = cell ?? { t: state.query, s: 0 };
      show({ t: Math.max(0, Math.min(k.queries.length - 1, now.t + dt)), s: Math.max(0, Math.min(k.keys.length - 1, now.s + ds)) });
    });
    say(...listed(values, k, state.query, state.head));
  }

  // Model view

  let watcher = null;
  function modelView() {
    const k = kindNow(), T = k.queries.length, S = k.keys.length;
    watcher?.disconnect();
    const room = $("main").clientWidth - 28;
    const columns = Math.min(k.heads, Math.max(4, Math.floor((room + 4) / 30)));
    const size = `repeat(${columns}, minmax(0, ${T > 60 ? 130 : 110}px))`;
    const rows = [];
    if (columns === k.heads) rows.push(element("div", { class: "layer-row", "aria-hidden": "true" }, element("span"), element("div", { class: "head-numbers", style: `grid-template-columns:${size}` }, ...Array.from({ length: k.heads }, (_, h) => element("span", { text: h })))));
    watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); fill(entry.target); }
    }, { rootMargin: "200px" });
    const buttons = [];
    for (let layer = 0; layer < k.layers; layer++) {
      const line = element("div", { class: "thumbs", style: `grid-template-columns:${size}` });
      for (let head = 0; head < k.heads; head++) {
        const here = layer === state.layer && head === state.head;
        const button = element("button", { type: "button", class: here ? "thumb here" : "thumb", "aria-label": `layer ${layer}, head ${head}`, title: `layer ${layer}, head ${head}`, "data-layer": layer, "data-head": head, tabindex: here ? 0 : -1 }, element("canvas"));
        buttons.push(button);
        line.append(button);
        watcher.observe(button);
      }
      rows.push(element("div", { class: "layer-row" }, element("span", { text: layer }), line));
    }
    const grid = element("div", { role: "group", "aria-label": "all heads" }, ...rows);
    grid.addEventListener("click", (event) => {
      const button = event.target.closest(".thumb");
      if (!button) return;
      state.layer = Number(button.dataset.layer);
      state.head = Number(button.dataset.head);
      state.heads = new Set([state.head]);
      show(Math.max(T, S) > 60 ? "matrix" : "head");
    });
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: k.heads, ArrowUp: -k.heads }[event.key], at = buttons.indexOf(event.target);
      if (!step || at < 0 || !buttons[at + step]) return;
      event.preventDefault();
      event.target.tabIndex = -1;
      buttons[at + step].tabIndex = 0;
      buttons[at + step].focus();
    });
    for (const name of ["pointerover", "focusin"]) {
      grid.addEventListener(name, async (event) => {
        const button = event.target.closest(".thumb");
        if (!button) return;
        const layer = Number(button.dataset.layer), head = Number(button.dataset.head), values = (await patterns(state.kind, layer))[head];
        say(...describeHead(values, k, layer, head));
      });
    }
    $("main").replaceChildren(grid);
    say(`${k.layers} layers x ${k.heads} heads, ${T} tokens`);

    async function fill(button) {
      const kind = state.kind, layer = Number(button.dataset.layer), values = await patterns(kind, layer);
      if (!button.isConnected || kind !== state.kind) return;
      const canvas = button.firstChild, side = Math.max(16, button.clientWidth), context = sized(canvas, side, side);
      if (state.thumbs === "lines") return drawLines(context, { [button.dataset.head]: values[button.dataset.head] }, [Number(button.dataset.head)], k, side, side / Math.max(T, S), null, T > 60 ? 0.08 : 0.04);
      context.imageSmoothingEnabled = false;
      context.drawImage(picture(values[button.dataset.head], T, S, Math.round(side * (window.devicePixelRatio || 1))), 0, 0, side, side);
    }
  }

  // What a head does, in one line.
  function describeHead(values, k, layer, head) {
    const T = k.queries.length, S = k.keys.length, parts = [`layer ${layer}, head ${head}`];
    if (k.same && T > 2) {
      let first = 0, self = 0, before = 0;
      for (let t = 2; t < T; t++) { first += values[t * S]; self += values[t * S + t]; before += values[t * S + t - 1]; }
      const mean = (sum) => (sum / (T - 2) / ONE).toFixed(2);
      parts.push(`: on average ${mean(first)} on the first token, ${mean(self)} on the token itself, ${mean(before)} on the one before`);
    }
    return parts;
  }

  // Neuron view

  async function neuronView(heads) {
    const k = kindNow(), S = k.keys.length, values = heads[state.head], row = 20;
    if (k.scale === null) {
      $("main").replaceChildren(element("p", { class: "note", text: "This model's scores are not products of query and key, so there is nothing to take apart here." }));
      return say();
    }
    const mine = turn, scale = Array.isArray(k.scale) ? k.scale[state.layer] : k.scale, vector = await vectors(state.kind, state.layer);
    if (mine !== turn) return;
    const keys = Array.from({ length: k.causal ? state.query + 1 : S }, (_, s) => s);
    const q = vector(state.head, state.query), ks = keys.map((s) => vector(state.head, k.queries.length + s));
    const products = ks.map((key) => key.map((v, d) => v * q[d]));
    const scores = products.map((product) => product.reduce((a, b) => a + b, 0) * scale);
    const largest = (list) => list.reduce((most, vectorOf) => vectorOf.reduce((m, v) => Math.max(m, Math.abs(v)), most), 1e-9);
    const mostK = largest([...ks, q]), mostP = largest(products);
    const top = (...children) => element("div", { class: "top" }, ...children);
    const qCanvas = element("canvas"), kCanvas = element("canvas"), pCanvas = element("canvas");
    const line = (kind, s, ...children) => element("div", { class: `row ${kind}`, style: `height:${row}px`, "data-s": s }, ...children);
    const body = element("div", { class: "neurons" },
      top("query ", token(k.queries[state.query])), top("q, and below it each k", qCanvas), top("q × k"), top(scale === 1 ? "q · k" : Math.abs(scale * Math.sqrt(k.d) - 1) < 1e-6 ? "q · k / √d" : `q · k × ${scale.toPrecision(3)}`), top("softmax"),
      element("div", {}, ...keys.map((s) => line("token", s, k.keys[s]))), element("div", { "aria-hidden": "true" }, kCanvas), element("div", { "aria-hidden": "true" }, pCanvas),
      element("div", {}, ...keys.map((s, i) => line("number", s, scores[i].toFixed(2)))),
      element("div", {}, ...keys.map((s) => { const weight = values[state.query * S + s] / ONE; return line("share", s, element("i", { style: `width:${(100 * weight).toFixed(2)}%` }), weight.toFixed(3)); })));
    $("main").replaceChildren(...strips(values, chooseQuery), body);
    const paint = (canvas, rows, most, height) => {
      const width = canvas.parentElement.clientWidth;
      canvas.style.height = `${height * rows.length}px`;
      const context = sized(canvas, width, height * rows.length), w = width / k.d;
      rows.forEach((numbers, i) => numbers.forEach((v, d) => {
        context.globalAlpha = Math.sqrt(Math.min(1, Math.abs(v) / most));
        context.fillStyle = v < 0 ? colours.negative : colours.positive;
        context.fillRect(d * w, i * height + 1, w, height - 2);
      }));
      context.globalAlpha = 1;
      context.strokeStyle = colours.line;
      rows.forEach((_, i) => context.strokeRect(0.5, i * height + 1.5, width - 1, height - 3));
    };
    paint(qCanvas, [q], mostK, row);
    paint(kCanvas, ks, mostK, row);
    paint(pCanvas, products, mostP, row);
    for (const canvas of [qCanvas, kCanvas, pCanvas]) {
      canvas.addEventListener("pointermove", (event) => {
        const d = Math.min(k.d - 1, Math.max(0, Math.floor((event.offsetX / canvas.clientWidth) * k.d))), i = Math.min(keys.length - 1, Math.max(0, Math.floor(event.offsetY / row)));
        if (canvas === qCanvas) say(token(k.queries[state.query]), `  q[${d}] = ${q[d].toFixed(3)}`);
        else say(token(k.keys[keys[i]]), `  q[${d}] ${q[d].toFixed(3)} × k[${d}] ${ks[i][d].toFixed(3)} = ${products[i][d].toFixed(3)}`);
      });
    }
    say(...listed(values, k, state.query, state.head));
  }

  // Training view

  let playing = null;
  async function trainingView() {
    const r = meta.recorded, all = await frames(), k = { queries: r.labels, keys: r.labels };
    const slider = element("input", { type: "range", min: 0, max: r.steps.length - 1, value: state.frame, "aria-label": "step of the training" });
    const play = element("button", { type: "button", text: "▶ play" }), label = element("b");
    const figures = r.heads.map((name) => {
      const canvas = element("canvas");
      return { canvas, figure: element("figure", {}, element("figcaption", { text: `layer ${name.split(".")[0]}, head ${name.split(".")[1]}` }), canvas) };
    });
    $("main").replaceChildren(element("div", { class: "player" }, play, slider, label), element("div", { class: "frames" }, ...figures.map((each) => each.figure)));
    let cell = null;
    const values = (n) => all[state.frame * r.heads.length + n];
    const draw = () => {
      label.textContent = `step ${r.steps[state.frame].toLocaleString("en")}${r.losses[state.frame] === null ? "" : `, loss ${r.losses[state.frame].toFixed(3)}`}`;
      slider.value = state.frame;
      slider.setAttribute("aria-valuetext", label.textContent);
      figures.forEach((each, n) => { each.find = drawMatrix(each.canvas, values(n), k, each.figure.clientWidth, cell); });
    };
    const stop = () => { clearInterval(playing); playing = null; play.textContent = "▶ play"; };
    slider.addEventListener("input", () => { stop(); state.frame = Number(slider.value); draw(); remember(); });
    play.addEventListener("click", () => {
      if (playing) return stop();
      if (state.frame === r.steps.length - 1) state.frame = 0;
      play.textContent = "❚❚ stop";
      draw();
      playing = setInterval(() => {
        if (!slider.isConnected || state.frame >= r.steps.length - 1) return stop();
        state.frame += 1;
        draw();
      }, Math.max(60, Math.min(400, 8000 / r.steps.length)));
    });
    figures.forEach((each, n) => {
      each.canvas.addEventListener("pointermove", (event) => {
        cell = each.find(event.offsetX, event.offsetY);
        draw();
        if (cell) say(...cellText(values(n), k, cell, `layer ${r.heads[n].replace(".", ", head ")}, step ${r.steps[state.frame]}`));
      });
      each.canvas.addEventListener("pointerleave", () => { cell = null; draw(); });
    });
    draw();
    say(`${r.steps.length} moments from step ${r.steps[0]} to ${r.steps[r.steps.length - 1]}`);
  }

  // What is chosen

  const USES = { head: "kind layer heads all faint", matrix: "kind layer heads faint legend", model: "kind thumbs faint legend", neuron: "kind layer heads faint legend", training: "faint legend" };

  function controls() {
    const uses = USES[state.view].split(" "), k = kinds.length ? kindNow() : null, single = state.view !== "head";
    for (const name of ["kind", "layer", "heads", "thumbs", "faint"]) $(`${name}-label`).classList.toggle("hidden", !uses.includes(name) || (name === "kind" && kinds.length < 2));
    $("legend").classList.toggle("hidden", !uses.includes("legend"));
    $("all").classList.toggle("hidden", single);
    $("heads-word").textContent = single ? "head" : "heads";
    $("faint").checked = state.faint;
    $("legend").title = state.faint ? "the square root of the weight" : "the weight";
    for (const tab of $("tabs").children) {
      const chosen = tab.dataset.view === state.view;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
    $("help").textContent = VIEWS[state.view][1];
    if (!k) return;
    $("kind").value = state.kind;
    $("layer").replaceChildren(...Array.from({ length: k.layers }, (_, i) => option(i, i)));
    $("layer").value = state.layer;
    const holder = $("heads");
    holder.setAttribute("role", single ? "radiogroup" : "group");
    if (holder.children.length !== k.heads) holder.replaceChildren(...Array.from({ length: k.heads }, (_, head) => element("button", { type: "button", "data-head": head, "aria-label": `head ${head}`, text: head })));
    [...holder.children].forEach((button, head) => {
      const on = String(single ? head === state.head : state.heads.has(head));
      button.style.setProperty("--c", headColour(head));
      for (const name of ["role", "aria-checked", "aria-pressed"]) button.removeAttribute(name);
      if (single) button.setAttribute("role", "radio");
      button.setAttribute(single ? "aria-checked" : "aria-pressed", on);
    });
  }

  let turn = 0;
  async function render() {
    const mine = ++turn;
    controls();
    remember();
    if (state.view === "training") return trainingView();
    if (state.view === "model") return modelView();
    const heads = await patterns(state.kind, state.layer);
    if (mine !== turn) return;
    await { head: headView, matrix: matrixView, neuron: neuronView }[state.view](heads);
  }

  function show(view) {
    if (playing) clearInterval(playing);
    playing = null;
    state.view = view;
    return render();
  }

  function chooseKind(kind) {
    state.kind = kind;
    const k = kindNow();
    state.layer = Math.min(state.layer, k.layers - 1);
    state.head = Math.min(state.head, k.heads - 1);
    const long = Math.max(k.queries.length, k.keys.length) > 60; // then all heads at once are nothing but a tangle
    state.heads = new Set(long ? [state.head] : Array.from({ length: k.heads }, (_, head) => head));
    state.query = Math.min(state.query ?? Infinity, k.queries.length - 1);
    pinned = hover = null;
  }

  // The address says what is shown, so that a link, or going back, finds it again.
  function remember() {
    const words = { pin: pinned ? pinned.side : null, view: state.view, kind: state.kind, layer: state.layer, head: state.head, query: state.query, frame: state.frame };
    try {
      history.replaceState(null, "", `#${new URLSearchParams(Object.entries(words).filter(([, value]) => value !== null)).toString()}`);
    } catch { /* some browsers forbid it for files */ }
  }
  function recall() {
    const words = new URLSearchParams(location.hash.slice(1));
    const number = (name, n) => { const value = Number(words.get(name) ?? NaN); return Number.isInteger(value) && value >= 0 && value < n ? value : null; };
    if (views.includes(words.get("view"))) state.view = words.get("view");
    if (meta.recorded) state.frame = number("frame", meta.recorded.steps.length) ?? meta.recorded.steps.length - 1;
    if (!kinds.length) return;
    chooseKind(number("kind", kinds.length) ?? state.kind);
    const k = kindNow(), head = number("head", k.heads);
    state.layer = number("layer", k.layers) ?? state.layer;
    state.query = number("query", k.queries.length) ?? state.query;
    if (head !== null) state.head = head;
    if (words.get("pin") === "query" && state.query !== null) pinned = { side: "query", index: state.query };
    if (meta.start.head !== null || state.heads.size === 1) state.heads = new Set([state.head]);
  }

  function theme(name) {
    document.documentElement.dataset.theme = name;
    readColours();
  }

  function start() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    let chosen = null;
    try { chosen = localStorage.getItem("lama-theme"); } catch { /* not for files, in some browsers */ }
    theme(chosen ?? (dark.matches ? "dark" : "light"));
    dark.addEventListener("change", () => { if (!chosen) { theme(dark.matches ? "dark" : "light"); render(); } });
    $("theme").addEventListener("click", () => {
      chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      try { localStorage.setItem("lama-theme", chosen); } catch { /* as above */ }
      theme(chosen);
      render();
    });

    for (const view of views) $("tabs").append(element("button", { type: "button", role: "tab", "data-view": view, text: VIEWS[view][0], onclick: () => show(view) }));
    $("tabs").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = views[(views.indexOf(state.view) + step + views.length) % views.length];
      show(next);
      $("tabs").querySelector(`[data-view="${next}"]`).focus();
    });
    kinds.forEach((k, i) => $("kind").append(option(i, k.name)));
    $("kind").addEventListener("change", (event) => { chooseKind(Number(event.target.value)); render(); });
    $("layer").addEventListener("change", (event) => { state.layer = Number(event.target.value); render(); });
    $("faint").addEventListener("change", (event) => { state.faint = event.target.checked; render(); });
    $("thumbs").addEventListener("change", (event) => { state.thumbs = event.target.value; render(); });
    $("all").addEventListener("click", () => {
      const n = kindNow().heads;
      state.heads = state.heads.size === n ? new Set() : new Set(Array.from({ length: n }, (_, head) => head));
      render();
    });
    $("heads").addEventListener("click", (event) => {
      const head = Number(event.target.closest("button")?.dataset.head ?? NaN);
      if (Number.isNaN(head)) return;
      if (state.view !== "head") state.head = head;
      else if (event.detail === 2) state.heads = new Set([head]);
      else if (state.heads.has(head)) state.heads.delete(head);
      else state.heads.add(head);
      if (state.heads.has(head)) state.head = head;
      render();
    });
    $("footer").textContent = meta.notes;
    if (!("DecompressionStream" in window)) {
      $("main").replaceChildren(element("p", { class: "note", text: "This browser is too old to unpack the numbers: one of 2023 or later is needed." }));
      return;
    }
    const many = Math.max(...kinds.map((k) => Math.max(k.queries.length, k.keys.length)), meta.recorded?.labels.length ?? 0);
    state.faint = many > 48;
    recall();
    let width = 0, timer = 0;
    new ResizeObserver(() => {
      if (Math.abs($("main").clientWidth - width) < 2) return;
      width = $("main").clientWidth;
      clearTimeout(timer);
      timer = setTimeout(render, 80);
    }).observe($("main"));
    width = $("main").clientWidth;
    render().then(() => { document.documentElement.dataset.ready = "true"; });
  }

  start();
})();
