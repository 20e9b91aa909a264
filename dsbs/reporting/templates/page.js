"use strict";
// The example browser. Data reach the page through textContent alone.
(() => {
  const PAGE = 50;
  const EXCERPT = 240;
  const at = (id) => document.getElementById(id);
  const number = (n) => n.toLocaleString("en");
  let data, keys, shown = [], page = 0, waits = 0;

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  // Control characters have no glyph: they are shown as escapes.
  function visible(text) {
    return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
  }

  // An element with children: strings become text, never markup.
  function element(name, properties, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(properties || {})) {
      if (key in made && key !== "dir") made[key] = value; else made.setAttribute(key, value);
    }
    made.append(...children.map((child) => (typeof child === "string" ? visible(child) : child)));
    return made;
  }

  // Within a line: beginnings of isolates that a text leaves open would swallow the element's own end, and its neighbours.
  function isolated(text) {
    let [unopened, unclosed] = [0, 0];
    for (const c of text.match(/[\u2066-\u2069]/g) || []) {
      if (c !== "\u2069") unclosed++; else if (unclosed) unclosed--; else unopened++;
    }
    return element("bdi", null, "\u2068".repeat(unopened) + text + "\u2069".repeat(unclosed));
  }
  const block = (text) => element("p", { className: "text", dir: "auto" }, text);

  const title = (s) => (s.run ? `${s.run} / ${s.name}` : s.name);

  // The share of a system's seeds that had a row right; null where it was not asked.
  function score(system, row) {
    const marks = data.systems[system].members.map((m) => m.right[row]).filter((c) => c !== "-" && c !== undefined);
    return marks.length ? marks.filter((c) => c === "1").length / marks.length : null;
  }

  const known = (a, b) => a !== null && b !== null;
  const FILTERS = [
    ["all", "all", () => true],
    ["fixed", "fixed", (a, b) => known(a, b) && a > b],
    ["broken", "broken", (a, b) => known(a, b) && a < b],
    ["both-wrong", "both wrong", (a, b) => known(a, b) && a === b && a < 0.5],
    ["both-right", "both right", (a, b) => known(a, b) && a === b && a >= 0.5],
    ["teacher-wrong", "teacher wrong, system right", (a, b, t) => known(a, t) && t < 0.5 && a >= 0.5],
  ];

  // What a row is searched by, in one case; made when the first search is.
  function text(row) {
    keys ||= data.rows.map(([id, gold, , fields, why], i) => [
      id, gold || "", ...fields, ...Object.values(why),
      ...data.systems.flatMap((s) => s.members.map((m) => answer(m.said[i]).text || "")),
    ].join("\n").toLowerCase());
    return keys[row];
  }
  const answer = (n) => (n < 0 ? {} : data.answers[n]);

  // The search waits for a pause in typing; whoever goes on to the rows does not.
  function settle() {
    if (waits) search();
  }

  function search() {
    clearTimeout(waits);
    waits = 0;
    const words = at("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [first, second] = [Number(at("first").value), Number(at("second").value)];
    const teacher = data.systems[first].teacher;
    const chosen = document.querySelector("#filters input:checked").value;
    const found = FILTERS.map(() => []);
    for (let row = 0; row < data.rows.length; row++) {
      if (!words.every((word) => text(row).includes(word))) continue;
      const scores = [score(first, row), score(second, row), teacher === null ? null : score(teacher, row)];
      FILTERS.forEach(([, , fits], i) => { if (fits(...scores)) found[i].push(row); });
    }
    FILTERS.forEach(([name], i) => { at(`many-${name}`).textContent = number(found[i].length); });
    shown = found[FILTERS.findIndex(([name]) => name === chosen)];
    turn(0);
  }

  function turn(to) {
    page = to;
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    at("rows").replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(line));
    at("counted").textContent = `${number(shown.length)} of ${number(data.rows.length)} rows`;
    at("place").textContent = `page ${number(page + 1)} of ${number(pages)}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page + 1 >= pages;
  }

  // What a system said, with how many of its seeds said so, the most frequent first.
  function answers(system, row) {
    const counts = new Map();
    for (const member of data.systems[system].members) {
      if (member.said[row] < 0) continue;
      const said = answer(member.said[row]);
      const shownAs = said.text === undefined ? `unreadable: ${said.raw}` : said.text;
      counts.set(shownAs, (counts.get(shownAs) || 0) + 1);
    }
    return [...counts].sort((a, b) => b[1] - a[1]);
  }

  // Right or wrong as a sign and a word, not by colour alone; of several seeds, how many were right.
  function mark(system, row) {
    const share = score(system, row);
    if (share === null) return element("span", null, "–");
    const all = data.systems[system].members.filter((m) => m.right[row] !== "-").length;
    const said = all > 1 ? ` ${Math.round(share * all)}/${all}` : "";
    const right = share >= 0.5;
    return element("span", { className: right ? "right" : "wrong" }, `${right ? "✓" : "✗"}${said}`,
      element("span", { className: "unseen" }, right ? " right" : " wrong"));
  }

  function gist(system, row) {
    return element("span", { className: "gist" }, element("small", null, isolated(title(data.systems[system]))),
      mark(system, row), " ", isolated((answers(system, row)[0] || ["–"])[0]));
  }

  function line(row) {
    const [id, gold, , fields] = data.rows[row];
    const excerpt = fields.length ? fields.flatMap((value) => [isolated(value.slice(0, EXCERPT)), " / "]).slice(0, -1) : [isolated(id)];
    const summary = element("summary", null, element("span", { className: "excerpt" }, ...excerpt),
      element("span", { className: "gist" }, element("small", null, "gold"), isolated(gold || "–")),
      gist(Number(at("first").value), row), gist(Number(at("second").value), row));
    const details = element("details", null, summary);
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(whole(row));
    });
    return element("li", { id: `row-${row}` }, details);
  }

  function whole(row) {
    const [id, gold, shape, fields, why] = data.rows[row];
    const said = element("div", { className: "fields" });
    fields.forEach((value, i) => {
      said.append(element("div", null, element("h4", null, isolated(data.shapes[shape][i])), block(value)));
    });
    const box = element("div", { className: "row" }, said, element("h4", null, "gold label"), block(gold || "–"));

    // the teacher's rationale first, then those of the two systems at hand, then all others
    const [first, second] = [Number(at("first").value), Number(at("second").value)];
    const order = [...new Set([data.systems[first].teacher, first, second, ...data.systems.keys()])];
    const reasons = order.filter((s) => s !== null && why[s]).map((s) => element("div", null,
      element("h5", null, isolated(title(data.systems[s])), data.systems[s].members.length > 1 ? `, ${data.systems[s].members[0].name}` : ""),
      block(why[s])));
    if (reasons.length) box.append(element("h4", null, "rationales"), element("div", { className: "reasons" }, ...reasons));

    const table = element("tbody");
    data.systems.forEach((system, s) => {
      const said = answers(s, row).map(([text, n]) => (system.members.length > 1 ? `${text} ×${n}` : text)).join(", ");
      const sure = system.members.map((m) => (m.sure ? m.sure[row] : null)).filter((p) => p !== null && p !== undefined);
      table.append(element("tr", null, element("th", { scope: "row" }, isolated(title(system))),
        element("td", null, isolated(said || "–")), element("td", null, mark(s, row)),
        element("td", { className: "n" }, sure.map((p) => `${p} %`).join(", ") || "–")));
    });
    const heads = ["system", "answer", "right", "probability"].map((h) => element("th", { scope: "col" }, h));
    box.append(element("h4", null, "answers"), element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "answers" },
      element("table", null, element("thead", null, element("tr", null, ...heads)), table)));
    box.append(element("p", { className: "notes" }, "id ", isolated(id)));
    return box;
  }

  // Focus moves over the rows, and over the page's end to the next one.
  function move(by) {
    settle();
    const lines = [...at("rows").querySelectorAll("summary")];
    const here = lines.findIndex((one) => one.parentElement.contains(document.activeElement));
    let to = here < 0 ? 0 : here + by;
    if (to >= lines.length && !at("next").disabled) { turn(page + 1); to = 0; }
    else if (to < 0 && !at("previous").disabled) { turn(page - 1); to = PAGE - 1; }
    const target = at("rows").querySelectorAll("summary")[to];
    if (target) { target.focus(); target.scrollIntoView({ block: "nearest" }); }
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && event.target === at("words")) { move(0); return; }
    if (typing) return;
    const arrow = event.target.closest("#rows summary") && { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const by = arrow || { j: 1, k: -1 }[event.key];
    if (event.key === "/") { event.preventDefault(); at("words").focus(); at("words").select(); }
    else if (by) { event.preventDefault(); move(by); }
  }

  function controls() {
    for (const id of ["first", "second"]) {
      at(id).append(...data.systems.map((s, i) => element("option", { value: String(i) }, title(s))));
      at(id).addEventListener("change", search);
    }
    const first = data.headline;
    at("first").value = String(first);
    at("second").value = String(data.systems[first].against ?? (first === 0 ? Math.min(1, data.systems.length - 1) : 0));
    FILTERS.forEach(([name, label], i) => at("filters").append(element("label", null,
      element("input", { type: "radio", name: "filter", value: name, checked: i === 0 }), label,
      element("span", { className: "much", id: `many-${name}` }))));
    at("filters").addEventListener("change", search);
    at("words").addEventListener("input", () => { clearTimeout(waits); waits = setTimeout(search, 120); });
    at("browser").querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); settle(); });
    at("previous").addEventListener("click", () => turnTo(page - 1));
    at("next").addEventListener("click", () => turnTo(page + 1));
    document.addEventListener("keydown", key);
  }

  function turnTo(to) {
    turn(to);
    at("counted").scrollIntoView({ block: "nearest" });
  }

  async function start() {
    const packed = at("packed").textContent;
    if (!packed) return;
    try {
      data = await unpack(packed);
    } catch (error) {
      at("waiting").textContent = `The examples cannot be unpacked by this browser (${error.message}): one of 2023 or later is needed.`;
      return;
    }
    controls();
    search();
    at("waiting").hidden = true;
    at("browser").hidden = false;
  }

  // On paper nothing can be opened.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.printed:not([open])")];
    opened.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));

  at("waiting").className = "notes";
  at("waiting").textContent = "Unpacking the examples …";
  requestAnimationFrame(() => setTimeout(start)); // after the first paint
})();
