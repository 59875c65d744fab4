// The page of `lama serve`: chat, completion, and the inside of each generated token. Text of users and
// models enters the document by textContent alone; styles are set through the CSSOM, as the CSP demands.
"use strict";

const $ = (id) => document.getElementById(id);
const N_TOP = 10; // alternatives of a token
const MOST_SURPRISE = 6; // nats: the end of the colour scale

// Sets text, event handlers (on...), CSS variables (--...) and attributes; null leaves an attribute out.
function set(target, options) {
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") target.textContent = value;
    else if (name.startsWith("on")) target.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) target.style.setProperty(name, value);
    else if (value !== null) target.setAttribute(name, value);
  }
  return target;
}
function element(tag, options = {}, ...children) {
  const made = set(document.createElement(tag), options);
  made.append(...children);
  return made;
}
const button = (text, onclick) => element("button", { type: "button", class: "quiet", text, onclick });
const tell = (target, text) => set(target, { text }).toggleAttribute("hidden", !text);
const say = (id, text) => tell($(id), text);
const percent = (p) => (p < 0.0005 ? "<0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "▯";
// The result of an action that some browsers forbid, or null.
function tried(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

// The server

let model = {}; // of /v1/models: context, n_layers, n_heads, vocab_size, chat, internals

async function ask(path, body, signal) {
  const key = tried(() => sessionStorage.getItem("lama-key"));
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it running?");
  }
  if (response.ok) return response;
  const { status } = response;
  if (status === 401) $("key").hidden = false;
  const said = (await response.json().catch(() => null))?.error, after = response.headers.get("Retry-After");
  const text = said?.message ?? `The server answered with status ${status}.`;
  throw Object.assign(new Error(after ? `${text} Try again in ${after} s.` : text), { status });
}
const answerTo = async (path, body, signal) => (await ask(path, body, signal)).json();

// The events of a stream, up to [DONE]; each is one line of `data:`.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off: the connection was closed.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// The tokens of one choice of a stream: {id, text, logprob, top: [{id, text, logprob}], end}. Their texts
// joined are the choice's text; a part of a character has none.
function tokensOf(choice) {
  const text = choice.delta?.content ?? choice.text ?? "", ids = choice.token_ids ?? [];
  const said = choice.logprobs ?? {}, tops = said.top_logprobs;
  const entries = said.content ?? said.tokens?.map((token, i) => ({
    token,
    logprob: said.token_logprobs[i],
    top_logprobs: Object.entries(tops?.[i] ?? {}).map(([token, logprob]) => ({ token, logprob })),
  })) ?? [];
  const exact = entries.map((entry) => entry.token).join("") === text;
  return ids.map((id, i) => {
    const entry = entries[i] ?? {}, last = i === ids.length - 1;
    const top = (entry.top_logprobs ?? []).map(({ id, token, logprob }) => ({ id, text: token, logprob }));
    return {
      id,
      text: ids.length > 1 && exact ? entry.token : last ? text : "",
      name: entry.token ?? "",
      logprob: entry.logprob ?? null,
      top: top.sort((a, b) => b.logprob - a.logprob),
      end: last && choice.finish_reason === "stop" && !text,
    };
  });
}

// Groups that are one stop for the Tab key: arrows move to the nearest item

function roving(group, selector, move = () => {}) {
  group.addEventListener("keydown", (event) => {
    const items = [...group.querySelectorAll(selector)], at = items.indexOf(document.activeElement);
    if (at < 0) return;
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: items.length - 1 };
    const lines = { ArrowUp: -1, ArrowDown: 1 };
    let next = items[steps[event.key]];
    if (event.key in lines) next = beyond(items, at, lines[event.key]);
    else if (!(event.key in steps)) return;
    event.preventDefault();
    next?.focus();
    if (next) move(next);
  });
  group.addEventListener("focusin", ({ target }) => {
    if (target.matches(selector)) stopAt(group, target);
  });
}
function stopAt(group, item) {
  for (const each of group.querySelectorAll('[tabindex="0"]')) each.tabIndex = -1;
  item.tabIndex = 0;
}
// The closest item of the next line, or of the previous one.
function beyond(items, at, way) {
  const place = (item) => item.getClientRects()[0];
  const from = place(items[at]), across = (box) => Math.abs(box.x + box.width / 2 - from.x - from.width / 2);
  let best, line;
  for (let i = at + way; items[i]; i += way) {
    const box = place(items[i]);
    if (Math.abs(box.y - from.y) < 4) continue;
    if (line && Math.abs(box.y - line.y) > 4) break;
    line ??= box;
    if (!best || across(box) < across(place(best))) best = items[i];
  }
  return best;
}

