// The review page, over base.js: rows, decisions and their way to the disk. dialogs.js has the forms.
// Text from data reaches the page through textContent only.
const boot = JSON.parse(at("boot").textContent);
const PREFIX = `dsbs-review:${boot.key}:`;
const PAGE = 50;
const AHEAD = 20; // rows loaded before they are needed
const LONG = 1200; // characters of a text that are shown at first
const store = openStore();
let me = store.getItem(`${PREFIX}reviewer`) || boot.reviewer;
let queue = []; // the numbers of the chosen rows, in their order
let position = 0;
let page = 0;
let isList = false;
let last = null; // the row that I decided on before this page was opened
let renders = 0;
let isSearch = false; // the chosen rows depend on their content
const rows = new Map(); // by number, as the server sent them
const decided = []; // numbers of the rows decided on here, the latest last

function openStore() {
  try {
    localStorage.setItem("dsbs-probe", "1");
    localStorage.removeItem("dsbs-probe");
    return localStorage;
  } catch { // blocked: what is typed then lives as long as the page
    const values = new Map();
    return { getItem: (k) => values.get(k) ?? null, setItem: (k, v) => values.set(k, v), removeItem: (k) => values.delete(k), key: (i) => [...values.keys()][i] ?? null, get length() { return values.size; } };
  }
}

// --- text

const CONTROL_NAMES = { 0x200b: "ZWSP", 0x200e: "LRM", 0x200f: "RLM", 0x061c: "ALM", 0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM" };
const CONTROLS = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\u{e0000}-\u{e007f}])/u;

