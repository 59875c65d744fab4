// The views: lines for the chosen heads, one head as a matrix, all heads, one query in detail, a training.

// The place `data-i` of the token under the pointer, or null.
function placeOf(event) {
  const item = event.target.closest("[data-i]");
  return item ? Number(item.dataset.i) : null;
}

// Head view

let hover = null, pinned = null;
function headView(heads) {
  const k = kindNow(), { T, S } = k, row = k.long ? 17 : 22, height = row * Math.max(T, S);

  const column = (side, labels) => {
    const items = labels.map((text, i) => element("div", {
      class: "token", role: "option", id: `${side}-${i}`, "data-i": i, text, title: text,
      style: `height:${row}px`,
    }));
    const pin = (index) => {
      pinned = index === null ? null : { side, index };
      if (pinned && side === "query") state.query = index;
    };
    const here = () => (pinned?.side === side ? pinned.index : null);
    const list = element("div", {
      class: side === "query" ? "column left" : "column",
      tabindex: 0,
      role: "listbox",
      "aria-label": side === "query" ? k.rows : "looked at",
      onpointermove: (event) => {
        const index = placeOf(event);
        if (index !== null) point({ side, index });
      },
      onpointerleave: () => point(null),
      onclick: (event) => {
        const index = placeOf(event);
        if (index === null) return;
        pin(index === here() ? null : index);
        point({ side, index });
      },
      onkeydown: onKeys({ ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Escape: 0 }, (step) => {
        pin(step ? clamp((here() ?? (step > 0 ? -1 : labels.length)) + step, 0, labels.length - 1) : null);
        point(pinned);
        if (!step) return;
        list.setAttribute("aria-activedescendant", items[here()].id);
        items[here()].scrollIntoView({ block: "nearest" });
      }),
    }, ...items);
    return list;
  };

  const canvas = element("canvas", { "aria-hidden": "true" }), middle = div("", canvas);
  const left = column("query", k.queries), right = column("key", k.keys);
  const names = [div("column-name left", k.rows), div(), div("column-name", "looks at")];
  $("main").replaceChildren(div("columns", ...names, left, middle, right));
  const width = middle.clientWidth, context = sized(canvas, width, height);
  const least = threshold(heads, state.heads);

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

  // The weight between the token under the pointer and one of the other side.
  const weight = (head, i) => {
    return heads[head][hover.side === "query" ? hover.index * S + i : i * S + hover.index] / ONE;
  };

  // A stripe for each head, as strong as the weight between this token and the one under the pointer.
  function background(side, i, shown) {
    if (!hover || hover.side === side) return "";
    const part = 100 / shown.length, weights = shown.map((head) => lift(weight(head, i)));
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
      [...list.children].forEach((item, i) => {
        const active = hover?.side === side && hover.index === i, style = background(side, i, shown);
        item.classList.toggle("active", active);
        item.setAttribute("aria-selected", active);
        if (style || item.style.background) item.style.background = style;
      });
    }
    if (!hover) {
      return say(`layer ${state.layer}; ${shown.length} of ${k.heads} heads; lines for weights from ${least}`);
    }
    const query = hover.side === "query";
    if (!shown.length) return say(query ? "no head is chosen" : "");
    // The strongest weight of a query, or at a key; the first of equal ones.
    let best = { most: -1 };
    for (const head of shown) {
      for (const i of range(query ? S : T)) {
        const most = weight(head, i);
        if (most > best.most) best = { most, i, head };
      }
    }
    if (query) return sayQuery(heads[best.head], k, hover.index, best.head);
    say(token(k.keys[hover.index]), ` (${hover.index}) gets most attention from `, token(k.queries[best.i]),
      ` (${best.i}) in head ${best.head}: ${best.most.toFixed(3)}`);
  }

  hover = pinned;
  draw();
}

// The text; a token is darker where the chosen one looks at it

