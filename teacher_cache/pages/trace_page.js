// Joins the controls: which trace, its colours, lead span, search and keys.

const at = (id) => document.getElementById(id);
const text = new TokenText(at("tokens"));
const strip = new Strip(at("strip"), (t) => text.select(t));
let trace = null;
let hits = [];

text.onPoint = (t) => showDetail(at("detail"), trace, t);
text.onScroll = (first, end) => strip.showWindow(first, end);

async function openTrace(number, token = 0) {
  try {
    trace = await unpackTrace(number);
  } catch (error) {
    at("failure").hidden = false;
    at("failure").textContent =
      `This trace cannot be unpacked (${error.message}): the page is damaged, or the browser is older than 2023.`;
    throw error;
  }
  at("trace").value = number;
  const fields = JSON.stringify({ finish_reason: trace.finish_reason, ...trace.fields }, null, 1);
  at("fields").textContent = fields.split("\n").map(visible).join("\n");
  text.keep = keptTokens();
  text.hits.clear();
  strip.draw(trace, text.quantity, text.keep);
  text.show(trace);
  search();
  showSpan();
  showSections();
  text.select(token);
  document.body.dataset.shown = number; // for whoever waits for it
}

// max(1, floor(n * lead span)), in whole percents.
function keptTokens() {
  return Math.max(1, Math.floor((trace.n_total * Number(at("span").value)) / 100));
}

function showSpan() {
  const percent = Number(at("span").value);
  const keep = (text.keep = keptTokens());
  const held = Math.min(keep, trace.num_tokens);
  const share = trace.entropyBefore[held] / (trace.entropyBefore[trace.num_tokens] || 1);
  const bytes = page.bytes_before[percent - 1];
  const whole = page.bytes_before.findLast((size) => size !== null);
  const read = bytes === null ? "more than the cache holds" : `${byteText(bytes)} of ${byteText(whole)}`;
  at("span-holds").value =
    `${(percent / 100).toFixed(2)}: ${countText(keep)} of ${countText(trace.n_total)} tokens, ` +
    `${percentText(share)} of this trace's entropy; of the whole cache a run reads ${read}`;
  text.paint();
  strip.draw(trace, text.quantity, keep);
  text.draw();
}

function showScale() {
  const { from, unit } = QUANTITIES[text.quantity];
  const marks = from.map((value, i) => make("span", { class: `heat-${i + 1}` }, `≥ ${value}`));
  at("scale").replaceChildren(...marks, make("span", {}, unit));
}

function showSections() {
  const bounds = [0, trace.cot_start, trace.answer_start, trace.n_total];
  const buttons = [0, 1, 2].map((number) => {
    const count = bounds[number + 1] - bounds[number];
    const button = make("button", { type: "button" }, `${SECTIONS[number]}: ${countText(count)}`);
    button.disabled = count === 0 || bounds[number] >= trace.num_tokens;
    button.addEventListener("click", () => text.select(bounds[number]));
    return button;
  });
  at("sections").replaceChildren(...buttons);
}

// The next token, in a direction, among the darkest two colours that the trace has.
function jumpToPeak(direction) {
  let darkest = 0;
  for (let t = 0; t < trace.num_tokens; t++) darkest = Math.max(darkest, heatOf(trace, text.quantity, t));
  for (let t = text.current + direction; t >= 0 && t < trace.num_tokens; t += direction) {
    const heat = heatOf(trace, text.quantity, t);
    if (heat > 0 && heat >= darkest - 1) return text.select(t);
  }
}

// Places where the text holds what is looked for, also across tokens.
function search() {
  const wanted = at("search").value;
  hits = [];
  text.hits.clear();
  if (wanted) {
    const ends = [];
    let all = "";
    for (let t = 0; t < trace.num_tokens; t++) ends.push((all += page.texts[trace.token[t]]).length);
    let t = 0;
    for (const found of all.matchAll(new RegExp(wanted.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "giu"))) {
      while (ends[t] <= found.index) t++;
      hits.push(t);
      for (let part = t; part === t || ends[part - 1] < found.index + found[0].length; part++) text.hits.add(part);
    }
  }
  at("hits").textContent = wanted ? `${countText(hits.length)} found` : "";
  text.paint();
}

function jumpToHit(direction) {
  const later = hits.filter((t) => (t - text.current) * direction > 0);
  const next = direction > 0 ? later[0] ?? hits[0] : later.at(-1) ?? hits.at(-1);
  if (next !== undefined) text.select(next);
}

const rowStep = (rows) => {
  const row = text.rowOf(text.current);
  const column = text.current - text.starts[row];
  const target = Math.max(0, Math.min(text.starts.length - 1, row + rows));
  text.select(Math.min(text.starts[target] + column, Math.max(text.starts[target], text.rowEnd(target) - 1)));
};
const KEYS = {
  ArrowLeft: () => text.select(text.current - 1),
  ArrowRight: () => text.select(text.current + 1),
  ArrowUp: () => rowStep(-1),
  ArrowDown: () => rowStep(1),
  PageUp: () => rowStep(-20),
  PageDown: () => rowStep(20),
  Home: () => text.select(0),
  End: () => text.select(trace.num_tokens - 1),
  n: () => jumpToPeak(1),
  p: () => jumpToPeak(-1),
};

at("tokens").addEventListener("keydown", (event) => {
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act();
});
at("trace").append(...page.traces.map((one, number) => {
  const name = visible(one.id.length > 60 ? `${one.id.slice(0, 60)}…` : one.id);
  return make("option", { value: number }, `${name} (${countText(one.n_total)} tokens)`);
}));
for (const [name, { label }] of Object.entries(QUANTITIES)) {
  if (name !== "kl" || page.traces.some((one) => one.has_student)) {
    at("quantity").append(make("option", { value: name }, label));
  }
}
at("trace").addEventListener("change", () => openTrace(Number(at("trace").value)));
at("quantity").addEventListener("change", () => {
  text.quantity = at("quantity").value;
  showScale();
  showSpan();
});
at("span").addEventListener("input", showSpan);
at("search").addEventListener("input", search);
at("search").addEventListener("keydown", (event) => event.key === "Enter" && jumpToHit(event.shiftKey ? -1 : 1));
at("next-hit").addEventListener("click", () => jumpToHit(1));
at("previous-hit").addEventListener("click", () => jumpToHit(-1));
at("next-peak").addEventListener("click", () => jumpToPeak(1));
at("previous-peak").addEventListener("click", () => jumpToPeak(-1));
for (const button of document.querySelectorAll("button[data-trace]")) {
  button.addEventListener("click", async () => {
    const [number, token] = [Number(button.dataset.trace), Number(button.dataset.token)];
    if (number === trace.number) text.select(token);
    else await openTrace(number, token);
    at("tokens").scrollIntoView({ block: "nearest" });
    at("tokens").focus();
  });
}
// On a phone the text comes first, and what is set or said about it is folded; a wide screen has room.
const narrow = matchMedia("(max-width: 50rem)");
function fold() {
  for (const part of document.querySelectorAll(".fold")) part.open = !narrow.matches;
  if (narrow.matches) at("settings").append(at("sections"));
  else at("at-hand").insertBefore(at("sections"), at("previous-peak"));
}
narrow.addEventListener("change", fold);
fold();
text.quantity = page.traces.some((one) => one.has_student) ? "kl" : "entropy";
at("quantity").value = text.quantity;
showScale();
openTrace(0);
