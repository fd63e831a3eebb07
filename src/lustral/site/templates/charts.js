"use strict";
// Two charts: accuracy against attack success, and time against effect. Each is one stop for the Tab key; arrow keys go from point
// to point, the line below says what a point is, Enter opens it.
(() => {
  const {
    make, draw, unpack, isNumber, METRICS, show, count, compare, defenceName, distinct, readHash, writeHash, tableLink, pageOf, fill, Slice,
  } = lustral;
  const cells = unpack(LUSTRAL.cells);
  const settings = unpack(LUSTRAL.settings);
  const means = unpack(LUSTRAL.means);
  const form = document.getElementById("chart-form");
  const MOST_WHISKERS = 600; // more intervals are a grey wash
  const MOST_CELLS = 300; // more single cells start out as means over seeds
  const MOST_ROWS = 100; // of the table under a chart
  const MOST_STYLES = 8;
  const SHAPES = [
    (x, y) => `M${x - 4} ${y}a4 4 0 1 0 8 0a4 4 0 1 0-8 0`,
    (x, y) => `M${x - 3.6} ${y - 3.6}h7.2v7.2h-7.2z`,
    (x, y) => `M${x} ${y - 4.6}l4.4 7.6h-8.8z`,
    (x, y) => `M${x} ${y - 5}l5 5l-5 5l-5-5z`,
    (x, y) => `M${x - 4} ${y - 4}l8 8m0-8l-8 8`,
    (x, y) => `M${x - 5} ${y}h10m-5-5v10`,
    (x, y) => `M${x} ${y + 4.6}l4.4-7.6h-8.8z`,
    (x, y) => `M${x - 4} ${y - 4}h8l-8 8h8z`,
  ];
  const PLACES = [ // of a name beside its point
    [9, 4, "start"], [-9, 4, "end"], [0, -10, "middle"], [0, 18, "middle"], [7, -8, "start"], [7, 16, "start"],
    [-7, -8, "end"], [-7, 16, "end"],
  ];
  const clean = (value) => String(Number(value.toPrecision(6)));
  const TICKS = {
    der: clean,
    seconds: (value) => (value < 60 ? `${clean(value)} s` : value < 3600 ? `${clean(value / 60)} min` : `${clean(value / 3600)} h`),
  };
  const REST = (x, y) => `M${x - 2.5} ${y}a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0`;

  const slice = new Slice(form, settings, () => { pickAttacks(); change(); });
  const { attack: attackSelect, unit: unitSelect, effect: effectSelect } = form.elements;
  let highlighted = null; // defences with a colour and a shape; null: the best ones
  let width = 0; // of a chart, in pixels

  function restore() {
    const params = readHash();
    pickAttacks(params.get("attack"));
    unitSelect.value = ["cells", "settings"].includes(params.get("unit")) ? params.get("unit")
      : pointsOfCells().length > MOST_CELLS ? "settings" : "cells";
    effectSelect.value = params.get("effect") === "asr" ? "asr" : "der";
    highlighted = params.has("show") ? params.getAll("show").filter(Boolean) : null;
    if (width) render();
  }

  function pickAttacks(wanted = attackSelect.value) {
    const attacks = distinct(slice.shown.filter((row) => row.attack !== "benign"), "attack");
    fill(attackSelect, [["", "all"], ...attacks.map((name) => [name, name])], wanted ?? "");
  }

  function change() {
    const params = new URLSearchParams();
    slice.store(params);
    if (attackSelect.value) params.set("attack", attackSelect.value);
    params.set("unit", unitSelect.value);
    params.set("effect", effectSelect.value);
    if (highlighted !== null) for (const name of highlighted.length ? highlighted : [""]) params.append("show", name);
    writeHash(params);
    render();
  }

  function isIn(row) {
    const isFree = (name) => row[name] === null && (name === "poison_rate" || name === "clean_images");
    return Object.entries(slice.values()).every(([name, value]) => String(row[name]) === value || isFree(name)) &&
      (!attackSelect.value || row.attack === attackSelect.value);
  }

  // -- what is drawn --------------------------------------------------------------------------------------------------

  function pointsOfCells() {
    return cells.filter((row) => row.status === "done" && isIn(row) && isNumber(row.acc) && isNumber(row.asr)).map((row) => ({
      x: row.asr, y: row.acc, left: row.asr_low, right: row.asr_high, low: row.acc_low, high: row.acc_high,
      series: row.defence ?? "none", href: pageOf(row), name: row.title,
    }));
  }

  function pointsOfSettings() {
    return settings.filter((row) => isIn(row) && isNumber(row.acc) && isNumber(row.asr)).map((row) => ({
      x: row.asr, y: row.acc, left: row.asr_low, right: row.asr_high, low: row.acc_low, high: row.acc_high,
      series: row.defence, href: linkOf(row), name: `${defenceName(row.defence)} against ${row.attack}${extra(row)}, mean of ${row.acc_n}`,
    }));
  }

  function pointsOfFrontier(effect) {
    const rows = (attackSelect.value ? settings : means).filter((row) =>
      isIn({ ...row, attack: row.attack ?? attackSelect.value }) && row.defence !== "none" && isNumber(row.seconds) && row.seconds > 0 &&
      isNumber(row[effect]));
    const points = rows.map((row) => ({
      x: row.seconds, left: row.seconds_low, right: row.seconds_high,
      y: row[effect], low: row[`${effect}_low`], high: row[`${effect}_high`],
      series: row.defence, href: linkOf(row), label: row.defence + extra(row),
      name: `${row.defence}${extra(row)}${attackSelect.value ? ` against ${row.attack}` : `, mean over ${row[`${effect}_n`]} attacks`}`,
    }));
    const sign = METRICS[effect].better;
    let best = -Infinity;
    for (const point of [...points].sort((a, b) => a.x - b.x || sign * (b.y - a.y))) {
      point.isFront = sign * point.y > best; // nothing cheaper is as good
      best = Math.max(best, sign * point.y);
    }
    return points;
  }

  function extra(row) {
    const parts = [];
    if (slice.isMixed("poison_rate") && row.poison_rate !== null) parts.push(slice.text("poison_rate", row.poison_rate));
    if (slice.isMixed("clean_images") && row.clean_images !== null) parts.push(`${row.clean_images} images`);
    return parts.length ? ` (${parts.join(", ")})` : "";
  }

  function linkOf({ data, arch, attack, poison_rate, clean_images, defence }) {
    return tableLink({ data, arch, attack, poison_rate, clean_images, defence });
  }

  // -- the page -------------------------------------------------------------------------------------------------------

  function render() {
    const rate = unitSelect.value === "cells" ? pointsOfCells() : pointsOfSettings();
    const effect = effectSelect.value;
    const cost = pointsOfFrontier(effect);
    const defences = distinct([...rate, ...cost], "series");
    const styles = stylesOf(defences);
    showLegend(defences, styles);
    const axis = (metric) => ({
      title: METRICS[metric].long, short: METRICS[metric].name, isShare: metric !== "seconds", print: (value) => show(metric, value),
      tick: TICKS[metric] ?? ((value) => `${clean(100 * value)}%`),
    });
    const what = unitSelect.value === "cells" ? "cells" : "means over seeds";
    plot("scatter", rate, styles, {
      x: { ...axis("asr"), title: "attack success rate (ASR), lower is better" },
      y: { ...axis("acc"), title: "clean accuracy (ACC), higher is better" }, what,
    });
    plot("frontier", cost, styles, {
      x: { ...axis("seconds"), title: "time of the defence, logarithmic", isLog: true },
      y: { ...axis(effect), title: `${METRICS[effect].long}, ${METRICS[effect].better > 0 ? "higher" : "lower"} is better` },
      what: "defences", isFrontier: true,
    });
    showDevices();
  }

  function showDevices() {
    const results = cells.filter((row) => row.kind !== "victim" && row.status === "done" && isIn(row));
    const machines = new Set(results.map((row) => `${row.device}, ${row.threads} threads`));
    const note = document.getElementById("machines");
    note.hidden = machines.size < 2;
    note.textContent = `These times were taken on different machines and are not comparable: ${[...machines].sort().join("; ")}.`;
  }

  function stylesOf(defences) {
    const rated = means.filter((row) => isIn({ ...row, attack: attackSelect.value || null }) && isNumber(row.der));
    const scores = new Map(rated.map((row) => [row.defence, row.der]));
    const best = [...defences].sort((a, b) => (b === "none") - (a === "none") || (scores.get(b) ?? -1) - (scores.get(a) ?? -1));
    const wanted = (highlighted ?? best.slice(0, MOST_STYLES)).filter((name) => defences.includes(name)).slice(0, MOST_STYLES);
    const ordered = wanted.sort(compare);
    return new Map(ordered.map((name, index) => [name, index]));
  }

  function showLegend(defences, styles) {
    const list = document.getElementById("legend");
    const known = new Map([...list.children].map((item) => [item.dataset.name, item]));
    const items = defences.map((name) => known.get(name) ?? legendItem(name));
    if (items.length !== known.size || items.some((item, index) => item !== list.children[index])) list.replaceChildren(...items);
    for (const item of items) { // in place: the focus stays where it is
      const box = item.querySelector("input"), style = styles.get(item.dataset.name);
      box.checked = style !== undefined;
      box.disabled = !box.checked && styles.size >= MOST_STYLES;
      item.querySelector("svg").replaceWith(symbol(style));
    }
  }

  function legendItem(name) {
    const box = make("input", { type: "checkbox" });
    box.addEventListener("change", () => {
      const boxes = [...document.querySelectorAll("#legend li")].filter((item) => item.querySelector("input").checked);
      highlighted = boxes.map((item) => item.dataset.name);
      change();
    });
    return make("li", { "data-name": name }, make("label", {}, box, symbol(undefined), defenceName(name)));
  }

  function symbol(style) {
    const shape = style === undefined ? REST : SHAPES[style];
    return draw("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" },
      draw("path", { d: shape(8, 8), class: `mark ${style === undefined ? "rest" : `k${style}`}`, fill: "none" }));
  }

  // -- one chart ------------------------------------------------------------------------------------------------------

  function plot(id, points, styles, { x, y, what, isFrontier = false }) {
    const holder = document.getElementById(id);
    const readout = document.getElementById(`${id}-readout`);
    const rows = document.getElementById(`${id}-rows`);
    document.getElementById(`${id}-details`).hidden = !points.length;
    if (!points.length) {
      holder.replaceChildren(make("p", { class: "soft" }, "Nothing was measured here. Choose other values above."));
      readout.hidden = true;
      return;
    }
    readout.hidden = false;
    const isNarrow = width < 480;
    const height = Math.round(Math.min(460, Math.max(300, width * 0.55)));
    const box = { left: isNarrow ? 46 : 60, right: width - 12, top: 26, bottom: height - 44 };
    const hasWhiskers = points.length <= MOST_WHISKERS;
    const across = axisOf(valuesOf(points, ["x", "left", "right"], hasWhiskers, x), [box.left, box.right], x.isLog, isNarrow ? 4 : 7);
    const up = axisOf(valuesOf(points, ["y", "low", "high"], hasWhiskers, y), [box.bottom, box.top], false, 6);
    const svg = draw("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, tabindex: "0", role: "application", "aria-roledescription": "chart",
      "aria-label": `${y.title} against ${x.title}: ${points.length} ${what}. Arrow keys move between points, Enter opens one. ` +
        "The table below has the numbers.",
    });
    const grid = draw("g");
    for (const [value, place] of up.ticks) {
      grid.append(draw("line", { class: "grid", x1: box.left, x2: box.right, y1: place, y2: place }),
        draw("text", { x: box.left - 6, y: place + 4, "text-anchor": "end" }, y.tick(value)));
    }
    for (const [value, place] of across.ticks) {
      grid.append(draw("line", { class: "grid", x1: place, x2: place, y1: box.top, y2: box.bottom }),
        draw("text", { x: place, y: box.bottom + 17, "text-anchor": "middle" }, x.tick(value)));
    }
    grid.append(draw("text", { class: "title", x: 0, y: 12 }, y.title),
      draw("text", { class: "title", x: box.right, y: height - 8, "text-anchor": "end" }, x.title));
    svg.append(grid);

    for (const point of points) {
      point.px = across.at(point.x);
      point.py = up.at(point.y);
    }
    if (isFrontier) svg.append(frontLine(points, box));
    const groups = groupBy(points, (p) => styles.get(p.series));
    for (const [style, group] of [...groups].sort((a, b) => (a[0] ?? -1) - (b[0] ?? -1))) {
      const colour = style === undefined ? "rest" : `k${style}`;
      const shape = style === undefined ? REST : SHAPES[style];
      if (hasWhiskers) svg.append(draw("path", { class: `whisker ${colour}`, d: group.map((p) => whiskers(p, across, up)).join("") }));
      svg.append(draw("path", { class: `points ${colour}`, d: group.map((p) => shape(round(p.px), round(p.py))).join("") }));
    }
    if (isFrontier) svg.append(names(points, box, isNarrow));
    const ring = draw("circle", { class: "ring", r: 8, visibility: "hidden" });
    svg.append(ring);
    const lines = hasWhiskers ? "Thin lines are 95% intervals."
      : `Intervals are drawn for up to ${MOST_WHISKERS} points; the table has them.`;
    const front = "The dashed line joins those that no other is both faster and better than (the Pareto front). ";
    document.getElementById(`${id}-note`).textContent = `${count(points.length)} ${what}. ${isFrontier ? front : ""}${lines}`;
    readout.textContent = "Point at a symbol, or press Tab until the chart has the focus and use the arrow keys.";
    holder.replaceChildren(svg);
    listen(svg, points, ring, readout, { x, y });
    list(rows, points, { x, y, isFrontier });
  }

  function groupBy(items, keyOf) {
    const groups = new Map();
    for (const item of items) {
      const key = keyOf(item);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(item);
    }
    return groups;
  }

  const round = (value) => Math.round(10 * value) / 10;

  /** Return what an axis has to hold: the points, and their intervals where they are drawn; shares end at 0 and 1. */
  function valuesOf(points, [middle, ...ends], hasWhiskers, { isShare }) {
    const values = points.map((point) => point[middle]);
    if (hasWhiskers && isShare) {
      const known = ends.flatMap((end) => points.map((point) => point[end])).filter(isNumber);
      values.push(...known.map((value) => Math.min(1, Math.max(0, value))));
    }
    return values;
  }

  /** Return {at(value) -> pixels, ticks: [[value, pixels]]} of an axis that holds all values. */
  function axisOf(values, [from, to], isLog, mostTicks) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    const scale = isLog ? Math.log10 : (value) => value;
    let start = scale(low), end = scale(high);
    const pad = Math.max(0.05 * (end - start), isLog ? 0.1 : 0.01);
    start -= pad;
    end += pad;
    const at = (value) => from + ((scale(value) - start) / (end - start)) * (to - from);
    const cut = (value) => round(isLog && value <= 0 ? from : Math.min(Math.max(at(value), Math.min(from, to)), Math.max(from, to)));
    const ticks = isLog ? logTicks(start, end, mostTicks) : linearTicks(start, end, mostTicks);
    return { at, cut, ticks: ticks.map((value) => [value, at(value)]) };
  }

  function linearTicks(start, end, most) {
    const rough = (end - start) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
    const ticks = [];
    for (let value = Math.ceil(start / step) * step; value <= end + 1e-9; value += step) {
      const tick = Number(value.toPrecision(8));
      if (tick > -1e-9 && tick < 1 + 1e-9) ticks.push(Math.abs(tick) < 1e-9 ? 0 : tick); // shares lie in [0, 1]
    }
    return ticks;
  }

  function logTicks(start, end, most) {
    for (const factors of [[1, 2, 5], [1, 3], [1]]) {
      const ticks = [];
      for (let power = Math.floor(start); power <= end; power += 1) {
        for (const factor of factors) {
          const value = factor * 10 ** power;
          if (Math.log10(value) >= start && Math.log10(value) <= end) ticks.push(value);
        }
      }
      if (ticks.length <= most + 1) return ticks;
    }
    const all = Array.from({ length: Math.floor(end) - Math.ceil(start) + 1 }, (_, index) => 10 ** (Math.ceil(start) + index));
    return all.filter((_, index) => index % Math.ceil(all.length / most) === 0);
  }

  /** Draw a point's intervals, cut off at the ends of the axes. */
  function whiskers(point, across, up) {
    let path = "";
    if (isNumber(point.left) && isNumber(point.right)) path += `M${across.cut(point.left)} ${round(point.py)}H${across.cut(point.right)}`;
    if (isNumber(point.low) && isNumber(point.high)) path += `M${round(point.px)} ${up.cut(point.low)}V${up.cut(point.high)}`;
    return path;
  }

  /** Return the Pareto front as steps: to the right of a point, its effect can be had. */
  function frontLine(points, box) {
    const front = points.filter((p) => p.isFront).sort((a, b) => a.px - b.px);
    const path = front.map((p, index) => `${index ? `H${round(p.px)}V` : `M${round(p.px)} `}${round(p.py)}`).join("");
    return draw("path", { class: "front", d: `${path}H${box.right}` });
  }

  /** Write names beside points, the front's first; those that would cover another name or point are left out. */
  function names(points, box, isNarrow) {
    const group = draw("g");
    const taken = points.map((p) => ({ left: p.px - 5, right: p.px + 5, top: p.py - 5, bottom: p.py + 5 }));
    const hits = (a) => taken.some((b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom);
    for (const point of [...points].sort((a, b) => Number(b.isFront) - Number(a.isFront))) {
      const size = 6.6 * point.label.length;
      for (const [dx, dy, anchor] of PLACES) {
        const left = point.px + dx - (anchor === "start" ? 0 : anchor === "end" ? size : size / 2);
        const place = { left, right: left + size, top: point.py + dy - 11, bottom: point.py + dy + 3 };
        const isInside = place.left >= box.left && place.right <= box.right && place.top >= box.top - 8 && place.bottom <= box.bottom;
        if (!isInside || hits(place)) continue;
        taken.push(place);
        group.append(draw("text", { class: "name", x: round(point.px + dx), y: round(point.py + dy), "text-anchor": anchor }, point.label));
        break;
      }
      if (isNarrow && group.childElementCount >= 8) break;
    }
    return group;
  }

  // -- pointing, keys, numbers ----------------------------------------------------------------------------------------

  function listen(svg, points, ring, readout, axes) {
    const ordered = [...points].sort((a, b) => a.px - b.px || a.py - b.py);
    let current = -1;
    const choose = (index) => {
      current = index;
      const point = ordered[index];
      ring.setAttribute("cx", point.px);
      ring.setAttribute("cy", point.py);
      ring.setAttribute("visibility", "visible");
      readout.replaceChildren(make("a", { href: point.href }, point.name), ` – ${describe(point, axes)}`);
    };
    const nearest = (event) => {
      const frame = svg.getBoundingClientRect();
      const x = (event.clientX - frame.left) * (width / frame.width), y = (event.clientY - frame.top) * (width / frame.width);
      let best = -1, least = 24 * 24;
      ordered.forEach((point, index) => {
        const distance = (point.px - x) ** 2 + (point.py - y) ** 2;
        if (distance < least) [best, least] = [index, distance];
      });
      return best;
    };
    svg.addEventListener("pointermove", (event) => {
      const index = nearest(event);
      svg.style.cursor = index < 0 ? "" : "pointer";
      if (index >= 0 && index !== current) choose(index);
    });
    svg.addEventListener("click", (event) => {
      const index = nearest(event);
      if (index < 0) return;
      choose(index);
      if (event.pointerType !== "touch") location.href = ordered[index].href; // a finger gets the link below
    });
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 };
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Enter" && current >= 0) location.href = ordered[current].href;
      else if (event.key === "Home") choose(0);
      else if (event.key === "End") choose(ordered.length - 1);
      else if (event.key in steps) choose(current < 0 ? 0 : Math.min(ordered.length - 1, Math.max(0, current + steps[event.key])));
      else return;
      event.preventDefault();
    });
    svg.addEventListener("focus", () => { if (current < 0 && svg.matches(":focus-visible")) choose(0); });
  }

  const interval = (axis, low, high) => (isNumber(low) && isNumber(high) ? ` (${axis.print(low)} to ${axis.print(high)})` : "");
  function describe(point, { x, y }) {
    const up = `${y.short} ${y.print(point.y)}${interval(y, point.low, point.high)}`;
    const across = `${x.short} ${x.print(point.x)}${interval(x, point.left, point.right)}`;
    return `${up}, ${across}${point.isFront ? ", on the Pareto front" : ""}`;
  }

  /** The numbers behind a chart, best first, for those who would rather read them. */
  function list(body, points, { x, y, isFrontier }) {
    const ordered = [...points].sort((a, b) => (isFrontier ? a.x - b.x : a.x - b.x || b.y - a.y));
    body.replaceChildren(...ordered.slice(0, MOST_ROWS).map((point) => make("tr", {},
      make("th", { scope: "row" }, make("a", { href: point.href }, point.name)),
      make("td", {}, x.print(point.x), make("span", { class: "soft" }, interval(x, point.left, point.right))),
      make("td", {}, y.print(point.y), make("span", { class: "soft" }, interval(y, point.low, point.high))),
      ...(isFrontier ? [make("td", { class: "front-mark" }, point.isFront ? "yes" : "no")] : []))));
    const holder = body.closest("details");
    for (const [name, axis] of [["x", x], ["y", y]]) holder.querySelector(`.${name}-name`).textContent = axis.short;
    holder.querySelector(".more").textContent = ordered.length > MOST_ROWS
      ? `The first ${MOST_ROWS} of ${count(ordered.length)} points. ` : "";
    holder.querySelector("a.all").href = tableLink({ ...slice.values(), attack: attackSelect.value || null });
  }

  restore();
  for (const select of [attackSelect, unitSelect, effectSelect]) select.addEventListener("change", change);
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", () => { slice.refresh(readHash()); restore(); });
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) > 4) {
      width = entry.contentRect.width;
      render();
    }
  }).observe(document.getElementById("scatter"));
})();