// An answer: its tokens as elements, a strip of their surprise, and a line of facts and buttons

class Answer {
  // `prompt` fetches the ids before the answer; `given` is text shown before it.
  constructor(holder, prompt, { given = "", again = null } = {}) {
    Object.assign(this, { tokens: [], run: null, ask: prompt });
    const label = "Answer: arrows move between tokens, Enter opens one";
    this.text = element("span", { role: "listbox", "aria-label": label });
    const before = element("span", { class: "given", text: given });
    const whole = element("div", { class: "text" }, before, this.text);
    this.strip = element("div", { class: "strip", "aria-hidden": "true" });
    this.facts = element("span", { class: "soft" });
    this.more = button("Continue", () => proceed(this));
    this.more.hidden = true;
    const foot = element("div", { class: "foot" }, this.facts, this.more);
    if (again) foot.append(button("Regenerate", again));
    this.error = element("p", { class: "error", role: "alert", hidden: "" });
    this.element = element("article", { class: "answer" }, whole, this.strip, this.error, foot);
    holder.append(this.element);

    const find = (event) => event.target.closest(".token");
    for (const place of [this.text, this.strip]) {
      place.addEventListener("click", (event) => find(event) && open(this, Number(find(event).dataset.i)));
      const point = (on) => (event) => this.mark("pointed", find(event)?.dataset.i, on);
      set(place, { onpointerover: point(true), onpointerout: point(false) });
    }
    this.text.addEventListener("keydown", (event) => {
      if (!find(event) || !["Enter", " "].includes(event.key)) return;
      event.preventDefault();
      open(this, Number(find(event).dataset.i));
      $("panel").focus();
    });
    roving(this.text, ".token");
  }

  // The ids before the answer, fetched once.
  prompt() {
    this.asked ??= this.ask().catch((error) => {
      this.asked = null;
      throw error;
    });
    return this.asked;
  }
  ids(n = Infinity) {
    return this.tokens.slice(0, n).map((token) => token.id);
  }
  content() {
    return this.tokens.map((token) => token.text).join("");
  }
  elements(i) {
    return [this.text, this.strip].map((place) => place.querySelector(`[data-i="${i}"]`)).filter(Boolean);
  }
  mark(name, i, on) {
    for (const each of this.elements(i)) each.classList.toggle(name, on);
    if (name === "active") this.elements(i)[0]?.setAttribute("aria-selected", on);
  }

  add(token) {
    const i = this.tokens.push(token) - 1, surprise = -(token.logprob ?? 0);
    const look = { class: "token", "data-i": i, "--s": Math.min(1, surprise / MOST_SURPRISE).toFixed(3) };
    const word = element("span", { ...look, text: token.text, role: "option", tabindex: i ? -1 : 0 });
    if (token.end) set(word, { class: "token end", "aria-label": "end of the answer" });
    else if (!token.text) set(word, { class: "token part", "aria-label": "part of a character" });
    else if (/^[^\S\n]*\n/.test(token.text)) set(word, { class: "token line", "aria-label": "line break" });
    this.text.append(word);
    this.strip.append(element("span", look));
  }
  // Keep the first n tokens.
  cut(n) {
    for (let i = n; i < this.tokens.length; i++) this.elements(i).forEach((each) => each.remove());
    this.tokens.length = n;
    const first = this.text.querySelector(".token");
    if (first && !this.text.querySelector('[tabindex="0"]')) first.tabIndex = 0;
  }

  start(run) {
    this.run = run;
    tell(this.error, "");
    this.facts.textContent = "";
    this.element.classList.add("busy");
    this.more.hidden = true;
  }
  finish(reason, n, seconds) {
    this.element.classList.remove("busy");
    const surprises = this.tokens.filter((token) => token.logprob !== null).map((token) => -token.logprob);
    const mean = surprises.reduce((a, b) => a + b, 0) / surprises.length;
    const ends = { length: "max_tokens reached", context: "the context is full", stopped: "stopped" };
    const facts = [`${this.tokens.length} token${this.tokens.length === 1 ? "" : "s"}`];
    if (n > 1) facts.push(`${(n / seconds).toFixed(0)} per second`);
    if (surprises.length) facts.push(`mean surprise ${mean.toFixed(2)}`);
    if (ends[reason]) facts.push(ends[reason]);
    this.facts.textContent = this.tokens.length ? facts.join(" · ") : "";
    this.more.hidden = !this.tokens.length || ["stop", "context"].includes(reason);
  }
}

