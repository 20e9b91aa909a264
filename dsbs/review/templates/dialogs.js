// The forms of the review page: a label, a rationale, the keys; and what starts the page.

// --- choosing one of many labels: the text typed finds it, arrows move, Enter takes it

const SHOWN = 60; // options at once
const wordsOf = (text) => text.toLowerCase().split(/[\s_./-]+/);

// Labels that fit the text: beginnings first, then beginnings of words, then any place.
function matching(labels, text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return labels;
  const ranks = labels.map((label) => {
    const low = label.toLowerCase();
    return low === wanted ? 0 : low.startsWith(wanted) ? 1 : wordsOf(label).some((word) => word.startsWith(wanted)) ? 2 : low.includes(wanted) ? 3 : 4;
  });
  return [0, 1, 2, 3].flatMap((rank) => labels.filter((_, i) => ranks[i] === rank));
}

function picker(row, labels, take) {
  const marks = new Map();
  const mark = (label, word) => { if (label && typeof label.value !== "object") marks.set(label.text, [...(marks.get(label.text) || []), word]); };
  mark(row.label, "teacher");
  mark(row.gold, "gold");
  for (const student of row.students) mark(student.label, student.name);
  const first = [...labels].sort((a, b) => rank(a) - rank(b));
  function rank(label) {
    const words = marks.get(label) || [];
    return !words.length ? 1 : words.includes("teacher") ? 2 : 0; // the teacher's own is no correction
  }
  const input = element("input", { type: "text", role: "combobox", "aria-expanded": "true", "aria-controls": "options", "aria-autocomplete": "list", "aria-label": "Label", autocomplete: "off", spellcheck: false, placeholder: "type a part of the label" });
  const list = element("ul", { className: "options", id: "options", role: "listbox", "aria-label": "Labels" });
  const count = element("p", { className: "unseen", role: "status" });
  let found = [], active = 0;
  function draw() {
    found = matching(first, input.value);
    const options = found.slice(0, SHOWN).map((label, i) => {
      const words = marks.get(label) || [];
      const option = element("li", { role: "option", id: `option-${i}`, "aria-selected": String(i === active) }, element("span", null, inline(label)), element("small", null, inline(words.join(", "))));
      option.addEventListener("click", () => { active = i; take(label); });
      return option;
    });
    if (found.length > SHOWN) options.push(element("li", { className: "hint", role: "presentation" }, `${number(found.length - SHOWN)} more: type on`));
    if (!found.length) options.push(element("li", { className: "hint", role: "presentation" }, "No such label."));
    list.replaceChildren(...options);
    count.textContent = `${number(found.length)} labels`;
    input.setAttribute("aria-activedescendant", found.length ? `option-${active}` : "");
    list.children[active]?.scrollIntoView({ block: "nearest" });
  }
  input.addEventListener("input", () => { active = 0; draw(); });
  input.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    if (!by) return;
    event.preventDefault();
    active = Math.max(0, Math.min(Math.min(found.length, SHOWN) - 1, active + by));
    draw();
  });
  draw();
  return { nodes: [input, count, list], value: () => found[active], focus: input };
}

function toggles(row, labels) {
  const chosen = new Set(row.label ? row.label.value : []);
  const input = element("input", { type: "text", "aria-label": "Find a label", autocomplete: "off", spellcheck: false, placeholder: "type a part of a label, Enter turns it on or off" });
  const chips = element("div", { className: "chips toggles", role: "group", "aria-label": "Labels" });
  const boxes = labels.map((label) => {
    const box = element("input", { type: "checkbox", checked: chosen.has(label) });
    box.addEventListener("change", () => { if (box.checked) chosen.add(label); else chosen.delete(label); });
    return [label, box, element("label", null, box, inline(label))];
  });
  chips.append(...boxes.map(([, , chip]) => chip));
  input.addEventListener("input", () => {
    const found = new Set(matching(labels, input.value));
    for (const [label, , chip] of boxes) chip.hidden = !found.has(label);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey || !input.value.trim()) return;
    event.preventDefault();
    event.stopPropagation();
    const [best] = matching(labels, input.value);
    boxes.find(([label]) => label === best)?.[1].click();
    input.value = "";
    input.dispatchEvent(new Event("input"));
  });
  return { nodes: [input, chips], value: () => labels.filter((label) => chosen.has(label)), focus: input };
}

