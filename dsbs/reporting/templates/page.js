// The example browser, over base.js. Data reaches the page through textContent only.
(() => {
  const PAGE = 50;
  const EXCERPT = 240;
  let data, keys, shown = [], page = 0, waits = 0;

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  // Isolate text within a line, with its own bidirectional isolates balanced: an open one would change the text beside it.
  function isolated(text) {
    let [unopened, unclosed] = [0, 0];
    for (const c of text.match(/[\u2066-\u2069]/g) || []) {
      if (c !== "\u2069") unclosed++; else if (unclosed) unclosed--; else unopened++;
    }
    return element("bdi", null, "\u2068".repeat(unopened) + text + "\u2069".repeat(unclosed));
  }
  const block = (text) => element("p", { className: "text", dir: "auto" }, text);

  const title = (s) => (s.run ? `${s.run} / ${s.name}` : s.name);

  // The share of a system's seeds that got a row right; null without predictions.
  function score(system, row) {
    const marks = data.systems[system].members.map((m) => m.correct[row]).filter((c) => c !== "-" && c !== undefined);
    return marks.length ? marks.filter((c) => c === "1").length / marks.length : null;
  }

  const both = (a, b) => a !== null && b !== null;
  const FILTERS = [
    ["all", "all", () => true],
    ["wins", "wins", (a, b) => both(a, b) && a > b],
    ["losses", "losses", (a, b) => both(a, b) && a < b],
    ["both-wrong", "both wrong", (a, b) => both(a, b) && a === b && a < 0.5],
    ["both-right", "both right", (a, b) => both(a, b) && a === b && a >= 0.5],
    ["teacher-wrong", "teacher wrong, system right", (a, b, t) => both(a, t) && t < 0.5 && a >= 0.5],
  ];

  // A row's searchable text in lower case, built at the first search.
  function text(row) {
    keys ||= data.rows.map(([id, gold, , fields, why], i) => [
      id, gold || "", ...fields, ...Object.values(why),
      ...data.systems.flatMap((s) => s.members.map((m) => answer(m.answers[i]).text || "")),
    ].join("\n").toLowerCase());
    return keys[row];
  }
  const answer = (n) => (n < 0 ? {} : data.answers[n]);

  // Search waits for a pause in typing. Moving on to the rows ends the wait.
  function settle() {
    if (waits) search();
  }

  function search() {
    clearTimeout(waits);
    waits = 0;
    const words = at("query").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [first, second] = [Number(at("first").value), Number(at("second").value)];
    const teacher = data.systems[first].teacher;
    const chosen = document.querySelector("#filters input:checked").value;
    const matches = FILTERS.map(() => []);
    for (let row = 0; row < data.rows.length; row++) {
      if (!words.every((word) => text(row).includes(word))) continue;
      const scores = [score(first, row), score(second, row), teacher === null ? null : score(teacher, row)];
      FILTERS.forEach(([, , fits], i) => { if (fits(...scores)) matches[i].push(row); });
    }
    FILTERS.forEach(([name], i) => { at(`many-${name}`).textContent = number(matches[i].length); });
    shown = matches[FILTERS.findIndex(([name]) => name === chosen)];
    turn(0);
  }

  function turn(to) {
    page = to;
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    at("rows").replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(line));
    at("row-count").textContent = `${number(shown.length)} of ${number(data.rows.length)} rows`;
    at("page-number").textContent = `page ${number(page + 1)} of ${number(pages)}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page + 1 >= pages;
  }

  // A system's answers with the number of its seeds that gave each, the most frequent first.
  function answers(system, row) {
    const counts = new Map();
    for (const member of data.systems[system].members) {
      if (member.answers[row] < 0) continue;
      const { text, raw } = answer(member.answers[row]);
      const label = text === undefined ? `unreadable: ${raw}` : text;
      counts.set(label, (counts.get(label) || 0) + 1);
    }
    return [...counts].sort((a, b) => b[1] - a[1]);
  }

  // Right or wrong as a sign and a word, not by color alone; for several seeds, how many were right.
  function mark(system, row) {
    const share = score(system, row);
    if (share === null) return element("span", null, "–");
    const all = data.systems[system].members.filter((m) => m.correct[row] !== "-").length;
    const seeds = all > 1 ? ` ${Math.round(share * all)}/${all}` : "";
    const right = share >= 0.5;
    return element("span", { className: right ? "right" : "wrong" }, `${right ? "✓" : "✗"}${seeds}`,
      element("span", { className: "unseen" }, right ? " right" : " wrong"));
  }

  function gist(system, row) {
    return element("span", { className: "gist" }, element("small", null, isolated(title(data.systems[system]))),
      mark(system, row), " ", isolated((answers(system, row)[0] || ["–"])[0]));
  }

  // Where an answer differs from the gold label, part by part; null where labels have no parts.
  function differences(system, row, text) {
    const parts = data.parts && data.parts[data.systems[system].parts];
    const own = (object, key) => (object && Object.hasOwn(object, key) ? object[key] : null);
    const [ours, gold] = parts ? [own(parts.of, text), own(parts.of, data.rows[row][1])] : [];
    if (!ours || !gold) return null;
    const lines = [];
    for (const name of parts.names) {
      const [a, b] = [own(ours, name), own(gold, name)];
      if ((a ? a[1] : -1) === (b ? b[1] : -1)) continue;
      if ((a || b)[0] === name) lines.push(a ? `+ ${name}` : `− ${name}`);
      else lines.push(`${name}: ${a ? a[0] : "absent"} (gold: ${b ? b[0] : "absent"})`);
    }
    return lines;
  }

  // A system's answers, each on a line of its own or as its differences from the gold label.
  function given(system, row) {
    const counts = answers(system, row);
    const several = data.systems[system].members.length > 1;
    if (!counts.some(([text]) => differences(system, row, text))) {
      return [isolated(counts.map(([text, n]) => (several ? `${text} ×${n}` : text)).join(", ") || "–")];
    }
    return counts.map(([text, n]) => {
      const lines = differences(system, row, text) || [text];
      const times = several ? [` ×${n}`] : [];
      return element("div", null, ...(lines.length ? lines : ["as gold"]).map((line) => element("div", null, isolated(line))), ...times);
    });
  }

  function line(row) {
    const [id, gold, , fields] = data.rows[row];
    const excerpt = fields.length ? fields.flatMap((value) => [isolated(value.slice(0, EXCERPT)), " / "]).slice(0, -1) : [isolated(id)];
    const summary = element("summary", null, element("span", { className: "excerpt" }, ...excerpt),
      element("span", { className: "gist" }, element("small", null, "gold"), isolated(gold || "–")),
      gist(Number(at("first").value), row), gist(Number(at("second").value), row));
    const details = element("details", null, summary);
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(rowDetails(row));
    });
    return element("li", { id: `row-${row}` }, details);
  }

  function rowDetails(row) {
    const [id, gold, shape, fields, why] = data.rows[row];
    const input = element("div", { className: "fields" });
    fields.forEach((value, i) => {
      input.append(element("div", null, element("h4", null, isolated(data.shapes[shape][i])), block(value)));
    });
    const box = element("div", { className: "row" }, input, element("h4", null, "gold label"), block(gold || "–"));

    // Rationales of the teacher first, then of the two chosen systems, then of the rest.
    const [first, second] = [Number(at("first").value), Number(at("second").value)];
    const order = [...new Set([data.systems[first].teacher, first, second, ...data.systems.keys()])];
    const reasons = order.filter((s) => s !== null && why[s]).map((s) => element("div", null,
      element("h5", null, isolated(title(data.systems[s])), data.systems[s].members.length > 1 ? `, ${data.systems[s].members[0].name}` : ""),
      block(why[s])));
    if (reasons.length) box.append(element("h4", null, "rationales"), element("div", { className: "reasons" }, ...reasons));

    const table = element("tbody");
    data.systems.forEach((system, s) => {
      const probabilities = system.members.map((m) => (m.probability ? m.probability[row] : null)).filter((p) => p !== null && p !== undefined);
      table.append(element("tr", null, element("th", { scope: "row" }, isolated(title(system))),
        element("td", null, ...given(s, row)), element("td", null, mark(s, row)),
        element("td", { className: "n" }, probabilities.map((p) => `${p}%`).join(", ") || "–")));
    });
    const heads = ["system", "answer", "right", "probability"].map((h) => element("th", { scope: "col" }, h));
    box.append(element("h4", null, "answers"), element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "answers" },
      element("table", null, element("thead", null, element("tr", null, ...heads)), table)));
    box.append(element("p", { className: "notes" }, "id ", isolated(id)));
    return box;
  }

  // Move the focus over the rows, and beyond the last row to the next page.
  function move(by) {
    settle();
    const lines = [...at("rows").querySelectorAll("summary")];
    const here = lines.findIndex((summary) => summary.parentElement.contains(document.activeElement));
    let to = here < 0 ? 0 : here + by;
    if (to >= lines.length && !at("next").disabled) { turn(page + 1); to = 0; }
    else if (to < 0 && !at("previous").disabled) { turn(page - 1); to = PAGE - 1; }
    const target = at("rows").querySelectorAll("summary")[to];
    if (target) { target.focus(); target.scrollIntoView({ block: "nearest" }); }
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && event.target === at("query")) { move(0); return; }
    if (typing) return;
    const arrow = event.target.closest("#rows summary") && { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const by = arrow || { j: 1, k: -1 }[event.key];
    if (event.key === "/") { event.preventDefault(); at("query").focus(); at("query").select(); }
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
    at("query").addEventListener("input", () => { clearTimeout(waits); waits = setTimeout(search, 120); });
    at("browser").querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); settle(); });
    at("previous").addEventListener("click", () => turnTo(page - 1));
    at("next").addEventListener("click", () => turnTo(page + 1));
    document.addEventListener("keydown", key);
  }

  function turnTo(to) {
    turn(to);
    at("row-count").scrollIntoView({ block: "nearest" });
  }

  async function start() {
    const packed = at("packed").textContent;
    if (!packed) return;
    try {
      data = await unpack(packed);
    } catch (error) {
      at("waiting").textContent = `This browser cannot unpack the examples (${error.message}); use a browser of 2023 or later.`;
      return;
    }
    controls();
    search();
    at("waiting").hidden = true;
    at("browser").hidden = false;
  }

  // Open all sections for printing.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.printed:not([open])")];
    opened.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));

  at("waiting").className = "notes";
  at("waiting").textContent = "Unpacking the examples …";
  requestAnimationFrame(() => setTimeout(start)); // after the first paint
})();