// Generating: one answer at a time

let running = null; // {controller, answer}

function stop() {
  running?.controller.abort();
  running = null;
  busy();
}
function busy() {
  for (const go of document.querySelectorAll(".go")) {
    go.dataset.name ??= go.textContent;
    go.textContent = running ? "Stop" : go.dataset.name;
    go.classList.toggle("stop", Boolean(running));
  }
}

async function generate(answer, path, body) {
  stop();
  const controller = new AbortController(), { signal } = controller;
  running = { controller, answer };
  busy();
  answer.start(controller);
  say("status", "Answering");
  let reason = "stopped", n = 0, first = 0;
  try {
    const request = { ...body, ...sampling(), stream: true };
    for await (const event of events(await ask(path, request, signal))) {
      const choice = event.choices?.[0];
      if (!choice || signal.aborted) continue;
      const follows = atEnd();
      const tokens = tokensOf(choice), text = choice.delta?.content ?? choice.text;
      tokens.forEach((token) => answer.add(token));
      if (!tokens.length && text) late(answer, text);
      if (!first && tokens.length) [first, n] = [performance.now(), -1]; // the rate excludes the first token
      n += tokens.length;
      if (choice.finish_reason) reason = choice.context_full ? "context" : choice.finish_reason;
      if (follows) toEnd();
    }
  } catch (error) {
    if (error.name !== "AbortError" && answer.run === controller) {
      tell(answer.error, error.message);
      reason = "failed";
    }
    controller.abort();
  }
  if (running?.controller === controller) {
    running = null;
    busy();
  }
  if (answer.run !== controller) return; // started again meanwhile
  answer.finish(reason, n, (performance.now() - first) / 1000);
  say("status", `Answer of ${answer.tokens.length} tokens finished`);
  if (!opened) return;
  describe();
  inside();
}
const page = document.documentElement;
const atEnd = () => page.scrollHeight - innerHeight - scrollY < 80;
const toEnd = () => scrollTo(0, page.scrollHeight);
// Text that was held back, without a token of its own, belongs to the last one.
function late(answer, text) {
  const i = answer.tokens.length - 1;
  if (i < 0) return answer.text.append(text);
  answer.tokens[i].text += text;
  answer.elements(i)[0].textContent = answer.tokens[i].text;
}

// Continue an answer, unchanged or with another token at position i.
async function proceed(answer, i = answer.tokens.length, alternative = null) {
  stop();
  try {
    const before = await answer.prompt();
    if (!answer.element.isConnected) return;
    if (alternative && alternative.id === undefined) alternative.id = await onlyToken(alternative.text);
    const turn = turns.findIndex((each) => each.answer === answer);
    if (turn >= 0) forget(turn + 1);
    const { top } = answer.tokens[i] ?? {};
    answer.cut(i);
    if (answer.tokens.at(-1)?.end) answer.cut(i - 1);
    if (alternative) answer.add({ ...alternative, text: shown(alternative.text), name: alternative.text, top });
    if (opened?.answer === answer) alternative ? open(answer, i) : close();
    if (alternative) answer.elements(i)[0].focus({ preventScroll: true });
    await generate(answer, "v1/completions", { prompt: [...before, ...answer.ids()], logprobs: N_TOP });
  } catch (error) {
    tell(answer.error, error.message);
  }
}
// The server writes a part of a character as bytes; in a text it is U+FFFD.
const shown = (text) => (/^bytes:(\\x[0-9a-f]{2})+$/.test(text) ? "\ufffd" : text);
async function onlyToken(text) {
  const { tokens } = await answerTo("tokenize", { prompt: text, add_special_tokens: false });
  if (tokens.length !== 1) throw new Error("This alternative is part of a character: it cannot be chosen.");
  return tokens[0];
}

function sampling() {
  const given = [...$("sampling").elements].filter((field) => field.name && field.value !== "");
  return Object.fromEntries(given.map((field) => [field.name, Number(field.value)]));
}
function valid() {
  if ($("sampling").checkValidity()) return true;
  $("settings").open = true;
  return $("sampling").reportValidity();
}

// Chat

const turns = []; // {role, element, text or answer}

