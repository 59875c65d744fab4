// The controls, the choice of the view, and its address.

const VIEWS = {
  head: {
    help: "Lines from each token to those it looks at; each head has a colour. Point at a token to see only "
      + "its lines; click to keep them. Double-click a head to see only that one.",
    uses: ["kind", "layer", "heads", "all", "faint"],
    draw: headView,
  },
  matrix: {
    help: "One head: a row for each token, darker where it looks. Point at a cell, or move with the arrow "
      + "keys. Click to choose the token.",
    uses: ["kind", "layer", "heads", "faint", "legend"],
    draw: matrixView,
  },
  model: {
    help: "All heads: layers downwards, heads across. Click on one to open it.",
    uses: ["kind", "thumbs", "faint", "legend"],
    draw: modelView,
  },
  neuron: {
    help: "How one token's weights are computed: its query times each key, summed, then the softmax. "
      + "Choose the token in the text.",
    uses: ["kind", "layer", "heads", "faint", "legend"],
    draw: neuronView,
  },
  training: {
    help: "The same sentence during the training: move the slider, or press play.",
    uses: ["faint", "legend"],
    draw: trainingView,
  },
};

function controls() {
  const { uses, help } = VIEWS[state.view], single = state.view !== "head";
  for (const name of ["kind", "layer", "heads", "all", "thumbs", "faint", "legend"]) {
    const hidden = !uses.includes(name) || (name === "kind" && kinds.length < 2);
    ($(`${name}-label`) ?? $(name)).hidden = hidden;
  }
  $("heads-word").textContent = single ? "head" : "heads";
  $("faint").checked = state.faint;
  $("legend").title = state.faint ? "the square root of the weight" : "the weight";
  for (const tab of $("tabs").children) {
    const chosen = tab.dataset.view === state.view;
    set(tab, { "aria-selected": chosen, tabindex: chosen ? 0 : -1 });
  }
  $("help").textContent = help;
  if (!kinds.length) return;
  const k = kindNow(), holder = $("heads");
  $("kind").value = state.kind;
  $("layer").replaceChildren(...range(k.layers).map((i) => option(i, i)));
  $("layer").value = state.layer;
  holder.setAttribute("role", single ? "radiogroup" : "group");
  if (holder.children.length !== k.heads) {
    holder.replaceChildren(...range(k.heads).map((head) => element("button", {
      type: "button", "data-head": head, "aria-label": `head ${head}`, text: head,
    })));
  }
  [...holder.children].forEach((button, head) => {
    button.style.setProperty("--c", headColour(head));
    for (const name of ["role", "aria-checked", "aria-pressed"]) button.removeAttribute(name);
    if (single) set(button, { role: "radio", "aria-checked": head === state.head });
    else button.setAttribute("aria-pressed", state.heads.has(head));
  });
}

let turn = 0;
async function render() {
  const mine = ++turn;
  controls();
  remember();
  const { uses, draw } = VIEWS[state.view];
  const heads = uses.includes("layer") ? await patterns(state.kind, state.layer) : null;
  if (mine === turn) await draw(heads);
}

function show(view) {
  clearInterval(playing);
  playing = null;
  state.view = view;
  return render();
}

function chooseKind(kind) {
  state.kind = kind;
  const k = kindNow();
  state.layer = Math.min(state.layer, k.layers - 1);
  state.head = Math.min(state.head, k.heads - 1);
  state.heads = new Set(k.long ? [state.head] : range(k.heads)); // a long text has too many lines for all
  state.query = Math.min(state.query ?? Infinity, k.T - 1);
  pinned = hover = null;
}

// The result of an action that some browsers forbid for files, or null.
function tried(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

// The address names what is shown, so that links and the browser's history work.
function remember() {
  const { view, kind, layer, head, query, frame } = state;
  const words = Object.entries({ pin: pinned?.side ?? null, view, kind, layer, head, query, frame });
  const given = new URLSearchParams(words.filter(([, value]) => value !== null));
  tried(() => history.replaceState(null, "", `#${given}`));
}
function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  const number = (name, n) => {
    const value = Number(words.get(name) ?? NaN);
    return Number.isInteger(value) && value >= 0 && value < n ? value : null;
  };
  if (views.includes(words.get("view"))) state.view = words.get("view");
  if (recorded) state.frame = number("frame", recorded.steps.length) ?? recorded.steps.length - 1;
  if (!kinds.length) return;
  chooseKind(number("kind", kinds.length) ?? state.kind);
  const k = kindNow(), head = number("head", k.heads);
  state.layer = number("layer", k.layers) ?? state.layer;
  state.query = number("query", k.T) ?? state.query;
  if (head !== null) state.head = head;
  if (words.get("pin") === "query" && state.query !== null) pinned = { side: "query", index: state.query };
  if (meta.start.head !== null || state.heads.size === 1) state.heads = new Set([state.head]);
}

function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  let chosen = tried(() => localStorage.getItem("lama-theme"));
  const use = () => {
    root.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
    readColours();
  };
  use();
  dark.addEventListener("change", () => {
    use();
    render();
  });
  $("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    tried(() => localStorage.setItem("lama-theme", chosen));
    use();
    render();
  });
}

function start() {
  startTheme();
  for (const view of views) {
    const text = view[0].toUpperCase() + view.slice(1), onclick = () => show(view);
    $("tabs").append(element("button", { type: "button", role: "tab", "data-view": view, text, onclick }));
  }
  $("tabs").addEventListener("keydown", onKeys({ ArrowRight: 1, ArrowLeft: -1 }, (step) => {
    const next = views[(views.indexOf(state.view) + step + views.length) % views.length];
    show(next);
    $("tabs").querySelector(`[data-view="${next}"]`).focus();
  }));
  kinds.forEach((k, i) => $("kind").append(option(i, k.name)));
  const on = (id, type, change) => $(id).addEventListener(type, (event) => {
    change(event.target, event.detail);
    render();
  });
  on("kind", "change", ({ value }) => chooseKind(Number(value)));
  on("layer", "change", ({ value }) => { state.layer = Number(value); });
  on("faint", "change", ({ checked }) => { state.faint = checked; });
  on("thumbs", "change", ({ value }) => { state.thumbs = value; });
  on("all", "click", () => {
    const n = kindNow().heads;
    state.heads = new Set(range(state.heads.size === n ? 0 : n));
  });
  on("heads", "click", (target, clicks) => {
    const head = Number(target.closest("button")?.dataset.head ?? NaN);
    if (Number.isNaN(head)) return;
    if (state.view !== "head") state.head = head;
    else if (clicks === 2) state.heads = new Set([head]);
    else if (!state.heads.delete(head)) state.heads.add(head);
    if (state.heads.has(head)) state.head = head;
  });
  $("footer").textContent = meta.notes;
  if (!("DecompressionStream" in window)) {
    const text = "This browser is too old to unpack the numbers. Use one from 2023 or later.";
    $("main").replaceChildren(element("p", { class: "note", text }));
    return;
  }
  state.faint = Math.max(...(recorded ? [recorded] : kinds).flatMap((k) => [k.T, k.S])) > 48;
  recall();
  let width = $("main").clientWidth, timer = 0;
  new ResizeObserver(() => {
    if (Math.abs($("main").clientWidth - width) < 2) return;
    width = $("main").clientWidth;
    clearTimeout(timer);
    timer = setTimeout(render, 80);
  }).observe($("main"));
  render().then(() => { document.documentElement.dataset.ready = "true"; });
}

start();