function strips(values) {
  const k = kindNow();
  const strip = (labels, tinted) => div("strip fixed", ...labels.map((text, i) => {
    const word = element("span", { class: "token", "data-i": i, text });
    if (tinted) {
      const value = values[state.query * k.S + i], at = shade(value), dark = at > 110;
      word.style.background = `rgb(${colours.ramp[at].join(" ")})`;
      if (dark === (document.documentElement.dataset.theme !== "dark")) word.style.color = "#fff";
      else if (dark) word.style.color = "#000";
      word.title = (value / ONE).toFixed(4);
    }
    return word;
  }));
  const choices = (tinted) => {
    const list = set(strip(k.queries, tinted), {
      class: "strip",
      tabindex: 0,
      role: "listbox",
      "aria-activedescendant": `word-${state.query}`,
      onclick: (event) => {
        const index = placeOf(event);
        if (index !== null) chooseQuery(index);
      },
      onkeydown: onKeys({ ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -k.T, End: k.T },
        (step) => chooseQuery(clamp(state.query + step, 0, k.T - 1), true)),
    });
    [...list.children].forEach((word, i) => set(word, { id: `word-${i}`, role: "option" }));
    const active = set(list.children[state.query], { class: "token active", "aria-selected": true });
    requestAnimationFrame(() => {
      list.scrollTop = active.offsetTop - list.offsetTop - list.clientHeight / 2;
    });
    return list;
  };
  const named = (name, list) => [div("strip-name", name), set(list, { "aria-label": k.rows })];
  if (k.same) return named("the framed token looks at:", choices(true));
  return [...named(`${k.rows}:`, choices(false)), ...named("looks at:", strip(k.keys, true))];
}

function chooseQuery(index, focus = false) {
  state.query = index;
  pinned = { side: "query", index };
  render().then(() => {
    if (focus) document.querySelector(".strip[tabindex]")?.focus();
  });
}

// Matrix view

function matrixView(heads) {
  const k = kindNow(), values = heads[state.head], where = headName(state.layer, state.head);
  const help = `weights of ${where}; the arrow keys move from cell to cell`;
  let cell = null, find = null;
  const draw = () => {
    find = drawMatrix(canvas, values, k, width, cell);
    if (cell) sayCell(values, k, cell, where);
    else sayQuery(values, k, state.query, state.head);
  };
  const mark = (next) => {
    if (next?.t === cell?.t && next?.s === cell?.s) return;
    cell = next;
    draw();
  };
  const steps = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
  const canvas = element("canvas", {
    tabindex: 0,
    role: "img",
    "aria-label": help,
    onpointermove: (event) => mark(find(event)),
    onpointerleave: () => mark(null),
    onclick: () => {
      if (cell) chooseQuery(cell.t);
    },
    onkeydown: onKeys(steps, ([dt, ds]) => {
      const { t, s } = cell ?? { t: state.query, s: 0 };
      mark({ t: clamp(t + dt, 0, k.T - 1), s: clamp(s + ds, 0, k.S - 1) });
    }),
  });
  const holder = div("", canvas);
  $("main").replaceChildren(...strips(values), holder);
  const width = holder.clientWidth;
  draw();
}

// Model view