function scale(row, points, take) {
  const buttons = points.map((point) => {
    const words = [row.label?.text === point ? "teacher" : "", row.gold?.text === point ? "gold" : ""].filter(Boolean);
    const button = element("button", { type: "button" }, inline(point), words.length ? ` (${words.join(", ")})` : "");
    button.addEventListener("click", () => take(point));
    return button;
  });
  const group = element("div", { className: "scale", role: "group", "aria-label": "Score" }, ...buttons);
  group.addEventListener("keydown", (event) => {
    const at = points.indexOf(event.key);
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (at >= 0) buttons[at].click();
    else if (by) buttons[Math.max(0, Math.min(buttons.length - 1, buttons.indexOf(document.activeElement) + by))].focus();
    else return;
    event.preventDefault();
  });
  return { nodes: [group], value: () => points[buttons.indexOf(document.activeElement)], focus: buttons[Math.max(0, points.indexOf(row.label?.text))] };
}

function fieldForm(row) {
  const inputs = {};
  const values = row.label ? row.label.value : {};
  const box = element("div", { className: "fields" });
  for (const field of boot.form.fields) {
    const value = values[field.name] ?? null;
    const text = Array.isArray(value) ? value.join("\n") : value === null ? "" : String(value);
    let input;
    if (field.type === "label") input = element("select", null, ...(field.required ? [] : [""]).concat(field.labels).map((label) => element("option", { value: label }, ...shown(label || "(absent)"))));
    else if (field.type === "list") input = element("textarea", { rows: 3, dir: "auto" });
    else input = element("input", { type: "text", dir: "auto", autocomplete: "off" });
    input.value = text;
    inputs[field.name] = [field, input];
    const note = { list: ", an item a line", number: ", a number", date: ", a day" }[field.type] || "";
    box.append(element("p", null, element("label", null, inline(field.name), `${note}${field.required ? ", needed" : ""}`, input)));
  }
  function value() {
    return Object.fromEntries(Object.entries(inputs).map(([name, [field, input]]) => {
      const text = input.value.trim();
      if (!text) return [name, null];
      return [name, field.type === "list" ? text.split("\n").map((item) => item.trim()).filter(Boolean) : text];
    }));
  }
  return { nodes: [box], value, focus: Object.values(inputs)[0][1] };
}

function textForm(row) {
  const input = element("textarea", { rows: 4, dir: "auto", "aria-label": "Label" });
  input.value = row.label ? row.label.text : "";
  return { nodes: [input], value: () => input.value.trim(), focus: input };
}

let form = null;

function openLabel(row, goldIsWrong = false) {
  const take = (label) => saveLabel(row, label);
  const { kind, labels } = boot.form;
  if (kind === "several") form = toggles(row, labels);
  else if (kind === "scale" && labels.length <= 21) form = scale(row, labels, take);
  else if (kind === "fields") form = fieldForm(row);
  else if (kind === "text") form = textForm(row);
  else form = picker(row, kind === "choices" ? row.choices : labels, take);
  at("label-form").replaceChildren(...form.nodes);
  at("label-title").textContent = { several: "The right labels", scale: "The right score", fields: "The right fields", text: "The right answer" }[kind] || "The right label";
  at("label-save").firstChild.textContent = "Save ";
  at("label-save").querySelector("kbd").textContent = ["several", "fields", "text"].includes(kind) ? "Ctrl Enter" : "Enter";
  at("label-problem").textContent = "";
  at("gold-too").hidden = !row.gold;
  at("gold-wrong-too").checked = goldIsWrong;
  at("label-note").hidden = !row.rationale;
  at("label-dialog").showModal();
  form.focus.focus();
}

// What the server makes of a label that was typed; one that was chosen needs no check.
function checkedLabel(row, label, more) {
  if (["fields", "text"].includes(boot.form.kind)) return call("/label", { id: row.id, ...more });
  const key = String(Array.isArray(label) ? [...label].sort() : label);
  const isOf = (other) => other && key === String(Array.isArray(other.value) ? [...other.value].sort() : other.text);
  if (more.gold_is_wrong && isOf(row.gold)) return { problem: "This is the gold label, which you marked as wrong." };
  return { text: key, value: label, same: isOf(row.label) };
}

