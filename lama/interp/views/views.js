// The views: lines of the chosen heads, one head as a matrix, all heads, one score in detail, a training.

// Head view

let hover = null, pinned = null;
function headView(heads) {
  const k = kindNow(), S = k.keys.length;
  const many = Math.max(k.queries.length, S), row = many > 60 ? 17 : 22;

  const column = (side, labels) => {
    const list = element("div", {
      class: `column ${side === "query" ? "left" : "right"}`,
      tabindex: 0,
      role: "listbox",
      "aria-label": side === "query" ? k.rows : "looked at",
    });
    labels.forEach((text, i) => {
      const options = { class: "token", role: "option", id: `${side}-${i}`, "data-i": i, text, title: text };
      list.append(element("div", { ...options, style: `height:${row}px` }));
    });
    const find = (event) => {
      const item = event.target.closest("[data-i]");
      return item ? { side, index: Number(item.dataset.i) } : null;
    };
    list.addEventListener("pointermove", (event) => {
      const here = find(event);
      if (here) point(here);
    });
    list.addEventListener("pointerleave", () => point(null));
    list.addEventListener("click", (event) => {
      const here = find(event);
      if (!here) return;
      pinned = pinned?.side === side && pinned.index === here.index ? null : here;
      if (pinned?.side === "query") state.query = here.index;
      point(here);
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
      if (event.key === "Escape") {
        pinned = null;
        return point(null);
      }
      if (!step) return;
      event.preventDefault();
      const now = pinned?.side === side ? pinned.index : step > 0 ? -1 : labels.length;
      pinned = { side, index: clamp(now + step, 0, labels.length - 1) };
      if (side === "query") state.query = pinned.index;
      list.setAttribute("aria-activedescendant", `${side}-${pinned.index}`);
      $(`${side}-${pinned.index}`).scrollIntoView({ block: "nearest" });
      point(pinned);
    });
    return list;
  };

  const canvas = element("canvas", { "aria-hidden": "true" }), middle = element("div", {}, canvas);
  const left = column("query", k.queries), right = column("key", k.keys);
  const names = [
    element("div", { class: "column-name left", text: k.rows }),
    element("div"),
    element("div", { class: "column-name", text: k.columns }),
  ];
  $("main").replaceChildren(element("div", { class: "columns" }, ...names, left, middle, right));
  const width = middle.clientWidth, height = row * many;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const least = threshold(heads, state.heads), context = sized(canvas, width, height);
  const weight = (head, t, s) => heads[head][t * S + s] / ONE;

  let waiting = false;
  function point(where) {
    hover = where ?? pinned;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  // A stripe for each head that the token under the pointer looks at, or is looked at by.
  function background(side, i, shown) {
    if (!hover || hover.side === side) return "";
    const fromQuery = hover.side === "query", part = 100 / shown.length;
    const weights = shown.map((head) => {
      return lift(fromQuery ? weight(head, hover.index, i) : weight(head, i, hover.index));
    });
    if (!weights.some((each) => each > 0.004)) return "";
    const stops = weights.map((each, n) => {
      return `${headColour(shown[n], (each * 0.75).toFixed(3))} ${n * part}% ${(n + 1) * part}%`;
    });
    return `linear-gradient(to right, ${stops.join(",")})`;
  }

  function draw() {
    const shown = [...state.heads].sort((a, b) => a - b);
    context.clearRect(0, 0, width, height);
    drawLines(context, heads, shown, k, width, row, hover, hover ? 0.004 : least);
    for (const [side, list] of [["query", left], ["key", right]]) {
      for (const [i, item] of [...list.children].entries()) {
        const active = hover?.side === side && hover.index === i;
        item.classList.toggle("active", active);
        item.setAttribute("aria-selected", String(active));
        const style = background(side, i, shown);
        if (style || item.style.background) item.style.background = style;
      }
    }
    if (!hover) {
      return say(`layer ${state.layer}; ${shown.length} of ${k.heads} heads; lines of weights from ${least}`);
    }
    if (hover.side === "key") return sayQuery(shown);
    let best = -1, loudest = shown[0];
    for (const head of shown) {
      const top = strongest(heads[head], k, hover.index, 1)[0]?.[0] ?? 0;
      if (top > best) [best, loudest] = [top, head];
    }
    if (loudest === undefined) say("no head is chosen");
    else say(...listed(heads[loudest], k, hover.index, loudest));
  }

  // Names the query, of all chosen heads, that looks most at the key under the pointer.
  function sayQuery(shown) {
    let best = null;
    for (const head of shown) {
      for (const t of k.queries.keys()) {
        const most = weight(head, t, hover.index);
        if (!best || most > best.most) best = { most, t, head };
      }
    }
    if (!best) return say();
    say(token(k.keys[hover.index]), ` (${hover.index}) is looked at most by `, token(k.queries[best.t]),
      ` (${best.t}) in head ${best.head}: ${best.most.toFixed(3)}`);
  }

  hover = pinned;
  draw();
}

// The text, each token darker where the chosen one looks

function strips(values, choose) {
  const k = kindNow(), S = k.keys.length;
  const tint = (item, i) => {
    const weight = values[state.query * S + i] / ONE;
    const at = Math.round(lift(weight) * 255), light = document.documentElement.dataset.theme !== "dark";
    item.style.background = `rgb(${colours.ramp[at].join(" ")})`;
    item.style.color = (at > 110) === light ? "#fff" : at > 110 ? "#000" : "";
    item.title = weight.toFixed(4);
  };
  const name = (text) => element("div", { class: "strip-name", text });

  function strip(labels, tinted) {
    const list = element("div", { class: "strip fixed", "aria-label": k.rows });
    labels.forEach((text, i) => {
      const item = element("span", { class: "token", "data-i": i, text });
      if (tinted) tint(item, i);
      list.append(item);
    });
    return list;
  }

  function choices(labels, tinted) {
    const list = strip(labels, tinted);
    list.className = "strip";
    list.tabIndex = 0;
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-activedescendant", `word-${state.query}`);
    [...list.children].forEach((item, i) => {
      item.id = `word-${i}`;
      item.setAttribute("role", "option");
      if (i !== state.query) return;
      item.classList.add("active");
      item.setAttribute("aria-selected", "true");
    });
    list.addEventListener("click", (event) => {
      const found = event.target.closest("[data-i]");
      if (found) choose(Number(found.dataset.i), false);
    });
    list.addEventListener("keydown", (event) => {
      const n = labels.length;
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -n, End: n };
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      choose(clamp(state.query + step, 0, n - 1), true);
    });
    return list;
  }

  requestAnimationFrame(() => {
    const list = document.querySelector(".strip[tabindex]"), active = list?.querySelector(".active");
    if (active) list.scrollTop = active.offsetTop - list.offsetTop - list.clientHeight / 2;
  });
  if (k.same) return [name("where the framed token looks:"), choices(k.queries, true)];
  return [name(`${k.rows}:`), choices(k.queries, false), name(`${k.columns}:`), strip(k.keys, true)];
}