let watcher = null;
function modelView() {
  const k = kindNow(), n = k.heads;
  const columns = Math.min(n, Math.max(4, Math.floor(($("main").clientWidth - 24) / 30)));
  const style = `grid-template-columns:repeat(${columns}, minmax(0, ${k.T > 60 ? 130 : 110}px))`;
  watcher?.disconnect();
  watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      fill(target);
    }
  }, { rootMargin: "200px" });
  const place = (button) => [Number(button.dataset.layer), Number(button.dataset.head)];
  const row = (name, options, cells) => {
    const line = element("div", { ...options, style }, ...cells);
    return div("layer-row", element("span", { text: name }), line);
  };
  const buttons = range(k.layers * n).map((i) => {
    const layer = Math.floor(i / n), head = i % n, title = headName(layer, head);
    const here = layer === state.layer && head === state.head;
    const button = element("button", {
      type: "button", class: here ? "thumb here" : "thumb", "aria-label": title, title,
      "data-layer": layer, "data-head": head, tabindex: here ? 0 : -1,
    }, element("canvas"));
    watcher.observe(button);
    return button;
  });
  const rows = range(k.layers).map((i) => row(i, { class: "thumbs" }, buttons.slice(i * n, (i + 1) * n)));
  if (columns === n) {
    const numbers = range(n).map((head) => element("span", { text: head }));
    rows.unshift(set(row("", { class: "head-numbers" }, numbers), { "aria-hidden": "true" }));
  }
  const describe = async (event) => {
    const button = event.target.closest(".thumb");
    if (!button) return;
    const [layer, head] = place(button), values = (await patterns(state.kind, layer))[head];
    say(describeHead(values, k, layer, head));
  };
  $("main").replaceChildren(element("div", {
    role: "group",
    "aria-label": "all heads",
    onpointerover: describe,
    onfocusin: describe,
    onclick: (event) => {
      const button = event.target.closest(".thumb");
      if (!button) return;
      [state.layer, state.head] = place(button);
      state.heads = new Set([state.head]);
      show(k.long ? "matrix" : "head");
    },
    onkeydown: onKeys({ ArrowRight: 1, ArrowLeft: -1, ArrowDown: n, ArrowUp: -n }, (step, { target }) => {
      const next = buttons[buttons.indexOf(target) + step];
      if (!next) return false;
      target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }),
  }, ...rows));
  say(`${k.layers} layers x ${n} heads, ${k.T} tokens`);

  async function fill(button) {
    const kind = state.kind, [layer, head] = place(button), heads = await patterns(kind, layer);
    if (!button.isConnected || kind !== state.kind) return;
    const side = Math.max(16, button.clientWidth), context = sized(button.firstChild, side, side);
    if (state.thumbs === "lines") {
      const least = k.T > 60 ? 0.08 : 0.04;
      return drawLines(context, heads, [head], k, side, side / Math.max(k.T, k.S), null, least);
    }
    drawPicture(context, heads[head], k, 0, 0, side, side, Math.round(side * pixelRatio()));
  }
}

// One line about a head: its mean attention to the first token, the token itself and the one before.
function describeHead(values, { same, T, S }, layer, head) {
  const title = headName(layer, head);
  if (!same || T <= 2) return title;
  const mean = (place) => {
    const sum = range(T).slice(2).reduce((total, t) => total + values[t * S + place(t)], 0);
    return (sum / (T - 2) / ONE).toFixed(2);
  };
  return `${title}: on average ${mean(() => 0)} on the first token, ${mean((t) => t)} on the token itself, `
    + `${mean((t) => t - 1)} on the one before`;
}

// Neuron view

