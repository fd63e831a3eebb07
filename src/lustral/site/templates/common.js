"use strict";
// What the pages with data share: tables sent by columns, numbers in words, the address's hash as state, selects.
// Text reaches the page through textContent and setAttribute only, so data never becomes markup.
window.lustral = (() => {
  /** Make an element: properties, then children (nodes or text). */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  /** Make an SVG element. */
  function draw(tag, attributes = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  /** Turn {column: [values] or {words, codes}} into a list of row objects. */
  function unpack(table) {
    const columns = Object.entries(table.columns).map(([name, column]) => [
      name,
      Array.isArray(column) ? column : column.codes.map((code) => (code < 0 ? null : column.words[code])),
    ]);
    return Array.from({ length: table.length }, (_, index) => {
      const row = {};
      for (const [name, values] of columns) row[name] = values[index];
      return row;
    });
  }

  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const fixed = (digits) => (value) => value.toFixed(digits);
  const percent = (digits) => (value) => `${(100 * value).toFixed(digits)}%`;

  function points(value, digits = 1) {
    const rounded = Number((100 * value).toFixed(digits));
    return `${rounded > 0 ? "+" : rounded < 0 ? "−" : ""}${Math.abs(rounded).toFixed(digits)}`;
  }

  function seconds(value) {
    if (value < 10) return `${value.toPrecision(2)} s`;
    if (value < 100) return `${value.toFixed(0)} s`;
    if (value < 6000) return `${(value / 60).toFixed(value < 600 ? 1 : 0)} min`;
    return `${(value / 3600).toFixed(value < 36000 ? 1 : 0)} h`;
  }

  /**
   * What is measured: name, how it prints, which way is better (+1, -1), the ends of the colour scale (null: from the
   * data), and the half width of an interval.
   */
  const METRICS = {
    der: { name: "DER", long: "defence effectiveness (DER)", print: fixed(3), better: 1, range: [0.5, 1] },
    asr: { name: "ASR", long: "attack success rate (ASR)", print: percent(1), better: -1, range: [0, 1] },
    acc: { name: "ACC", long: "clean accuracy (ACC)", print: percent(1), better: 1, range: null },
    ra: { name: "RA", long: "robust accuracy (RA)", print: percent(1), better: 1, range: [0, 1] },
    rir: { name: "RIR", long: "robust improvement (RIR)", print: fixed(3), better: 1, range: [0.5, 1] },
    acc_loss: { name: "ACC loss", long: "accuracy lost (percentage points)", print: points, better: -1, range: [0, 0.1] },
    correct: { name: "Right", long: "right verdicts of detectors", print: percent(0), better: 1, range: [0, 1] },
    erased: { name: "Erased", long: "share of models erased", print: percent(0), better: 1, range: [0, 1] },
    auroc: { name: "AUROC", long: "ranking of the poisoned images (AUROC)", print: fixed(3), better: 1, range: [0.5, 1] },
    tpr: { name: "TPR", long: "poisoned images listed (TPR)", print: percent(1), better: 1, range: [0, 1] },
    fpr: { name: "FPR", long: "clean images listed (FPR)", print: percent(1), better: -1, range: [0, 0.1] },
    listed: { name: "Listed", long: "share of images listed", print: percent(1), better: -1, range: [0, 0.2] },
    seconds: { name: "Time", long: "time of the defence", print: seconds, better: -1, range: null, log: true },
  };

  const show = (metric, value) => (isNumber(value) ? METRICS[metric].print(value) : "–");
  const count = (value) => value.toLocaleString("en-GB");
  const compare = (a, b) =>
    isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  const distinct = (rows, column) =>
    [...new Set(rows.map((row) => row[column]))].filter((value) => value !== null && value !== undefined).sort(compare);

  /** Return a column's most frequent value that is not null. */
  function commonest(rows, column) {
    const counts = new Map();
    for (const row of rows) if (row[column] !== null) counts.set(row[column], (counts.get(row[column]) ?? 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? null;
  }

  /** What a defence is called on the pages. */
  const defenceName = (name) => (name === "none" ? "no defence" : name);

  /** Return a name with places where a narrow heading may break it. */
  function breakable(name) {
    return name.split(/(?<=[_=:,]|\.(?=[a-z]))/).flatMap((part, index) => (index ? [make("wbr"), part] : [part]));
  }

  const readHash = () => new URLSearchParams(location.hash.slice(1));

  /** Keep the state in the address, without a new entry in the history. */
  function writeHash(params) {
    const text = `#${params}`;
    if (location.hash === text || (text === "#" && !location.hash)) return;
    try {
      history.replaceState(null, "", text);
    } catch {
      location.hash = text;
    }
  }

  /** Return an address of the table that shows the rows with these values. */
  function tableLink(values) {
    const params = new URLSearchParams();
    for (const [name, value] of Object.entries(values)) {
      if (value !== null && value !== undefined) params.set(name, value);
    }
    return `table.html#${params}`;
  }

  const pageOf = (row) => `${row.kind === "victim" ? "victims" : "cells"}/${row.key}.html`;

  /** Fill a select: options are [value, text]; keep the chosen value if it is still there. */
  function fill(select, options, chosen) {
    select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
    const wanted = String(chosen);
    select.value = options.some(([value]) => String(value) === wanted) ? wanted : String(options[0]?.[0] ?? "");
    return select.value;
  }

  const NAMES = {
    data: "Data set", arch: "Network", attack: "Attack", attack_method: "Attack method", poison_rate: "Poison rate",
    defence: "Defence", defence_method: "Defence method", defence_kind: "Kind", clean_images: "Clean images", seed: "Seed",
    defence_seed: "Defence seed", status: "State", kind: "Record", victim_key: "Victim", device: "Device",
  };

  /**
   * The selects that pick one experiment: data set and network, then poison rate and clean budget, each one value or
   * "each". A row without poison rate (a benign model) or budget (no defence) belongs to all of them.
   */
  class Slice {
    constructor(form, rows, onChange) {
      this.rows = rows;
      this.selects = {};
      for (const name of ["data", "arch", "poison_rate", "clean_images"]) {
        this.selects[name] = form.elements[name];
        this.selects[name].addEventListener("change", () => {
          this.refresh();
          onChange();
        });
      }
      this.refresh(readHash());
    }

    refresh(params = null) {
      let rows = this.rows;
      for (const [name, select] of Object.entries(this.selects)) {
        const values = distinct(rows, name);
        const isFree = name === "poison_rate" || name === "clean_images";
        const options = values.map((value) => [value, this.text(name, value)]);
        if (isFree && values.length > 1) options.push(["each", "each on its own"]);
        const chosen = fill(select, options, params?.get(name) ?? (select.value || commonest(rows, name)));
        select.closest(".field").hidden = options.length < 2;
        if (chosen !== "each") rows = rows.filter((row) => String(row[name]) === chosen || (isFree && row[name] === null));
      }
      this.shown = rows;
    }

    text(name, value) {
      if (name === "poison_rate") return `${Number((100 * value).toPrecision(4))}%`;
      return name === "clean_images" ? count(value) : String(value);
    }

    /** Return the chosen values; "each" and empty ones are left out. */
    values() {
      const chosen = {};
      for (const [name, select] of Object.entries(this.selects)) {
        if (select.value && select.value !== "each") chosen[name] = select.value;
      }
      return chosen;
    }

    isMixed(name) {
      return this.selects[name].value === "each";
    }

    store(params) {
      for (const [name, select] of Object.entries(this.selects)) if (select.value) params.set(name, select.value);
    }
  }

  return {
    make, draw, unpack, isNumber, METRICS, NAMES, show, count, compare, distinct, defenceName, breakable, readHash, writeHash, tableLink,
    pageOf, fill, Slice,
  };
})();
