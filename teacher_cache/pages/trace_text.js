// The trace as text: rows of tokens, of which only those in sight are in the page.

const LONGEST_SHOWN = 60; // characters of a token; the panel beside shows all
const ROWS_AROUND = 6; // rows made beyond what is in sight
const GAP_PX = 16; // of a row's padding and border

class TokenText {
  constructor(box) {
    this.box = box;
    this.room = make("div", { role: "presentation" });
    box.append(this.room);
    this.rows = new Map(); // number of a row -> its element
    this.current = 0;
    this.hits = new Set();
    this.keep = 0;
    this.quantity = "entropy";
    this.onPoint = () => {};
    this.onScroll = () => {};
    box.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()));
    new ResizeObserver(() => this.trace && this.layOut()).observe(box);
    box.addEventListener("pointermove", (event) => this.point(event)); // not "over": text moves under a mouse at rest
    box.addEventListener("pointerleave", () => this.onPoint(this.current));
    box.addEventListener("click", (event) => {
      const t = tokenAt(event.target);
      if (t !== null) this.select(t, false);
    });
  }

  point(event) {
    const t = tokenAt(event.target);
    if (t !== null) this.onPoint(t);
  }

  show(trace) {
    this.trace = trace;
    this.shown = new Map(); // index of a text -> [text, width]
    this.width = 0;
    this.current = 0;
    this.box.scrollTop = 0;
    this.layOut();
  }

  // Break the tokens into rows of the box's width; every row has the same height.
  layOut() {
    if (this.width === this.box.clientWidth) return this.draw();
    this.width = this.box.clientWidth;
    const style = getComputedStyle(this.box);
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = `${style.fontSize} ${style.fontFamily}`;
    this.rowPx = Math.ceil(parseFloat(style.lineHeight));
    const room = this.width - GAP_PX - 8;
    const { token, num_tokens: m } = this.trace;
    const starts = [];
    let used = 0;
    let isOpen = false;
    for (let t = 0; t < m; t++) {
      const [, width, numBreaks] = this.shownText(token[t], pen);
      const begins = t === this.trace.cot_start || t === this.trace.answer_start;
      if (!isOpen || begins || used + width > room) {
        starts.push(t);
        used = 0;
      }
      used += width;
      isOpen = numBreaks === 0;
      for (let extra = 1; extra < Math.min(numBreaks, 3); extra++) starts.push(t + 1);
    }
    this.starts = starts;
    this.room.style.height = `${starts.length * this.rowPx}px`;
    this.clear();
    this.reveal(this.current);
    this.draw();
  }

  shownText(index, pen) {
    if (!this.shown.has(index)) {
      const text = page.texts[index];
      let shown = visible(text.slice(0, 4 * LONGEST_SHOWN));
      if (shown.length > LONGEST_SHOWN) shown = `${[...shown].slice(0, LONGEST_SHOWN).join("")}…`;
      const numBreaks = text.length < 200 ? text.split("\n").length - 1 : 0;
      this.shown.set(index, [shown, pen.measureText(shown).width, numBreaks]);
    }
    return this.shown.get(index);
  }

  clear() {
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
  }

  // Make the rows in sight, and drop the others.
  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.rowPx) - ROWS_AROUND);
    const inSight = Math.ceil(this.box.clientHeight / this.rowPx);
    const end = Math.min(this.starts.length, first + inSight + 2 * ROWS_AROUND);
    for (const [number, row] of this.rows) {
      if (number < first || number >= end) {
        row.remove();
        this.rows.delete(number);
      }
    }
    for (let number = first; number < end; number++) {
      if (!this.rows.has(number)) this.rows.set(number, this.makeRow(number));
    }
    this.onScroll(this.firstInSight(), this.lastInSight());
  }

  makeRow(number) {
    const [begin, end] = [this.starts[number], this.rowEnd(number)];
    const section = sectionOf(this.trace, Math.min(begin, this.trace.num_tokens - 1));
    const row = make("div", { class: `row section-${section}`, role: "presentation" });
    row.style.top = `${number * this.rowPx}px`;
    for (let t = begin; t < end; t++) row.append(this.makeToken(t));
    this.room.append(row);
    return row;
  }

  makeToken(t) {
    const [shown] = this.shown.get(this.trace.token[t]);
    const span = make("span", { id: `token-${t}`, role: "option" }, shown);
    if (!shown.trim()) span.setAttribute("aria-label", shown.length > 1 ? `${shown.length} spaces` : "space");
    span.className = this.classOf(t);
    return span;
  }

  classOf(t) {
    const names = ["token"];
    const heat = heatOf(this.trace, this.quantity, t);
    if (heat) names.push(`heat-${heat}`);
    if (t >= this.keep) names.push("beyond");
    if (this.hits.has(t)) names.push("hit");
    if (t === this.current) names.push("current");
    return names.join(" ");
  }

  // After a change of colour, lead span or matches: the rows stay.
  paint() {
    for (const row of this.rows.values()) {
      for (const span of row.children) span.className = this.classOf(numberOf(span));
    }
  }

  select(t, isRevealed = true) {
    const before = document.getElementById(`token-${this.current}`);
    this.current = Math.max(0, Math.min(t, this.trace.num_tokens - 1));
    if (before) before.removeAttribute("aria-selected");
    if (isRevealed) this.reveal(this.current);
    this.draw();
    this.paint();
    const now = document.getElementById(`token-${this.current}`);
    now.setAttribute("aria-selected", "true");
    now.setAttribute("aria-posinset", this.current + 1);
    now.setAttribute("aria-setsize", this.trace.num_tokens);
    this.box.setAttribute("aria-activedescendant", `token-${this.current}`);
    this.onPoint(this.current);
  }

  reveal(t) {
    const top = this.rowOf(t) * this.rowPx;
    const { scrollTop, clientHeight } = this.box;
    if (top < scrollTop || top + this.rowPx > scrollTop + clientHeight) {
      this.box.scrollTop = top - clientHeight / 3;
    }
  }

  // The last row that begins at or before a token.
  rowOf(t) {
    let [low, high] = [0, this.starts.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= t) low = middle;
      else high = middle;
    }
    return low;
  }

  rowEnd(number) {
    return this.starts[number + 1] ?? this.trace.num_tokens;
  }

  firstInSight() {
    return this.starts[Math.min(this.starts.length - 1, Math.floor(this.box.scrollTop / this.rowPx))];
  }

  lastInSight() {
    const bottom = Math.floor((this.box.scrollTop + this.box.clientHeight) / this.rowPx);
    return this.rowEnd(Math.min(this.starts.length - 1, bottom));
  }
}

function tokenAt(element) {
  return element.id.startsWith("token-") ? numberOf(element) : null;
}

function numberOf(element) {
  return Number(element.id.slice("token-".length));
}