function chooseQuery(index, focus) {
  state.query = index;
  pinned = { side: "query", index };
  render().then(() => {
    if (focus) document.querySelector(".strip[tabindex]")?.focus();
  });
}

// Matrix view

function matrixView(heads) {
  const k = kindNow(), values = heads[state.head], where = `layer ${state.layer}, head ${state.head}`;
  const help = `weights of ${where}; the arrow keys move from cell to cell`;
  const canvas = element("canvas", { tabindex: 0, role: "img", "aria-label": help });
  const holder = element("div", {}, canvas);
  $("main").replaceChildren(...strips(values, chooseQuery), holder);
  const width = holder.clientWidth;
  let cell = null;
  let find = drawMatrix(canvas, values, k, width, null);
  const mark = (next) => {
    if (next?.t === cell?.t && next?.s === cell?.s) return;
    cell = next;
    find = drawMatrix(canvas, values, k, width, cell);
    if (cell) say(...cellText(values, k, cell, where));
    else say(...listed(values, k, state.query, state.head));
  };
  canvas.addEventListener("pointermove", (event) => mark(find(event.offsetX, event.offsetY)));
  canvas.addEventListener("pointerleave", () => mark(null));
  canvas.addEventListener("click", () => {
    if (cell) chooseQuery(cell.t, false);
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
    const [dt, ds] = steps[event.key] ?? [0, 0];
    if (!dt && !ds) return;
    event.preventDefault();
    const now = cell ?? { t: state.query, s: 0 };
    mark({ t: clamp(now.t + dt, 0, k.queries.length - 1), s: clamp(now.s + ds, 0, k.keys.length - 1) });
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
  const style = `grid-template-columns:repeat(${columns}, minmax(0, ${T > 60 ? 130 : 110}px))`;
  const rows = [];
  if (columns === k.heads) {
    const numbers = range(k.heads).map((head) => element("span", { text: head }));
    const line = element("div", { class: "head-numbers", style }, ...numbers);
    rows.push(element("div", { class: "layer-row", "aria-hidden": "true" }, element("span"), line));
  }
  watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      fill(entry.target);
    }
  }, { rootMargin: "200px" });
  const buttons = [];
  for (let layer = 0; layer < k.layers; layer++) {
    const line = element("div", { class: "thumbs", style });
    for (let head = 0; head < k.heads; head++) {
      const here = layer === state.layer && head === state.head, title = `layer ${layer}, head ${head}`;
      const button = element("button", {
        type: "button",
        class: here ? "thumb here" : "thumb",
        "aria-label": title,
        title,
        "data-layer": layer,
        "data-head": head,
        tabindex: here ? 0 : -1,
      }, element("canvas"));
      buttons.push(button);
      line.append(button);
      watcher.observe(button);
    }
    rows.push(element("div", { class: "layer-row" }, element("span", { text: layer }), line));
  }
  const grid = element("div", { role: "group", "aria-label": "all heads" }, ...rows);
  const place = (button) => [Number(button.dataset.layer), Number(button.dataset.head)];
  grid.addEventListener("click", (event) => {
    const button = event.target.closest(".thumb");
    if (!button) return;
    [state.layer, state.head] = place(button);
    state.heads = new Set([state.head]);
    show(Math.max(T, S) > 60 ? "matrix" : "head");
  });
  grid.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: k.heads, ArrowUp: -k.heads };
    const step = steps[event.key], at = buttons.indexOf(event.target);
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
      const [layer, head] = place(button), values = (await patterns(state.kind, layer))[head];
      say(describeHead(values, k, layer, head));
    });
  }
  $("main").replaceChildren(grid);
  say(`${k.layers} layers x ${k.heads} heads, ${T} tokens`);

  async function fill(button) {
    const kind = state.kind, [layer, head] = place(button), values = (await patterns(kind, layer))[head];
    if (!button.isConnected || kind !== state.kind) return;
    const side = Math.max(16, button.clientWidth), context = sized(button.firstChild, side, side);
    if (state.thumbs === "lines") {
      const row = side / Math.max(T, S), least = T > 60 ? 0.08 : 0.04;
      return drawLines(context, { [head]: values }, [head], k, side, row, null, least);
    }
    context.imageSmoothingEnabled = false;
    context.drawImage(picture(values, T, S, Math.round(side * pixelRatio())), 0, 0, side, side);
  }
}

