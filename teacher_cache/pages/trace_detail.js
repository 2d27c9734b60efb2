// The panel of one token, and the strip of the whole trace.

const FEW_ENTRIES = 12;
const STRIP_COLUMNS = 500;
const SVG = "http://www.w3.org/2000/svg";

function percentText(share) {
  const percent = 100 * share;
  if (percent > 0 && percent < 0.001) return "< 0.001 %";
  return `${percent >= 10 ? percent.toFixed(1) : percent.toPrecision(2)} %`;
}

function knownText(share) {
  return Number.isNaN(share) ? "not known" : percentText(share);
}

function countText(number) {
  return number.toLocaleString("en");
}

function byteText(bytes) {
  const prefix = bytes >= 1e9 ? [1e9, "GB"] : bytes >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(bytes / prefix[0]).toPrecision(3)} ${prefix[1]}`;
}

function showDetail(panel, trace, t, showsAll = false) {
  const place = `${countText(t)} of ${countText(trace.n_total)} (after ${percentText(t / trace.n_total)})`;
  const facts = [["place", place], ["section", SECTIONS[sectionOf(trace, t)]]];
  facts.push(["token id", String(page.ids[trace.token[t]])]);
  if (trace.k[t]) {
    facts.push([QUANTITIES.entropy.label, `${trace.entropy[t].toFixed(3)} nats`]);
    facts.push([QUANTITIES.surprise.label, `${trace.surprise[t].toFixed(3)} nats`]);
    facts.push(["kept entries", String(trace.k[t])]);
    if (trace.kl) facts.push([QUANTITIES.kl.label, `${trace.kl[t].toFixed(4)} nats`]);
  }
  const list = make("dl");
  for (const [name, value] of facts) list.append(make("dt", {}, name), make("dd", {}, value));
  panel.replaceChildren(make("h2", {}, named(page.texts[trace.token[t]])), list);
  if (!trace.k[t]) panel.append(make("p", {}, "There is no distribution for this token."));
  else panel.append(entryTable(panel, trace, t, showsAll));
}

function entryTable(panel, trace, t, showsAll) {
  const head = make("tr", {}, make("th", {}, "kept entry"), make("th", {}, "teacher"));
  if (trace.kl) head.append(make("th", {}, "student"));
  head.append(make("td", { class: "bars", "aria-hidden": "true" }));
  const body = make("tbody");
  const [first, end] = [trace.first[t], trace.first[t + 1]];
  let last = showsAll ? end : Math.min(end, first + FEW_ENTRIES);
  if (end - last === 1) last = end;
  let restOfTeacher = 0;
  for (let e = first; e < end; e++) {
    const isChosen = trace.entry[e] === trace.token[t];
    const p = Math.exp(trace.logprob[e]);
    if (e >= last && !isChosen) {
      restOfTeacher += p;
      continue;
    }
    const q = trace.kl ? Math.exp(-trace.studentSteps[e] * STEP_NATS) : null;
    body.append(entryRow(named(page.texts[trace.entry[e]]), p, q, isChosen ? "chosen" : "entry"));
  }
  const tailOfStudent = trace.kl ? Math.exp(trace.studentTail[t]) : null;
  body.append(entryRow("all others", trace.tail[t], tailOfStudent, "tail"));
  const table = make("table", {}, make("thead", {}, head), body);
  if (last === end) return table;
  const words = `Show all ${trace.k[t]} entries (${percentText(restOfTeacher)} more)`;
  const button = make("button", { type: "button" }, words);
  button.addEventListener("click", () => showDetail(panel, trace, t, true));
  return make("div", {}, table, button);
}

function entryRow(name, teacher, student, kind) {
  const bars = make("td", { class: "bars", "aria-hidden": "true" });
  for (const [share, who] of [[teacher, "teacher"], [student, "student"]]) {
    if (share === null || Number.isNaN(share)) continue;
    const bar = make("i", { class: who });
    bar.style.width = `${100 * share}%`;
    bars.append(bar);
  }
  const row = make("tr", { class: kind }, make("td", { title: name }, name), make("td", {}, knownText(teacher)));
  if (student !== null) row.append(make("td", {}, percentText(student)));
  row.append(bars);
  return row;
}

class Strip {
  constructor(svg, onJump) {
    this.svg = svg;
    const jump = (event) => {
      const box = svg.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      onJump(Math.round(Math.max(0, Math.min(1, share)) * (this.numTokens - 1)));
    };
    svg.addEventListener("pointerdown", (event) => {
      svg.setPointerCapture(event.pointerId);
      jump(event);
    });
    svg.addEventListener("pointermove", (event) => event.buttons && jump(event));
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: -10, PageDown: 10 };
      const step = steps[event.key];
      if (step === undefined) return;
      event.preventDefault();
      onJump(Math.round(this.first + (step * this.numTokens) / 100));
    });
  }

  // The largest value in each of some hundred columns, its square root as height.
  draw(trace, quantity, keep) {
    const m = (this.numTokens = trace.num_tokens);
    const at = (t) => (1000 * t) / m;
    const { from } = QUANTITIES[quantity];
    const highest = from[from.length - 1];
    const numColumns = Math.min(m, STRIP_COLUMNS);
    let path = "M0 64";
    for (let c = 0; c < numColumns; c++) {
      const [begin, end] = [Math.floor((c * m) / numColumns), Math.floor(((c + 1) * m) / numColumns)];
      let value = 0;
      for (let t = begin; t < end; t++) if (trace.k[t]) value = Math.max(value, trace[quantity][t]);
      const y = (64 - 60 * Math.sqrt(Math.min(1, value / highest))).toFixed(1);
      path += `V${y}H${at(end).toFixed(1)}`;
    }
    const bounds = [0, Math.min(trace.cot_start, m), Math.min(trace.answer_start, m), m];
    const shapes = [0, 1, 2].map((s) =>
      shape("rect", { class: `section-${s}`, x: at(bounds[s]), width: at(bounds[s + 1] - bounds[s]), y: 0, height: 64 }),
    );
    shapes.push(shape("path", { class: "values", d: `${path}V64Z` }));
    shapes.push(shape("line", { class: "cut", x1: at(keep), x2: at(keep), y1: 0, y2: 64 }));
    this.window = shape("rect", { class: "window", y: 1, height: 62 });
    this.svg.replaceChildren(...shapes, this.window);
    this.svg.setAttribute("aria-valuemin", 0);
    this.svg.setAttribute("aria-valuemax", m - 1);
  }

  showWindow(first, end) {
    this.first = first;
    this.window.setAttribute("x", (1000 * first) / this.numTokens);
    this.window.setAttribute("width", Math.max(3, (1000 * (end - first)) / this.numTokens));
    this.svg.setAttribute("aria-valuenow", first);
  }
}

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