async function neuronView(heads) {
  const k = kindNow(), values = heads[state.head], row = 20, mine = turn;
  if (k.scale === null) {
    const text = "This model's scores are not products of query and key, so there is nothing to show here.";
    $("main").replaceChildren(element("p", { class: "note", text }));
    return say();
  }
  const scale = Array.isArray(k.scale) ? k.scale[state.layer] : k.scale;
  const vector = await vectors(state.kind, state.layer);
  if (mine !== turn) return;
  const keys = range(k.causal ? state.query + 1 : k.S);
  const q = vector(state.head, state.query);
  const ks = keys.map((s) => vector(state.head, k.T + s));
  const products = ks.map((key) => key.map((v, d) => v * q[d]));

  const top = (...children) => div("top", ...children);
  const cells = (kind, write) => div("", ...keys.map((s) => {
    return set(div(`row ${kind}`, ...[write(s)].flat()), { style: `height:${row}px` });
  }));
  const hidden = (canvas) => element("div", { "aria-hidden": "true" }, canvas);
  const share = (s) => {
    const weight = values[state.query * k.S + s] / ONE;
    return [element("i", { style: `width:${(100 * weight).toFixed(2)}%` }), weight.toFixed(3)];
  };
  const score = (s) => (products[s].reduce((a, b) => a + b, 0) * scale).toFixed(2);
  const [qCanvas, kCanvas, pCanvas] = range(3).map(() => element("canvas"));
  let product = `q · k × ${scale.toPrecision(3)}`;
  if (scale === 1) product = "q · k";
  else if (Math.abs(scale * Math.sqrt(k.d) - 1) < 1e-6) product = "q · k / √d";
  $("main").replaceChildren(...strips(values), div("neurons",
    top("query ", token(k.queries[state.query])), top("q, and below it each k", qCanvas), top("q × k"),
    top(product), top("softmax"), cells("token", (s) => k.keys[s]), hidden(kCanvas), hidden(pCanvas),
    cells("number", score), cells("share", share)));

  const largest = (list) => {
    return list.reduce((most, each) => each.reduce((m, v) => Math.max(m, Math.abs(v)), most), 1e-9);
  };
  const paint = (canvas, rows, most) => {
    const width = canvas.parentElement.clientWidth, w = width / k.d;
    const context = sized(canvas, width, row * rows.length);
    context.strokeStyle = colours.line;
    rows.forEach((numbers, i) => {
      numbers.forEach((v, d) => {
        context.globalAlpha = Math.sqrt(Math.min(1, Math.abs(v) / most));
        context.fillStyle = v < 0 ? colours.negative : colours.positive;
        context.fillRect(d * w, i * row + 1, w, row - 2);
      });
      context.globalAlpha = 1;
      context.strokeRect(0.5, i * row + 1.5, width - 1, row - 3);
    });
    canvas.addEventListener("pointermove", (event) => {
      const d = clamp(Math.floor((event.offsetX / canvas.clientWidth) * k.d), 0, k.d - 1);
      const i = clamp(Math.floor(event.offsetY / row), 0, keys.length - 1);
      if (canvas === qCanvas) return say(token(k.queries[state.query]), `  q[${d}] = ${q[d].toFixed(3)}`);
      const factors = `q[${d}] ${q[d].toFixed(3)} × k[${d}] ${ks[i][d].toFixed(3)}`;
      say(token(k.keys[i]), `  ${factors} = ${products[i][d].toFixed(3)}`);
    });
  };
  const most = largest([...ks, q]);
  paint(qCanvas, [q], most);
  paint(kCanvas, ks, most);
  paint(pCanvas, products, largest(products));
  sayQuery(values, k, state.query, state.head);
}

// Training view

let playing = null;
async function trainingView() {
  const { steps, heads, losses, T } = recorded, last = steps.length - 1;
  const all = await once("r", (bytes) => matrices(bytes, steps.length * heads.length, T, T, true));
  let cell = null;
  const draw = () => {
    const loss = losses[state.frame];
    label.textContent = `step ${steps[state.frame].toLocaleString("en")}`
      + (loss === null ? "" : `, loss ${loss.toFixed(3)}`);
    slider.value = state.frame;
    slider.setAttribute("aria-valuetext", label.textContent);
    figures.forEach((each, n) => {
      each.find = drawMatrix(each.canvas, values(n), recorded, each.figure.clientWidth, cell);
    });
  };
  const stop = () => {
    clearInterval(playing);
    playing = null;
    play.textContent = "▶ play";
  };
  const slider = element("input", {
    type: "range", min: 0, max: last, value: state.frame, "aria-label": "step of the training",
    oninput: () => {
      stop();
      state.frame = Number(slider.value);
      draw();
      remember();
    },
  });
  const start = () => {
    if (playing) return stop();
    if (state.frame === last) state.frame = 0;
    play.textContent = "❚❚ stop";
    draw();
    playing = setInterval(() => {
      if (!slider.isConnected || state.frame >= last) return stop();
      state.frame += 1;
      draw();
    }, clamp(8000 / steps.length, 60, 400));
  };
  const play = element("button", { type: "button", text: "▶ play", onclick: start });
  const label = element("b");
  const values = (n) => all[state.frame * heads.length + n];
  const figures = heads.map((name, n) => {
    const text = headName(...name.split("."));
    const canvas = element("canvas", {
      onpointermove: (event) => {
        cell = figures[n].find(event);
        draw();
        if (cell) sayCell(values(n), recorded, cell, `${text}, step ${steps[state.frame]}`);
      },
      onpointerleave: () => {
        cell = null;
        draw();
      },
    });
    return { canvas, figure: element("figure", {}, element("figcaption", { text }), canvas) };
  });
  const frame = div("frames", ...figures.map((each) => each.figure));
  $("main").replaceChildren(div("player", play, slider, label), frame);
  draw();
  say(`${steps.length} moments from step ${steps[0]} to ${steps[last]}`);
}