// One line about a head: its mean attention to the first token, the token itself and the one before.
function describeHead(values, k, layer, head) {
  const T = k.queries.length, S = k.keys.length, title = `layer ${layer}, head ${head}`;
  if (!k.same || T <= 2) return title;
  let first = 0, self = 0, before = 0;
  for (let t = 2; t < T; t++) {
    first += values[t * S];
    self += values[t * S + t];
    before += values[t * S + t - 1];
  }
  const mean = (sum) => (sum / (T - 2) / ONE).toFixed(2);
  return `${title}: on average ${mean(first)} on the first token, ${mean(self)} on the token itself, `
    + `${mean(before)} on the one before`;
}

// Neuron view

async function neuronView(heads) {
  const k = kindNow(), S = k.keys.length, values = heads[state.head], row = 20;
  if (k.scale === null) {
    const text = "This model's scores are not products of query and key, so there is nothing to show here.";
    $("main").replaceChildren(element("p", { class: "note", text }));
    return say();
  }
  const mine = turn, scale = Array.isArray(k.scale) ? k.scale[state.layer] : k.scale;
  const vector = await vectors(state.kind, state.layer);
  if (mine !== turn) return;
  const keys = range(k.causal ? state.query + 1 : S);
  const q = vector(state.head, state.query);
  const ks = keys.map((s) => vector(state.head, k.queries.length + s));
  const products = ks.map((key) => key.map((v, d) => v * q[d]));
  const scores = products.map((product) => product.reduce((a, b) => a + b, 0) * scale);

  const line = (kind, s, ...children) => {
    return element("div", { class: `row ${kind}`, style: `height:${row}px`, "data-s": s }, ...children);
  };
  const top = (...children) => element("div", { class: "top" }, ...children);
  const cells = (...children) => element("div", {}, ...children);
  const hidden = (canvas) => element("div", { "aria-hidden": "true" }, canvas);
  const weights = keys.map((s) => {
    const weight = values[state.query * S + s] / ONE;
    const bar = element("i", { style: `width:${(100 * weight).toFixed(2)}%` });
    return line("share", s, bar, weight.toFixed(3));
  });
  const qCanvas = element("canvas"), kCanvas = element("canvas"), pCanvas = element("canvas");
  let product = `q · k × ${scale.toPrecision(3)}`;
  if (scale === 1) product = "q · k";
  else if (Math.abs(scale * Math.sqrt(k.d) - 1) < 1e-6) product = "q · k / √d";
  const body = element("div", { class: "neurons" },
    top("query ", token(k.queries[state.query])), top("q, and below it each k", qCanvas), top("q × k"),
    top(product), top("softmax"),
    cells(...keys.map((s) => line("token", s, k.keys[s]))), hidden(kCanvas), hidden(pCanvas),
    cells(...keys.map((s, i) => line("number", s, scores[i].toFixed(2)))), cells(...weights));
  $("main").replaceChildren(...strips(values, chooseQuery), body);

  const largest = (list) => {
    return list.reduce((most, each) => each.reduce((m, v) => Math.max(m, Math.abs(v)), most), 1e-9);
  };
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
  const most = largest([...ks, q]);
  paint(qCanvas, [q], most, row);
  paint(kCanvas, ks, most, row);
  paint(pCanvas, products, largest(products), row);
  for (const canvas of [qCanvas, kCanvas, pCanvas]) {
    canvas.addEventListener("pointermove", (event) => {
      const d = clamp(Math.floor((event.offsetX / canvas.clientWidth) * k.d), 0, k.d - 1);
      const i = Math.min(keys.length - 1, Math.max(0, Math.floor(event.offsetY / row)));
      if (canvas === qCanvas) return say(token(k.queries[state.query]), `  q[${d}] = ${q[d].toFixed(3)}`);
      const factors = `q[${d}] ${q[d].toFixed(3)} × k[${d}] ${ks[i][d].toFixed(3)}`;
      say(token(k.keys[keys[i]]), `  ${factors} = ${products[i][d].toFixed(3)}`);
    });
  }
  say(...listed(values, k, state.query, state.head));
}