function forget(from) {
  for (const turn of turns.splice(from)) {
    turn.element.remove();
    if (turn.answer && turn.answer === running?.answer) stop();
    if (turn.answer && turn.answer === opened?.answer) close();
  }
  $("chat-empty").hidden = $("new").hidden = true;
  (turns.length ? $("new") : $("chat-empty")).hidden = false;
}

function addUser(text) {
  const turn = { role: "user", text, element: element("div", { class: "user" }) };
  const bubble = element("div", { class: "bubble", text });
  const change = button("Edit", () => {
    const field = element("textarea", { rows: 2, "aria-label": "Message" });
    const back = () => turn.element.replaceChildren(bubble, change);
    const save = element("button", { class: "primary", text: "Send" });
    const form = element("form", { class: "composer" }, field, button("Cancel", back), save);
    turn.element.replaceChildren(form);
    field.value = text;
    composer(form, field, () => {
      forget(turns.indexOf(turn));
      send(field.value);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      back();
      change.focus();
    });
    field.focus();
  });
  turn.element.append(bubble, change);
  $("turns").append(turn.element);
  turns.push(turn);
}

function reply() {
  const system = $("system").value.trim();
  const messages = turns.map(({ role, text, answer }) => ({ role, content: answer?.content() ?? text }));
  if (system) messages.unshift({ role: "system", content: system });
  const again = () => {
    if (!valid()) return;
    forget(turns.findIndex((turn) => turn.answer === answer));
    reply();
  };
  const prompt = async () => (await answerTo("apply-template", { messages })).tokens;
  const answer = new Answer($("turns"), prompt, { again });
  turns.push({ role: "assistant", answer, element: answer.element });
  generate(answer, "v1/chat/completions", { messages, logprobs: true, top_logprobs: N_TOP });
}

function send(text) {
  addUser(text);
  forget(turns.length); // shows what belongs to a conversation
  reply();
  toEnd();
}

// Completion

async function complete(text) {
  close();
  $("output").replaceChildren();
  const prompt = async () => (await answerTo("tokenize", { prompt: text })).tokens;
  const answer = new Answer($("output"), prompt, { given: text, again: () => valid() && complete(text) });
  await proceed(answer);
}

// A form that Enter sends; while an answer runs, its main button stops it.
function composer(form, field, act) {
  const grow = () => {
    field.style.setProperty("height", "auto");
    field.style.setProperty("height", `${field.scrollHeight + 2}px`);
  };
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running || !form.querySelector(".go")) form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running && form.querySelector(".go")) return stop();
    if (!field.value.trim() || !valid()) return;
    act();
    grow();
  });
}

// The panel: one token

let opened = null; // {answer, i}
let asking = null; // the AbortController of its requests
let weights = null; // the answer of /v1/attention, and its heads in one list
let head = ""; // the key of the chosen head, or "" for the mean

function open(answer, i) {
  opened?.answer.mark("active", opened.i, false);
  asking?.abort();
  opened = { answer, i };
  const token = answer.tokens[i];
  answer.mark("active", i, true);
  const [word] = answer.elements(i);
  stopAt(answer.text, word);
  document.body.classList.add("open");
  $("panel").hidden = false;
  $("panel").scrollTop = 0;
  word.scrollIntoView({ block: "nearest" });
  $("panel-name").replaceChildren("Token ", element("code", { text: visible(token.text || token.name) }));
  const listed = [...token.top];
  const known = token.logprob === null || listed.some((each) => same(each, token));
  if (!known) listed.push({ ...token, text: token.name });
  const items = listed.map((each, n) => element("li", {}, alternative(each, n, token)));
  $("alternatives").replaceChildren(...items);
  describe();
  inside();
}
function describe() {
  const { answer: { tokens }, i } = opened, token = tokens[i], { logprob } = token;
  const facts = [`${i + 1} of ${tokens.length}`, `id ${token.id}`];
  if (logprob !== null) {
    facts.push(`probability ${percent(Math.exp(logprob))}`, `surprise ${(-logprob).toFixed(2)} nats`);
  }
  const rank = token.top.findIndex((each) => same(each, token));
  if (logprob !== null) facts.push(rank < 0 || rank >= N_TOP ? `rank above ${N_TOP}` : `rank ${rank + 1}`);
  say("facts", facts.join(" · "));
  $("previous").disabled = i === 0;
  $("next").disabled = i === tokens.length - 1;
}
const same = (each, token) => (each.id === undefined ? each.text === token.name : each.id === token.id);

