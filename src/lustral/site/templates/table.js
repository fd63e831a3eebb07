"use strict";
// All cells in one table: words and selects narrow it, column headings sort it, one page of rows is in the document.
(() => {
  const { make, unpack, isNumber, NAMES, show, count, compare, defenceName, distinct, readHash, writeHash, pageOf, fill } = lustral;
  const rows = unpack(LUSTRAL.cells);
  const form = document.getElementById("filters");
  const table = document.getElementById("cells");
  const SELECTS = ["data", "arch", "attack", "poison_rate", "defence", "clean_images", "kind", "status"];
  const SIZES = [25, 50, 100, 250];
  const LEAST_KEY = 6; // digits of a key that find it
  const FALLING = new Set(["der", "rir", "acc", "ra", "auroc", "tpr"]); // the best first
  const COLUMNS = [
    { id: "defence", name: "Defence", isText: true, print: defenceName },
    { id: "attack", name: "Attack", isText: true },
    { id: "data", name: "Data", isText: true, optional: true },
    { id: "arch", name: "Network", isText: true, optional: true },
    { id: "poison_rate", name: "Poison", optional: true, print: (value) => `${Number((100 * value).toPrecision(4))}%` },
    { id: "clean_images", name: "Clean", optional: true, print: count },
    { id: "seed", name: "Seed", optional: true },
    { id: "defence_seed", name: "Def. seed", optional: true },
    ...["der", "asr", "acc", "ra", "acc_loss", "seconds"].map((id) => (
      { id, name: lustral.METRICS[id].name, print: (value) => show(id, value) })),
    ...["auroc", "tpr", "fpr", "listed"].map((id) => (
      { id, name: lustral.METRICS[id].name, optional: true, print: (value) => show(id, value) })),
    { id: "verdict", name: "Outcome", isText: true },
  ];
  const TONES = { erased: "good", right: "good", failed: "bad", "not erased": "unsure", wrong: "unsure" };

  for (const row of rows) {
    row.verdict = verdictOf(row);
    row.words = ` ${wordsOf([row.title, row.verdict, row.arch, row.device, row.error].join(" ")).join(" ")}`;
  }
  const isOneNetworkEach = distinct(rows, "data").every((data) => distinct(rows.filter((row) => row.data === data), "arch").length === 1);
  const columns = COLUMNS.filter(({ id, optional }) =>
    !optional || (distinct(rows, id).length > 1 && !(id === "arch" && isOneNetworkEach)));
  const state = { filters: new Map(), words: "", sort: null, isFalling: false, page: 0, size: 50 };
  let waiting = 0; // timer of an address that is still to be written

  makeHead();
  for (const name of SELECTS) {
    const select = form.elements[name];
    fill(select, [["", "all"], ...distinct(rows, name).map((value) => [value, optionText(name, value)])], "");
    select.closest(".field").hidden = select.options.length < 3;
    select.addEventListener("change", () => {
      if (select.value) state.filters.set(name, select.value);
      else state.filters.delete(name);
      change();
    });
  }
  fill(form.elements.size, SIZES.map((size) => [size, `${size} rows`]), state.size);
  form.elements.size.addEventListener("change", () => { state.size = Number(form.elements.size.value); change(); });
  form.elements.q.addEventListener("input", () => {
    state.words = form.elements.q.value;
    change(400); // browsers allow a page only so many addresses in a while
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("clear").addEventListener("click", () => {
    state.filters.clear();
    state.words = "";
    change();
    form.elements.q.focus();
  });
  document.getElementById("previous").addEventListener("click", () => turn(-1));
  document.getElementById("next").addEventListener("click", () => turn(1));
  window.addEventListener("hashchange", read);
  read();

  function verdictOf(row) {
    if (row.status === "failed") return "failed";
    if (row.kind === "victim") return row.attack_method === "none" ? "benign model" : "victim";
    if (row.defence_kind === "detector") return row.correct === null ? row.outcome ?? "–" : row.correct ? "right" : "wrong";
    if (row.defence_kind === "sifter") return isNumber(row.auroc) ? `AUROC ${show("auroc", row.auroc)}` : "done";
    return row.erased === null ? "done" : row.erased ? "erased" : "not erased";
  }

  function wordsOf(text) {
    return text.toLowerCase().split(/[^\p{L}\p{N}.]+/u).filter(Boolean);
  }

  /** Say whether a row has a word that starts so, or such a key. */
  function hasWord(row, word) {
    return row.words.includes(` ${word}`) || (word.length >= LEAST_KEY && row.key.startsWith(word));
  }

  function optionText(name, value) {
    const column = COLUMNS.find(({ id }) => id === name);
    return column?.print ? column.print(value) : String(value);
  }

  function makeHead() {
    const line = make("tr");
    for (const column of columns) {
      const button = make("button", { type: "button" }, column.name);
      button.addEventListener("click", () => {
        state.isFalling = state.sort === column.id ? !state.isFalling : FALLING.has(column.id);
        state.sort = column.id;
        change();
      });
      column.head = make("th", { scope: "col", class: column.isText ? "text" : null }, button);
      line.append(column.head);
    }
    table.tHead.replaceChildren(line);
  }

  /** Take the state from the address. */
  function read() {
    clearTimeout(waiting);
    const params = readHash();
    state.filters.clear();
    for (const [name, value] of params) if (name in NAMES) state.filters.set(name, value);
    state.words = params.get("q") ?? "";
    const sort = params.get("sort") ?? "";
    state.isFalling = sort.startsWith("-");
    state.sort = columns.some(({ id }) => id === sort.replace("-", "")) ? sort.replace("-", "") : null;
    state.size = SIZES.includes(Number(params.get("size"))) ? Number(params.get("size")) : 50;
    state.page = Math.max(0, Number(params.get("page") ?? 1) - 1 || 0);
    render();
  }

  /** Show a changed state from its first page, and keep it in the address, after a pause in milliseconds. */
  function change(pause = 0) {
    state.page = 0;
    render();
    clearTimeout(waiting);
    if (pause) waiting = setTimeout(write, pause);
    else write();
  }

  function turn(by) {
    state.page += by;
    render();
    write();
    table.closest(".scroll").scrollTop = 0;
  }

  function write() {
    const params = new URLSearchParams([...state.filters]);
    if (state.words) params.set("q", state.words);
    if (state.sort) params.set("sort", (state.isFalling ? "-" : "") + state.sort);
    if (state.size !== 50) params.set("size", state.size);
    if (state.page) params.set("page", state.page + 1);
    writeHash(params);
  }

  function chosen() {
    const words = wordsOf(state.words);
    const filters = [...state.filters];
    const found = rows.filter((row) =>
      filters.every(([name, value]) => isValue(row[name], value)) &&
      words.every((word) => hasWord(row, word)));
    if (!state.sort) return found;
    const { sort, isFalling } = state;
    return found.sort((a, b) => { // rows is not touched: filter made a new list
      const [left, right] = [a[sort], b[sort]];
      if (left === null || right === null) return (left === null) - (right === null); // what has no value comes last
      return isFalling ? compare(right, left) : compare(left, right);
    });
  }

  /** Say whether a value is the one that an address names. */
  function isValue(value, text) {
    return isNumber(value) ? value === Number(text) : value !== null && String(value) === text;
  }

  function render() {
    const found = chosen();
    const pages = Math.max(1, Math.ceil(found.length / state.size));
    state.page = Math.min(state.page, pages - 1);
    const start = state.page * state.size;
    const visible = found.slice(start, start + state.size);

    table.tBodies[0].replaceChildren(...visible.map(lineOf));
    for (const { id, head } of columns) {
      if (id === state.sort) head.setAttribute("aria-sort", state.isFalling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    for (const name of SELECTS) form.elements[name].value = state.filters.get(name) ?? "";
    if (form.elements.q.value !== state.words) form.elements.q.value = state.words;
    form.elements.size.value = String(state.size);
    showChips();
    const among = found.length < rows.length ? ` found among ${count(rows.length)}` : "";
    document.getElementById("status").textContent = found.length
      ? `Rows ${count(start + 1)} to ${count(start + visible.length)} of ${count(found.length)}${among}`
      : "No row fits. Take a filter away.";
    document.getElementById("page").textContent = `Page ${state.page + 1} of ${pages}`;
    document.getElementById("previous").disabled = state.page === 0;
    document.getElementById("next").disabled = state.page >= pages - 1;
    document.getElementById("clear").disabled = !state.filters.size && !state.words;
  }

  /** Filters that have no select of their own come from links; each can be taken away. */
  function showChips() {
    const list = document.getElementById("chips");
    const others = [...state.filters].filter(([name, value]) =>
      !SELECTS.includes(name) || form.elements[name].value !== value || form.elements[name].closest(".field").hidden);
    list.replaceChildren(...others.map(([name, value]) => {
      const button = make("button", { type: "button", class: "button" }, `${NAMES[name]}: ${value} ✕`);
      button.setAttribute("aria-label", `Take the filter ${NAMES[name]} ${value} away`);
      button.addEventListener("click", () => { state.filters.delete(name); change(); });
      return make("li", {}, button);
    }));
  }

  function lineOf(row) {
    const line = make("tr");
    for (const column of columns) {
      const value = row[column.id];
      const text = value === null || value === undefined ? "–" : column.print ? column.print(value) : String(value);
      if (column.id === "defence") {
        line.append(make("th", { scope: "row" }, make("a", { href: pageOf(row) }, text)));
      } else if (column.id === "verdict") {
        line.append(make("td", { class: `text tone ${TONES[text] ?? "plain"}` }, text));
      } else {
        line.append(make("td", { class: column.isText ? "text" : null }, text));
      }
    }
    return line;
  }
})();
