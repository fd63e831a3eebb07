"use strict";
// The heat maps: attacks down, defences across, one mean over seeds in each cell.
(() => {
  const { make, unpack, isNumber, METRICS, show, compare, defenceName, breakable, readHash, writeHash, tableLink, fill, Slice } = lustral;
  const form = document.getElementById("heat-form");
  const holder = document.getElementById("heat");
  if (!form) return;
  const settings = unpack(LUSTRAL.settings);
  const means = unpack(LUSTRAL.means);
  const HAS_REFERENCE = new Set(["acc", "asr", "ra"]); // where the victim's own number is worth a column
  const slice = new Slice(form, settings, change);
  const { metric: metricSelect, order: orderSelect } = form.elements;

  const measured = Object.keys(METRICS).filter((name) =>
    settings.some((row) => row.defence !== "none" && isNumber(row[name])));
  fill(metricSelect, measured.map((name) => [name, METRICS[name].long]), readHash().get("metric") ?? "der");
  if (readHash().get("order")) orderSelect.value = readHash().get("order");
  for (const select of [metricSelect, orderSelect]) select.addEventListener("change", change);
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", () => {
    const params = readHash();
    slice.refresh(params);
    if (params.get("metric") in METRICS) metricSelect.value = params.get("metric");
    render();
  });
  holder.addEventListener("keydown", walk);
  render();

  function nameOf(row, kind) {
    if (kind === "attack") {
      return slice.isMixed("poison_rate") && row.poison_rate !== null
        ? `${row.attack}, ${slice.text("poison_rate", row.poison_rate)}` : row.attack;
    }
    return slice.isMixed("clean_images") && row.clean_images !== null ? `${row.defence}, ${row.clean_images} images` : row.defence;
  }

  function change() {
    const params = new URLSearchParams();
    slice.store(params);
    params.set("metric", metricSelect.value);
    if (orderSelect.value !== "name") params.set("order", orderSelect.value);
    writeHash(params);
    render();
  }

  function render() {
    const metric = metricSelect.value;
    const shown = slice.shown.filter((row) => HAS_REFERENCE.has(metric) || row.defence !== "none");
    const measuredNames = new Set(shown.filter((row) => isNumber(row[metric])).map((row) => nameOf(row, "defence")));
    const rows = shown.filter((row) => measuredNames.has(nameOf(row, "defence")));
    const footer = slice.isMixed("poison_rate") || slice.isMixed("clean_images") ? new Map() : footerOf(metric);
    const attacks = [...new Set(rows.map((row) => nameOf(row, "attack")))].sort(benignLast);
    const defences = ordered([...measuredNames], rows, metric, footer);
    const cells = new Map(rows.map((row) => [`${nameOf(row, "attack")}\n${nameOf(row, "defence")}`, row]));
    const scale = scaleOf(metric, rows);
    showScale(metric, scale);

    if (!rows.length) {
      holder.replaceChildren(make("p", { class: "soft" }, "Nothing was measured here. Choose other values above."));
      return;
    }
    const table = make("table", { class: "heat" });
    table.append(make("caption", { class: "unseen" }, `${METRICS[metric].long}: attacks down, defences across`));
    const heads = defences.map((name) => make("th", { scope: "col" }, ...breakable(defenceName(name))));
    table.append(make("thead", {}, make("tr", {}, make("td", {}), ...heads)));
    const body = make("tbody");
    for (const attack of attacks) {
      const line = make("tr", {}, make("th", { scope: "row" }, ...breakable(attack)));
      for (const defence of defences) line.append(cellOf(cells.get(`${attack}\n${defence}`), metric, scale, attack, defence));
      body.append(line);
    }
    table.append(body);
    if (footer.size) {
      const line = make("tr", {}, make("th", { scope: "row" }, "mean over attacks"));
      for (const defence of defences) line.append(cellOf(footer.get(defence), metric, scale, null, defence));
      table.append(make("tfoot", {}, line));
    }
    holder.replaceChildren(table);
    holder.querySelector("a")?.setAttribute("tabindex", "0");
  }

  function footerOf(metric) {
    const chosen = slice.values();
    const fits = (row, name) => row[name] === null || chosen[name] === undefined || String(row[name]) === chosen[name];
    const rows = means.filter((row) => ["data", "arch", "poison_rate", "clean_images"].every((name) => fits(row, name)));
    return new Map(rows.filter((row) => isNumber(row[metric])).map((row) => [row.defence, row]));
  }

  function benignLast(a, b) {
    return (a === "benign") - (b === "benign") || compare(a, b);
  }

  function ordered(names, rows, metric, footer) {
    const mean = (name) => {
      if (footer.has(name)) return footer.get(name)[metric];
      const values = rows.filter((row) => nameOf(row, "defence") === name && isNumber(row[metric])).map((row) => row[metric]);
      return values.reduce((sum, value) => sum + value, 0) / values.length;
    };
    const byName = (a, b) => (b === "none") - (a === "none") || compare(a, b);
    if (orderSelect.value === "name") return names.sort(byName);
    const means_ = new Map(names.map((name) => [name, mean(name)]));
    return names.sort((a, b) => (b === "none") - (a === "none") || METRICS[metric].better * (means_.get(b) - means_.get(a)));
  }

  function scaleOf(metric, rows) {
    const { range, log } = METRICS[metric];
    if (range) return { low: range[0], high: range[1], log: false };
    const values = rows.map((row) => row[metric]).filter(isNumber).filter((value) => !log || value > 0);
    const low = Math.min(...values), high = Math.max(...values);
    return { low, high: high > low ? high : low + 1e-9, log: Boolean(log) && low > 0 };
  }

  /** Return where a value lies between the scale's ends, 0 to 1. */
  function position(value, { low, high, log }) {
    const to = log ? (number) => Math.log(Math.max(number, low)) : (number) => number;
    return Math.min(1, Math.max(0, (to(value) - to(low)) / (to(high) - to(low))));
  }

  function showScale(metric, scale) {
    const { low, high, log } = scale;
    const { better, name } = METRICS[metric];
    const middle = log ? Math.sqrt(low * high) : (low + high) / 2;
    const box = document.getElementById("heat-scale");
    box.classList.toggle("falling", better < 0);
    const ends = better < 0 ? ["better", "worse"] : ["worse", "better"];
    const isCut = METRICS[metric].range !== null;
    const cut = (sign, value) => (isCut && !(metric !== "acc_loss" && [0, 1].includes(value)) ? `${sign} ` : "") + show(metric, value);
    box.replaceChildren(
      make("span", {}, ends[0]), make("span", { class: "ramp" }), make("span", {}, ends[1]),
      make("span", { class: "ticks" }, ...[cut("≤", low), show(metric, middle), cut("≥", high)].map((text) => make("span", {}, text))),
    );
    box.setAttribute("aria-label", `Colours: ${name} from ${show(metric, low)}, ${ends[0]}, to ${show(metric, high)}, ${ends[1]}`);
  }

  function cellOf(row, metric, scale, attack, defence) {
    const what = `${defenceName(defence)} ${attack === null ? "over all attacks" : `against ${attack}`}`;
    if (!row || !isNumber(row[metric])) return make("td", {}, emptyCell(row, metric, what, attack));
    const value = row[metric], low = row[`${metric}_low`], high = row[`${metric}_high`], runs = row[`${metric}_n`];
    const place = METRICS[metric].better > 0 ? position(value, scale) : 1 - position(value, scale);
    const hasInterval = isNumber(low) && isNumber(high);
    const title = `${what}: ${METRICS[metric].name} ${show(metric, value)}${
      hasInterval ? `, 95% interval ${show(metric, low)} to ${show(metric, high)}` : ""}, ${runs} ${runs === 1 ? "run" : "runs"}`;
    const link = make("a", { title, "aria-label": title, tabindex: "-1", href: linkOf(row, attack) }, make("b", {}, show(metric, value)));
    if (hasInterval) link.append(make("span", {}, half(metric, value, low, high)));
    link.style.setProperty("--hue", place < 0.5 ? "var(--worse)" : "var(--better)");
    link.style.setProperty("--amount", `${Math.round(200 * Math.abs(place - 0.5))}%`);
    return make("td", {}, link);
  }

  /** Say why there is no number; failed runs can be opened. */
  function emptyCell(row, metric, what, attack) {
    if (row && !row.cells && row.failed) {
      const label = `${what}: ${row.failed} failed`;
      return make("a", { class: "failed", "aria-label": label, tabindex: "-1", href: linkOf(row, attack) }, "failed");
    }
    const isWeak = row && (metric === "der" || metric === "rir") && isNumber(row.asr0) && row.asr0 <= 0.5;
    const [text, why] = !row ? ["–", "not measured"] : isWeak ? ["weak", "the attack did not work before the defence"]
      : attack === "benign" ? ["–", "there is no attack"] : ["–", "no value"];
    return make("span", { class: "none", title: `${what}: ${why}` }, text, make("span", { class: "unseen" }, ` (${why})`));
  }

  /** Return the interval as plus-minus where it is even, else as its two ends. */
  function half(metric, value, low, high) {
    const print = (number) => show(metric, number).replace(/%$/, "").replace(/^\+/, "");
    if (metric === "seconds") return `${show(metric, low)} – ${show(metric, high)}`;
    const isEven = Math.abs(value - low - (high - value)) < 0.02 * (high - low) + 1e-9;
    return isEven ? `±${print((high - low) / 2)}` : `${print(low)} – ${print(high)}`;
  }

  function linkOf(row, attack) {
    const { data, arch, poison_rate, clean_images, defence } = row;
    return tableLink({ data, arch, attack, poison_rate, defence, clean_images });
  }

  /** Arrow keys, Home and End move between cells: one stop for the Tab key instead of hundreds. */
  function walk(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, 1], End: [0, -1] };
    const from = event.target.closest("td");
    if (!(event.key in moves) || !from || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const lines = [...holder.querySelectorAll("tbody tr, tfoot tr")].map((line) => [...line.querySelectorAll("td")]);
    const [down, right] = moves[event.key];
    let y = lines.findIndex((line) => line.includes(from));
    let x = lines[y].indexOf(from);
    if (event.key === "Home") x = -1;
    if (event.key === "End") x = lines[y].length;
    for (y += down, x += right; lines[y]?.[x]; y += down, x += right) {
      const link = lines[y][x].querySelector("a");
      if (link) {
        event.target.setAttribute("tabindex", "-1");
        link.setAttribute("tabindex", "0");
        link.focus();
        return;
      }
    }
  }
})();