function alternative(each, n, token) {
  const p = Math.exp(each.logprob), chosen = same(each, token), { answer, i } = opened;
  const look = { type: "button", "--w": p.toFixed(4), tabindex: n ? -1 : 0, "aria-current": chosen || null };
  const onclick = () => !chosen && valid() && proceed(answer, i, each);
  const parts = [visible(each.text), percent(p)].map((text) => element("span", { text }));
  return element("button", { ...look, onclick }, ...parts);
}

function close() {
  if (!opened) return;
  asking?.abort();
  const { answer, i } = opened;
  opened = null;
  answer.mark("active", i, false);
  document.body.classList.remove("open");
  if ($("panel").contains(document.activeElement)) answer.elements(i)[0]?.focus();
  $("panel").hidden = true;
}

// Attention and lens at the position before the opened token, which predicts it.
async function inside() {
  asking?.abort();
  const { answer, i } = opened, { signal } = (asking = new AbortController());
  $("attention").hidden = $("lens").hidden = true;
  const both = (text) => ["attention-note", "lens-note"].forEach((id) => say(id, text));
  if (model.internals === false) return both("Activations are switched off on this server (--no-internals).");
  if (running) return both("Available when the answer is finished.");
  both("Computing …");
  const part = async (name, body, draw) => {
    try {
      const found = await answerTo(`v1/${name}`, body, signal);
      say(`${name}-note`, "");
      $(name).hidden = false;
      draw(found);
    } catch (error) {
      if (!signal.aborted) say(`${name}-note`, error.message);
    }
  };
  try {
    const prompt = [...(await answer.prompt()), ...answer.ids(i)];
    if (signal.aborted) return;
    await part("attention", { prompt }, drawAttention);
    const { id } = answer.tokens[i];
    await part("lens", { prompt, answer: id, k: 5 }, (found) => drawLens(found, id));
  } catch (error) {
    if (!signal.aborted) both(error.message);
  }
}

function drawAttention(found) {
  const cell = (key, text, name) => element("button", {
    type: "button", role: "radio", text, class: name, "data-key": key, tabindex: -1,
  });
  const heads = found.layers.flatMap(({ layer, heads }) => heads.map((each) => ({
    layer,
    name: `layer ${layer}, head ${each.head}`,
    weights: each.weights,
    cell: cell(`${layer}.${each.head}`, "", null),
  })));
  const n = found.layers[0].heads.length;
  const label = (each, i) => (i % n ? [] : [element("span", { text: each.layer })]);
  const cells = heads.flatMap((each, i) => [...label(each, i), each.cell]);
  weights = { ...found, heads };
  set($("heads"), { "--heads": n }).replaceChildren(cell("", "mean of all heads", "mean"), ...cells);
  drawCells();
}

function drawCells() {
  const measure = $("measure").value;
  for (const { cell, name, weights: row } of weights.heads) {
    const most = Math.max(0, ...row.slice(measure === "beyond" ? 1 : 0));
    const entropy = -row.reduce((sum, w) => sum + (w > 0 ? w * Math.log(w) : 0), 0);
    const spread = [entropy / (Math.log(row.length) || 1), `${entropy.toFixed(2)} nats`];
    const [shade, text] = measure === "entropy" ? spread : [most, most.toFixed(2)];
    cell.title = `${name}: ${text}`;
    set(cell, { "--w": shade.toFixed(3), "aria-label": cell.title });
  }
  drawLooked();
}

// The text, shaded by the weights of the chosen head or by their mean.
function drawLooked() {
  const { heads, texts, position } = weights, beyond = $("measure").value === "beyond";
  const one = heads.find((each) => each.cell.dataset.key === head), shown = one ? [one] : heads;
  const row = texts.map((_, i) => shown.reduce((sum, each) => sum + each.weights[i], 0) / shown.length);
  if (beyond) row[0] = 0;
  const most = Math.max(...row), whole = beyond ? most || 1 : 1; // the strongest of the others is 1
  for (const cell of $("heads").querySelectorAll("button")) {
    const chosen = cell.dataset.key === (one ? head : "");
    cell.setAttribute("aria-checked", chosen);
    if (chosen) stopAt($("heads"), cell);
  }
  const best = row.indexOf(most), who = one ? one.name : "mean of all heads";
  say("head-facts", `${who}: most attention to ${visible(texts[best])} (token ${best}, weight ${most.toFixed(2)})`);
  $("looked").replaceChildren(...row.map((w, i) => element("span", {
    text: texts[i],
    title: `${i}: ${w.toFixed(3)}`,
    class: i === position ? "query" : null,
    "--w": ((w / whole) ** ($("faint").checked ? 0.5 : 1)).toFixed(3),
  })));
}