// Save the label of the form; one that the task does not have stays in the form.
async function saveLabel(row, label, withRationale = false) {
  if (label === undefined) { at("label-problem").textContent = "Choose a label."; return; }
  const more = { label, gold_is_wrong: !at("gold-too").hidden && at("gold-wrong-too").checked };
  try {
    const checked = await checkedLabel(row, label, more);
    if (checked.problem) throw Object.assign(new Error(checked.problem), { isProblem: true });
    if (!at("label-dialog").open) return;
    at("label-dialog").close();
    if (withRationale) { openRationale(row, more, checked); return; }
    finish(row, checked.same ? "accepted" : "corrected", checked.same ? { gold_is_wrong: more.gold_is_wrong } : more);
  } catch (error) {
    at("label-problem").textContent = error.isProblem || error.status ? error.message : "The server does not answer; your entry stays here until it does.";
  }
}

// --- the rationale: what is typed is kept in the browser until it is saved

let editing = null; // [row, the label to save with it]
const draftKey = (row) => `${PREFIX}draft:${row.id}`;

function openRationale(row, more = {}, label = row.label) {
  editing = [row, more];
  const draft = store.getItem(draftKey(row));
  at("rationale-text").value = draft ?? startOf(row, more);
  at("draft-note").textContent = draft === null ? "" : "This is your own text, not saved yet.";
  at("rationale-for").replaceChildren("for the label ", element("b", null, inline(plain(label))));
  at("rationale-dialog").showModal();
  const text = at("rationale-text");
  text.focus();
  text.setSelectionRange(text.value.length, text.value.length);
}
const startOf = (row, more) => (more.label === undefined ? row.mine?.rationale || row.rationale || "" : "");

function saveRationale() {
  const [row, more] = editing;
  const rationale = at("rationale-text").value.trim();
  at("rationale-dialog").close();
  store.removeItem(draftKey(row));
  if (more.label === undefined && rationale === (row.rationale || "")) { finish(row, "accepted"); return; }
  finish(row, "corrected", { ...more, rationale });
}

// --- actions

function finish(row, decision, more = {}) {
  decide(row, decision, more);
  decided.push(row.n);
  showRow(position + 1);
}

const actions = {
  accept: (row) => finish(row, "accepted"),
  label: (row) => openLabel(row),
  edit: (row) => openRationale(row),
  wrong: (row) => finish(row, "corrected", { rationale: "" }),
  gold: (row) => (row.label && !row.gold.same ? finish(row, "accepted", { gold_is_wrong: true }) : openLabel(row, true)),
  reject: (row) => finish(row, "rejected"),
  skip: (row) => finish(row, "skipped"),
  next: () => showRow(position + 1),
  back: () => showRow(position - 1),
};

async function undo() {
  const n = decided.length ? decided.pop() : last;
  if (n === null) { at("saved").textContent = "nothing to undo"; return; }
  last = null;
  if (!rows.has(n) && !(await loadPatiently([n], renders))) return;
  decide(rows.get(n), "undone");
  await goTo(n);
}

function act(name) {
  if (name === "undo") { undo(); return; }
  const row = current();
  const button = at("actions").querySelector(`[data-do="${name}"]`);
  if (name === "back" || name === "next") { if (!isList) actions[name](); }
  else if (row && !button.disabled && !button.hidden) actions[name](row);
  else if (row && !outbox.length) at("saved").textContent = "not possible for this row";
}

const KEYS = [
  ["a", "accept", "accept label and rationale"], ["l", "label", "another label"], ["e", "edit", "edit the rationale"],
  ["w", "wrong", "the label is right, the rationale is wrong"], ["g", "gold", "the gold label is wrong, the teacher’s is right"],
  ["r", "reject", "reject: not used for training"], ["s", "skip", "skip"], ["u", "undo", "undo the last decision"],
  ["j or →", "next", "next row, without a decision"], ["k or ←", "back", "previous row"],
  ["t", "", "show all of a long text"], ["v", "", "list or single row; in the list j and k move, Enter opens"], ["f", "", "choose rows and their order"], ["/", "", "search"], ["?", "", "these keys"],
];
const ACTION_OF = { ...Object.fromEntries(KEYS.filter(([key, name]) => name && key.length === 1).map(([key, name]) => [key, name])), j: "next", k: "back", ArrowRight: "next", ArrowLeft: "back" };

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, select, textarea")) {
    const isDone = event.key === "Escape" || (event.key === "Enter" && event.target.matches("[type=search], [type=text]"));
    if (isDone) { event.preventDefault(); leaveFilters(); } // Escape alone would empty a search
    return;
  }
  const letters = at("use-keys").checked;
  const byList = isList && { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "?") at("keys-dialog").showModal();
  else if (event.key === "/") openFilters(at("query"));
  else if (!letters && event.key.length === 1) return;
  else if (byList) moveInList(byList);
  else if (event.key === "f") openFilters(at("order"));
  else if (event.key === "v") toggleList();
  else if (event.key === "t") at("row").querySelector(".more")?.click();
  else if (ACTION_OF[event.key] && !event.repeat) act(ACTION_OF[event.key]);
  else return;
  event.preventDefault();
}