// Training view

let playing = null;
async function trainingView() {
  const r = meta.recorded, all = await frames(), k = { queries: r.labels, keys: r.labels };
  const last = r.steps.length - 1;
  const slider = element("input", {
    type: "range", min: 0, max: last, value: state.frame, "aria-label": "step of the training",
  });
  const play = element("button", { type: "button", text: "▶ play" }), label = element("b");
  const figures = r.heads.map((name) => {
    const canvas = element("canvas"), text = `layer ${name.replace(".", ", head ")}`;
    return { canvas, figure: element("figure", {}, element("figcaption", { text }), canvas) };
  });
  const player = element("div", { class: "player" }, play, slider, label);
  const grid = element("div", { class: "frames" }, ...figures.map((each) => each.figure));
  $("main").replaceChildren(player, grid);
  let cell = null;
  const values = (n) => all[state.frame * r.heads.length + n];
  const draw = () => {
    const loss = r.losses[state.frame];
    label.textContent = `step ${r.steps[state.frame].toLocaleString("en")}`
      + (loss === null ? "" : `, loss ${loss.toFixed(3)}`);
    slider.value = state.frame;
    slider.setAttribute("aria-valuetext", label.textContent);
    figures.forEach((each, n) => {
      each.find = drawMatrix(each.canvas, values(n), k, each.figure.clientWidth, cell);
    });
  };
  const stop = () => {
    clearInterval(playing);
    playing = null;
    play.textContent = "▶ play";
  };
  slider.addEventListener("input", () => {
    stop();
    state.frame = Number(slider.value);
    draw();
    remember();
  });
  play.addEventListener("click", () => {
    if (playing) return stop();
    if (state.frame === last) state.frame = 0;
    play.textContent = "❚❚ stop";
    draw();
    playing = setInterval(() => {
      if (!slider.isConnected || state.frame >= last) return stop();
      state.frame += 1;
      draw();
    }, clamp(8000 / r.steps.length, 60, 400));
  });
  figures.forEach((each, n) => {
    each.canvas.addEventListener("pointermove", (event) => {
      cell = each.find(event.offsetX, event.offsetY);
      draw();
      const where = `layer ${r.heads[n].replace(".", ", head ")}, step ${r.steps[state.frame]}`;
      if (cell) say(...cellText(values(n), k, cell, where));
    });
    each.canvas.addEventListener("pointerleave", () => {
      cell = null;
      draw();
    });
  });
  draw();
  say(`${r.steps.length} moments from step ${r.steps[0]} to ${r.steps[last]}`);
}