// Text with its invisible characters as marks, so that none can hide or turn what stands beside it.
function shown(text) {
  return text.replaceAll("\r\n", "\n").split(CONTROLS).filter(Boolean).map((part) => {
    if (!CONTROLS.test(part)) return document.createTextNode(part);
    const code = part.codePointAt(0);
    const name = CONTROL_NAMES[code] || `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    return element("span", { className: "control", title: "an invisible character" }, name);
  });
}
const inline = (text) => element("bdi", null, ...shown(text));

// A block of text; a long one is cut until somebody asks for all of it.
function passage(text, className = "") {
  const box = element("p", { className: `text ${className}`, dir: "auto" }, ...shown(text));
  if (text.length <= LONG) return box;
  box.classList.add("cut");
  const more = element("button", { type: "button", className: "more", "aria-keyshortcuts": "t" }, `Show all ${number(text.length)} characters`, " ", element("kbd", { "aria-hidden": "true" }, "t"));
  more.addEventListener("click", () => { box.classList.remove("cut"); more.remove(); });
  return element("div", null, box, more);
}

// A label in one line.
function plain(label) {
  if (label === null) return "–";
  if (Array.isArray(label.value)) return label.value.join(", ") || "none";
  if (label.value && typeof label.value === "object") {
    return Object.entries(label.value).map(([name, value]) => `${name}: ${fieldText(value)}`).join(" · ");
  }
  return label.text;
}
const fieldText = (value) => (value === null ? "–" : Array.isArray(value) ? value.join(", ") : String(value));

// A label as a block; fields in which it differs from the teacher's are marked.
function labelNode(label, className) {
  if (label === null) return element("p", { className: "none" }, "none");
  if (!label.value || typeof label.value !== "object" || Array.isArray(label.value)) {
    return element("p", { className, dir: "auto" }, inline(plain(label)));
  }
  const parts = Object.entries(label.value).flatMap(([name, value]) => {
    const differs = (label.differs || []).includes(name);
    return [element("dt", null, inline(name)), element("dd", { className: differs ? "differs" : "" }, differs ? "≠ " : "", inline(fieldText(value)))];
  });
  return element("dl", { className: "parts" }, ...parts);
}

// --- the server

async function call(path, form) {
  const headers = { "X-Dsbs-Review": boot.csrf };
  const options = { headers, credentials: "same-origin", cache: "no-store" };
  if (form) Object.assign(options, { method: "POST", body: JSON.stringify(form), headers: { ...headers, "Content-Type": "application/json" } });
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const error = new Error(answer.error ? answer.error.message : `status ${response.status}`);
  error.status = response.status;
  throw error;
}
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const STALE = "This page’s key is no longer valid: the server was stopped and started again. Open the address that it printed, in this browser.";

// --- saving: a decision stays in the browser until the server says that it is on disk

const outbox = []; // [key in the store, decision], the oldest first
let isSending = false;
let lastTime = 0;

function decisionTime() {
  lastTime = Math.max(Date.now(), lastTime + 1); // time and row tell decisions apart
  return new Date(lastTime).toISOString();
}

// Decide on a row. The decision is shown at once, and called saved once it is.
function decide(row, decision, more = {}) {
  const review = { id: row.id, decision, reviewer: me, time: decisionTime(), order: shownOrder(), ...more };
  const key = `${PREFIX}out:${review.time}:${crypto.getRandomValues(new Uint32Array(1))[0]}`;
  store.setItem(key, JSON.stringify(review));
  outbox.push([key, review]);
  row.mine = waiting(review);
  return send();
}

// A decision that is not on disk yet, as a row shows it.
function waiting(review) {
  if (review.decision === "undone") return null;
  const label = review.label === undefined ? null : { text: String(review.label), value: review.label };
  return { ...review, label, isWaiting: true };
}

// The order that showed a row; null where somebody looked for it: then it is no random row, whatever it is.
const shownOrder = () => (isSearch ? null : at("order").value);

function takeUnsaved() {
  const keys = Array.from({ length: store.length }, (_, i) => store.key(i)).filter((key) => key.startsWith(`${PREFIX}out:`)).sort();
  for (const key of keys) outbox.push([key, JSON.parse(store.getItem(key))]);
  if (outbox.length) send();
}

async function send() {
  if (isSending) return;
  isSending = true;
  for (let failures = 0; outbox.length;) {
    const [key, review] = outbox[0];
    showSaved(failures);
    try {
      if (store.getItem(key) !== null) received(await call("/reviews", review)); // otherwise another tab sent it
    } catch (error) {
      if (error.status !== 400 && error.status !== 422) {
        failures++;
        showDown(error);
        await pause(Math.min(5000, 250 * 2 ** failures));
        continue;
      }
      refused(review, error.message);
    }
    failures = 0;
    outbox.shift();
    store.removeItem(key);
  }
  isSending = false;
  at("down").hidden = true;
  showSaved(0);
}

function received(answer) {
  const isPending = outbox.slice(1).some(([, review]) => review.id === answer.row.id);
  const before = rows.get(answer.row.n);
  if (before && !isPending) Object.assign(before, answer.row);
  if (before && queue[position] === answer.row.n && !isList && !isPending) showTags(before);
  showProgress(answer.progress);
  if (at("results").open) loadResults();
}

// The server cannot take a decision: its text comes back to whoever typed it.
function refused(review, problem) {
  if (review.rationale) store.setItem(`${PREFIX}draft:${review.id}`, review.rationale);
  for (const row of rows.values()) if (row.id === review.id) row.mine = null;
  at("down").textContent = `Not saved, row ${review.id}: ${problem}`;
  at("down").hidden = false;
}

function showSaved(failures) {
  const waiting = outbox.length;
  const words = `${number(waiting)} decision${waiting === 1 ? "" : "s"}`;
  at("saved").className = `saved ${failures ? "failing" : waiting ? "waiting" : ""}`;
  at("saved").textContent = failures ? `${words} not saved yet` : waiting ? "saving …" : decided.length ? "✓ saved" : "";
}

function showDown(error) {
  showSaved(1);
  const reason = error.status ? `The server cannot save (${error.message}).` : "The server does not answer. Start the same `dsbs review` again:";
  const kept = "your decisions are kept in this browser, and are sent as soon as it does.";
  at("down").textContent = error.status === 403 ? `${STALE} Your decisions are kept in this browser.` : `${reason} ${error.status ? "It is tried again; " : ""}${kept}`;
  at("down").hidden = false;
}

addEventListener("beforeunload", (event) => { if (outbox.length) event.preventDefault(); });

// --- rows

async function load(numbers) {
  const missing = numbers.filter((n) => n !== undefined && !rows.has(n));
  if (!missing.length) return;
  const answer = await call(`/rows?${new URLSearchParams({ n: missing.join(","), reviewer: me })}`);
  for (const row of answer.rows) if (!rows.has(row.n)) rows.set(row.n, row);
  // A decision on its way is newer than what the server knows.
  for (const [, review] of outbox) for (const row of answer.rows) if (row.id === review.id) row.mine = waiting(review);
}

// Load rows however long the server takes; false where something newer is shown meanwhile.
async function loadPatiently(numbers, render) {
  for (let wait = 250; ; wait = Math.min(5000, wait * 2)) {
    try {
      await load(numbers);
      if (!outbox.length) at("down").hidden = true;
      return render === renders;
    } catch (error) {
      if (render !== renders) return false;
      at("down").textContent = error.status === 403 ? STALE : "The server does not answer. Start the same `dsbs review` again: this page goes on by itself.";
      at("down").hidden = false;
      await pause(wait);
    }
  }
}

const filters = () => ({
  order: at("order").value, state: at("state").value, label: at("label-is").value, reason: at("reason").value, by: at("by").value, q: at("query").value,
  gold: at("differs-gold").checked ? "1" : "", student: at("differs-student").checked ? "1" : "", reviewer: me,
});

async function loadQueue() {
  const render = ++renders;
  for (let wait = 250; ; wait = Math.min(5000, wait * 2)) {
    try {
      const answer = await call(`/queue?${new URLSearchParams(filters())}`);
      if (render !== renders) return;
      ({ rows: queue, last } = answer);
      // The server may have looked before the last decisions reached it.
      if (at("state").value === "open") queue = queue.filter((n) => !decided.includes(n) || !rows.get(n)?.mine);
      showProgress(answer.progress);
      break;
    } catch (error) {
      if (render !== renders) return;
      at("down").textContent = error.status === 403 ? STALE : `The rows cannot be read (${error.message}); trying again.`;
      at("down").hidden = false;
      await pause(wait);
    }
  }
  if (!outbox.length) at("down").hidden = true;
  position = page = 0;
  const { state, label, reason, by, q, gold, student } = filters();
  isSearch = !["open", "all"].includes(state) || Boolean(label || reason || by || q || gold || student);
  const total = queue.length;
  at("chosen").textContent = `${number(total)} ${total === 1 ? "row" : "rows"}: ${at("state").selectedOptions[0].text}, ${at("order").selectedOptions[0].text}`;
  await (isList ? showList() : showRow(0, false));
}

const current = () => (isList || at("row").hidden ? null : rows.get(queue[position]) || null);

// Show the row at a position of the queue; past the last one, look for rows that are still open.
async function showRow(to, takesFocus = true) {
  if (to >= queue.length && queue.length && at("state").value === "open" && decided.length) return loadQueue();
  position = Math.max(0, Math.min(to, queue.length));
  const render = ++renders;
  const isOver = position >= queue.length;
  at("nothing").hidden = !isOver;
  at("row").hidden = true;
  at("position").textContent = isOver ? "" : `${number(position + 1)} / ${number(queue.length)}`;
  enableActions(null);
  if (isOver) {
    const isOpen = at("state").value === "open";
    at("nothing").textContent = queue.length || !isOpen ? "No more rows are chosen. Choose others above." : "You have reviewed every row of this choice. Choose others above.";
    return;
  }
  if (!rows.has(queue[position]) && !(await loadPatiently(queue.slice(position, position + AHEAD), render))) return;
  const row = rows.get(queue[position]);
  at("row").replaceChildren(...rowNodes(row));
  at("row").setAttribute("aria-label", `Row ${position + 1} of ${queue.length}`);
  at("row").hidden = false;
  enableActions(row);
  if (row.mine && !row.mine.isWaiting) refresh(row).catch(() => {});
  if (takesFocus) { scrollTo(0, 0); at("row").focus({ preventScroll: true }); }
  if (!rows.has(queue[Math.min(position + AHEAD / 2, queue.length - 1)])) load(queue.slice(position, position + AHEAD)).catch(() => {});
}

// What others decided on a row of mine meanwhile.
async function refresh(row) {
  const [now] = (await call(`/rows?${new URLSearchParams({ n: row.n, reviewer: me })}`)).rows;
  if (outbox.some(([, review]) => review.id === row.id)) return;
  Object.assign(row, now);
  if (current() === row) showTags(row);
}

function enableActions(row) {
  for (const button of at("actions").querySelectorAll("[data-do]")) {
    const action = button.dataset.do;
    const needs = { accept: () => row.label, gold: () => row.gold, edit: () => row.label, wrong: () => row.label && row.rationale };
    button.disabled = action !== "undo" && (!row || Boolean(needs[action] && !needs[action]()));
    if (action === "gold") button.hidden = !boot.has_gold;
  }
}

const DECISIONS = { accepted: "accepted", corrected: "corrected", rejected: "rejected", skipped: "skipped" };
function reviewText(review, who) {
  const details = [];
  if (review.decision === "corrected" && review.label) details.push(`label ${plain(review.label)}`);
  if (review.decision === "corrected" && typeof review.rationale === "string") details.push(review.rationale ? "rationale edited" : "rationale wrong");
  if (review.gold_is_wrong) details.push("gold is wrong");
  return `${who}: ${DECISIONS[review.decision]}${details.length ? ` (${details.join(", ")})` : ""}${review.isWaiting ? ", not saved yet" : ""}`;
}

function tags(row) {
  const mine = row.mine ? [element("span", { className: "tag mine" }, inline(reviewText(row.mine, "you")))] : [];
  const others = row.others.map((review) => element("span", { className: "tag" }, inline(reviewText(review, review.reviewer))));
  const why = row.why.map((text) => element("span", { className: "tag" }, inline(text)));
  return [...mine, ...others, ...why];
}
const showTags = (row) => at("why").replaceChildren(...tags(row));

function compared(title, label, row, note = "") {
  const mark = !row.label ? "" : label.same ? element("span", { className: "same" }, " ✓ as the teacher") : element("span", { className: "differs" }, " ≠ differs");
  return element("div", null, element("h3", null, inline(title), note), element("div", { className: "compared" }, labelNode(label, ""), mark));
}

function rowNodes(row) {
  const input = element("div", { className: "input" });
  for (const [name, text] of row.fields) input.append(element("div", { className: "field" }, element("h3", null, inline(name)), passage(text)));
  const answer = element("div", { className: "answer" }, element("h3", null, "teacher’s label"),
    labelNode(row.label, "label"));
  for (const text of row.vote) answer.append(element("p", { className: "vote" }, inline(text)));
  const reason = row.mine && typeof row.mine.rationale === "string" ? row.mine.rationale : row.rationale;
  answer.append(element("div", { className: "rationale" }, element("h3", null, row.mine && row.mine.rationale ? "rationale, as you wrote it" : "its rationale"),
    reason ? passage(reason) : element("p", { className: "none" }, "none")));
  const others = element("div", { className: "others" });
  if (row.gold) others.append(compared("gold", row.gold, row));
  for (const student of row.students) {
    const sure = student.probability === null ? "" : `, ${Math.round(100 * student.probability)}% sure`;
    others.append(student.label ? compared(`student ${student.name}`, student.label, row, sure) : element("div", null, element("h3", null, inline(`student ${student.name}`)), element("p", { className: "none" }, "no readable answer")));
  }
  return [element("p", { className: "why", id: "why" }, ...tags(row)), input, element("div", null, answer, others)];
}

function showProgress(progress) {
  at("bar").max = progress.rows || 1;
  at("bar").value = progress.reviewed;
  const mine = progress.by[me] || 0;
  const own = mine === progress.reviewed ? "" : `, ${number(mine)} by you`;
  at("progress").textContent = `${number(progress.reviewed)} of ${number(progress.rows)} rows reviewed${own}`;
  const names = Object.keys(progress.by).sort();
  const options = [...at("by").options].slice(1).map((option) => option.value);
  if (names.join("\n") !== options.join("\n")) {
    const chosen = at("by").value;
    at("by").replaceChildren(at("by").options[0], ...names.map((name) => element("option", { value: name }, ...shown(name))));
    at("by").value = names.includes(chosen) ? chosen : "";
  }
}

// --- the list

async function showList() {
  const render = ++renders;
  const numbers = queue.slice(page * PAGE, (page + 1) * PAGE);
  const pages = Math.max(1, Math.ceil(queue.length / PAGE));
  if (!(await loadPatiently(numbers, render))) return;
  at("rows").replaceChildren(...numbers.map((n, i) => line(rows.get(n), page * PAGE + i)));
  at("page-number").textContent = `page ${number(page + 1)} of ${number(pages)}`;
  at("previous-page").disabled = page === 0;
  at("next-page").disabled = page + 1 >= pages;
}

function line(row, to) {
  const gist = (title, text, className = "") => element("span", { className: `gist ${className}` }, element("small", null, title), inline(text));
  const isOther = row.gold && row.label && !row.gold.same;
  const state = row.mine ? DECISIONS[row.mine.decision] : "–";
  const open = element("button", { type: "button" }, element("span", { className: "excerpt" }, inline(row.fields.map(([, text]) => text.slice(0, 240)).join(" / "))),
    gist("teacher", plain(row.label)));
  if (boot.has_gold) open.append(gist("gold", `${isOther ? "≠ " : ""}${plain(row.gold)}`, isOther ? "differs" : ""));
  open.append(gist("you", state));
  open.addEventListener("click", () => { setList(false); showRow(to); });
  return element("li", null, open);
}

function setList(value) {
  isList = value;
  at("many").hidden = !value;
  at("one").hidden = value;
  at("actions").hidden = value;
  at("toggle-list").setAttribute("aria-pressed", String(value));
}

async function toggleList() {
  setList(!isList);
  if (!isList) { showRow(position); return; }
  page = Math.min(Math.floor(position / PAGE), Math.max(0, Math.ceil(queue.length / PAGE) - 1));
  await showList();
  const lines = at("rows").querySelectorAll("button");
  if (lines.length) lines[Math.min(position - page * PAGE, lines.length - 1)].focus();
}

async function moveInList(by) {
  const lines = [...at("rows").querySelectorAll("button")];
  if (!lines.length) return;
  const to = Math.max(0, lines.indexOf(document.activeElement) + by);
  if (to >= lines.length && !at("next-page").disabled) { page++; await showList(); at("rows").querySelector("button").focus(); return; }
  lines[Math.min(to, lines.length - 1)].focus();
}

// --- results so far

async function loadResults() {
  let answer;
  try {
    answer = await call(`/summary?${new URLSearchParams({ reviewer: me })}`);
  } catch { return; }
  showProgress(answer.progress);
  const differences = answer.differences.map(({ n, id, texts }) => {
    const open = element("button", { type: "button" }, inline(id));
    open.addEventListener("click", () => goTo(n));
    return element("li", null, open, " ", inline(texts.join("; ")));
  });
  at("results-text").replaceChildren(...answer.sentences.map((text) => element("p", null, inline(text))), element("ul", null, ...differences));
}

// Show a row by its number, whether or not it is among the chosen ones.
function goTo(n) {
  let to = queue.indexOf(n);
  if (to < 0) { to = Math.min(position, queue.length); queue.splice(to, 0, n); isSearch = true; }
  setList(false);
  return showRow(to);
}