function openFilters(control) {
  at("choose").open = true;
  control.focus();
}

function leaveFilters() {
  document.activeElement.blur(); // what was typed counts now
  at("choose").open = false;
  at("row").focus();
}

// --- start

function startForms() {
  at("label-save").addEventListener("click", () => saveLabel(current(), form.value()));
  at("label-then-rationale").addEventListener("click", () => saveLabel(current(), form.value(), true));
  at("label-form").addEventListener("keydown", (event) => {
    const isLine = event.target.matches("input[type=text], select");
    if (event.key !== "Enter" || !(isLine || event.ctrlKey || event.metaKey) || event.target.matches("button")) return;
    event.preventDefault();
    saveLabel(current(), form.value(), event.shiftKey);
  });
  at("rationale-text").addEventListener("input", () => store.setItem(draftKey(editing[0]), at("rationale-text").value));
  at("rationale-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); saveRationale(); }
  });
  at("rationale-save").addEventListener("click", saveRationale);
  at("rationale-reset").addEventListener("click", () => {
    store.removeItem(draftKey(editing[0]));
    at("rationale-text").value = startOf(...editing);
    at("draft-note").textContent = "";
    at("rationale-text").focus();
  });
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("close", () => { if (!document.querySelector("dialog[open]") && !isList) at("row").focus({ preventScroll: true }); });
    dialog.querySelector("form").addEventListener("submit", (event) => { if (dialog.id !== "keys-dialog") event.preventDefault(); });
  }
}

function startFilters() {
  for (const [name, title] of boot.orders) at("order").append(element("option", { value: name }, title));
  for (const [name, title] of boot.reasons) at("reason").append(element("option", { value: name }, ...shown(title)));
  at("order").value = boot.order;
  at("label-names").append(...boot.labels.map((label) => element("option", { value: label })));
  at("differs-gold").parentElement.hidden = !boot.has_gold;
  at("differs-student").parentElement.hidden = !boot.has_students;
  let wait = 0;
  at("filters").addEventListener("change", (event) => { if (event.target.id !== "reviewer") loadQueue(); });
  at("query").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(loadQueue, 200); });
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("reviewer").value = me;
  at("reviewer").addEventListener("change", () => {
    me = at("reviewer").value.trim() || boot.reviewer;
    at("reviewer").value = me;
    store.setItem(`${PREFIX}reviewer`, me);
    rows.clear();
    decided.length = 0;
    loadQueue();
  });
  at("use-keys").checked = store.getItem("dsbs-review:keys") !== "off";
  at("use-keys").addEventListener("change", () => store.setItem("dsbs-review:keys", at("use-keys").checked ? "on" : "off"));
}

function start() {
  history.replaceState(null, "", "/"); // the address bar need not show the token
  at("keys-list").append(...KEYS.flatMap(([key, , meaning]) => [element("dt", null, ...key.split(" or ").flatMap((k, i) => [i ? " or " : "", element("kbd", null, k)])), element("dd", null, meaning)]));
  startForms();
  startFilters();
  at("actions").addEventListener("click", (event) => { const button = event.target.closest("[data-do]"); if (button) act(button.dataset.do); });
  at("toggle-list").addEventListener("click", toggleList);
  at("open-keys").addEventListener("click", () => at("keys-dialog").showModal());
  at("previous-page").addEventListener("click", () => { page--; showList(); });
  at("next-page").addEventListener("click", () => { page++; showList(); });
  at("results").addEventListener("toggle", () => { if (at("results").open) loadResults(); });
  document.addEventListener("keydown", onKey);
  takeUnsaved();
  loadQueue();
}
start();