function drawLens({ layers }, answer) {
  const head = ["layer", "this token", "rank", "most likely next"].map((text, i) => {
    return element("th", { scope: "col", text, colspan: i === 3 ? layers[0].top.length : 1 });
  });
  const name = (stage) => stage.replace(/^blocks\.(\d+)\..*/, "layer $1");
  const rows = layers.map((layer) => element("tr", {},
    element("th", { scope: "row", text: layer === layers.at(-1) ? "output" : name(layer.name) }),
    element("td", { class: "value", text: percent(layer.answer_probability) }),
    element("td", { class: "value", text: layer.answer_rank }),
    ...layer.top.map((each) => element("td", {
      class: each.token === answer ? "guess same" : "guess",
      "--w": each.probability.toFixed(3),
      title: percent(each.probability),
      text: visible(each.text),
    }))));
  $("lens").firstElementChild.replaceChildren(element("tr", {}, ...head), ...rows);
}

// The page

function show(name) {
  if (name === "chat" && model.chat === false) return;
  close();
  for (const each of ["chat", "completion"]) {
    const chosen = each === name;
    $(each).hidden = !chosen;
    set($(`tab-${each}`), { "aria-selected": chosen, tabindex: chosen ? 0 : -1 });
  }
  $("system-label").hidden = name !== "chat";
  $("new").hidden = name !== "chat" || !turns.length;
}

function summarise() {
  const values = sampling();
  $("temperature-value").textContent = values.temperature.toFixed(2);
  $("chosen").textContent = Object.entries(values).map((each) => each.join(" ")).join(" · ");
}

// Asks for the model until the server has loaded it.
async function load() {
  try {
    const { data: [found] } = await answerTo("v1/models");
    model = found.meta;
    $("key").hidden = true;
    say("error", "");
    document.title = `${found.id} · lama`;
    $("name").textContent = `lama · ${found.id}`;
    const { n_layers, n_heads, context } = model;
    say("about", `${n_layers} layers of ${n_heads} heads · context ${context.toLocaleString("en")}`);
    $("no-chat").hidden = model.chat !== false;
    if (model.chat === false) {
      set($("tab-chat"), { "aria-disabled": true, title: $("no-chat").textContent });
      show("completion");
    }
  } catch (error) {
    say("error", error.message);
    if (error.status === 503) setTimeout(load, 1000);
  }
  page.dataset.ready = "true";
}

function start() {
  const system = matchMedia("(prefers-color-scheme: dark)"), name = "lama-theme";
  page.dataset.theme = tried(() => localStorage.getItem(name)) ?? "";
  $("theme").addEventListener("click", () => {
    const dark = page.dataset.theme ? page.dataset.theme === "dark" : system.matches;
    page.dataset.theme = dark ? "light" : "dark";
    tried(() => localStorage.setItem(name, page.dataset.theme));
  });
  show("chat");
  for (const each of ["chat", "completion"]) $(`tab-${each}`).addEventListener("click", () => show(each));
  roving($("tabs"), "[role=tab]", (tab) => tab.click());
  roving($("alternatives"), "button");
  roving($("heads"), "button", (cell) => cell.click());
  composer($("chat-form"), $("message"), () => {
    const text = $("message").value;
    $("message").value = "";
    send(text);
  });
  composer($("completion-form"), $("prompt"), () => complete($("prompt").value));
  $("new").addEventListener("click", () => {
    forget(0);
    $("message").focus();
  });
  $("sampling").addEventListener("input", summarise);
  $("sampling").addEventListener("submit", (event) => event.preventDefault());
  $("key").addEventListener("submit", (event) => {
    event.preventDefault();
    tried(() => sessionStorage.setItem("lama-key", $("key-field").value));
    $("key-field").value = "";
    load();
  });
  $("close").addEventListener("click", close);
  $("previous").addEventListener("click", () => open(opened.answer, opened.i - 1));
  $("next").addEventListener("click", () => open(opened.answer, opened.i + 1));
  $("measure").addEventListener("change", drawCells);
  $("faint").addEventListener("change", drawLooked);
  $("heads").addEventListener("click", (event) => {
    const cell = event.target.closest("button");
    if (!cell) return;
    head = cell.dataset.key;
    drawLooked();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (running) stop();
    else close();
  });
  summarise();
  load();
}

start();
