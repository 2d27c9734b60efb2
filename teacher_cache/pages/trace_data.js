"use strict";
// Unpacks the page's traces (see packing.py) and computes what is shown of every token.

const page = JSON.parse(document.getElementById("page-data").textContent);
const SECTIONS = ["prompt", "chain of thought", "answer"];
const STEP_NATS = 0.001;

// What tokens can be coloured by, and the values at which a darker colour begins.
const QUANTITIES = {
  entropy: { label: "entropy", unit: "nats", from: [0.05, 0.2, 0.5, 1, 1.5, 2, 3] },
  tail: { label: "tail", unit: "", from: [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4] },
  surprise: { label: "surprise", unit: "nats", from: [0.1, 0.5, 1, 2, 3, 5, 8] },
  k: { label: "kept entries", unit: "", from: [2, 3, 5, 9, 17, 33, 65] },
  kl: { label: "KL to the student", unit: "nats", from: [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3] },
};

if (!page.has_tails) {
  delete QUANTITIES.tail;
  for (const name of ["entropy", "surprise", "kl"]) QUANTITIES[name].label += ", kept entries alone";
}

async function inflated(base64) {
  const text = atob(base64.trim());
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function unpackTrace(number) {
  const facts = page.traces[number];
  const bytes = await inflated(document.getElementById(`trace-${number}`).textContent);
  let offset = 0;
  const column = (kind, length) => {
    const values = new kind(bytes, offset, length);
    offset += values.byteLength;
    return values;
  };
  const { num_tokens: m, num_entries: numEntries, has_student: hasStudent } = facts;
  const index = page.texts.length > 65536 ? Uint32Array : Uint16Array;
  const trace = { ...facts, number, tailLogit: column(Float32Array, m) };
  if (hasStudent) {
    trace.kl = column(Float32Array, m);
    trace.studentTail = column(Float32Array, m);
  }
  trace.token = column(index, m);
  trace.entry = column(index, numEntries);
  if (hasStudent) trace.studentSteps = column(Uint16Array, numEntries);
  trace.k = column(Uint8Array, m);
  trace.code = column(Uint8Array, numEntries);
  measure(trace);
  return trace;
}

// The teacher's logprobs and, per token, entropy (the tail is one outcome more), tail and surprise.
function measure(trace) {
  const m = trace.num_tokens;
  trace.first = new Uint32Array(m + 1);
  trace.logprob = new Float32Array(trace.num_entries);
  trace.entropy = new Float32Array(m);
  trace.tail = new Float32Array(m);
  trace.surprise = new Float32Array(m);
  trace.entropyBefore = new Float64Array(m + 1);
  for (let t = 0; t < m; t++) {
    const first = trace.first[t];
    const end = (trace.first[t + 1] = first + trace.k[t]);
    if (end > first) {
      const logKept = page.has_tails ? -softplus(trace.tailLogit[t]) : 0;
      const logTail = trace.tailLogit[t] + logKept;
      let sum = 0;
      for (let e = first; e < end; e++) sum += Math.exp(trace.logits[trace.code[e]]);
      let entropy = page.has_tails ? -Math.exp(logTail) * logTail : 0;
      for (let e = first; e < end; e++) {
        const logprob = trace.logits[trace.code[e]] - Math.log(sum) + logKept;
        trace.logprob[e] = logprob;
        entropy -= Math.exp(logprob) * logprob;
        if (trace.entry[e] === trace.token[t]) trace.surprise[t] = -logprob;
      }
      trace.entropy[t] = entropy;
      trace.tail[t] = page.has_tails ? Math.exp(logTail) : NaN;
    }
    trace.entropyBefore[t + 1] = trace.entropyBefore[t] + trace.entropy[t];
  }
}

function softplus(x) {
  return x > 0 ? x + Math.log1p(Math.exp(-x)) : Math.log1p(Math.exp(x));
}

function sectionOf(trace, t) {
  return t < trace.cot_start ? 0 : t < trace.answer_start ? 1 : 2;
}

// 0 for what is not coloured at all, also where there is no distribution.
function heatOf(trace, quantity, t) {
  if (!trace.k[t]) return 0;
  const value = trace[quantity][t];
  const { from } = QUANTITIES[quantity];
  let level = 0;
  while (level < from.length && value >= from[level]) level++;
  return level;
}

// Line breaks, tabs, and whatever has no picture or turns the direction of writing, as marks.
function visible(text) {
  if (text === "") return "∅";
  return text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) => {
    const marks = { "\n": "↵", "\t": "→", "\r": "␍" };
    return marks[c] ?? `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

// A token's text by itself: spaces alone would show nothing.
function named(text) {
  return /^ +$/.test(text) ? "␣".repeat(text.length) : visible(text);
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
