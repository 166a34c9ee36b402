"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { layers, violations, words } = data;
  const one = (query, root = document) => root.querySelector(query);
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const readers = layers.map(() => []);
  layers.forEach((layer, i) => layer.inputs.forEach((j) => j >= 0 && readers[j].push(i)));
  let language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";
  let chosen = -1;

  // Words: an element with data-t holds a text, with values in data-v; data-t-label and the like are attributes.
  const say = (key, values = {}) => words[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
  const ATTRIBUTES = { tLabel: "aria-label", tPlaceholder: "placeholder", tAlt: "alt" };
  function translate() {
    document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
    for (const element of all("[data-t]")) {
      element.textContent = say(element.dataset.t, element.dataset.v ? JSON.parse(element.dataset.v) : {});
    }
    for (const [key, attribute] of Object.entries(ATTRIBUTES)) {
      const name = key.replace(/[A-Z]/g, (c) => "-" + c.toLowerCase());
      for (const element of all(`[data-${name}]`)) element.setAttribute(attribute, say(element.dataset[key]));
    }
    filter();
    draw();
  }

  // Elements by hand: el("p", {class: "note"}, "text", child)
  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  // Numbers as the tables on the server side say them.
  const percent = (x) => (x === 0 ? "0 %" : x < 1e-4 ? "< 0.01 %" : x < 0.1 ? `${(100 * x).toFixed(2)} %` : `${(100 * x).toFixed(0)} %`);
  const decibels = (x) => (x >= 200 ? say("exact") : `${x.toFixed(1)} dB`);
  const number = (x) => String(Number(x.toPrecision(4))).replace("-", "−");
  const bytes = (n) => (n < 1024 ? `${n} B` : n < 1048576 ? `${(n / 1024).toFixed(1)} KB` : `${(n / 1048576).toFixed(1)} MB`);
  const step = (grid) => (grid.scale > 1 ? `1/${grid.scale}` : String(1 / grid.scale));
  const color = (name) => `var(--${name})`;
  const wide = (element) => Math.max(280, Math.floor(element.clientWidth));

  // Where a layer is chosen, everything follows: graph, table, details, address.
  function choose(i, { focus = false, look = false } = {}) {
    if (!layers[i]) return;
    chosen = i;
    for (const node of all(".node")) {
      const on = Number(node.dataset.i) === i;
      node.setAttribute("aria-current", String(on));
      node.tabIndex = on ? 0 : -1;
      if (on && focus) node.focus({ preventScroll: true });
      if (on) reveal(node.parentElement);
    }
    for (const circle of all(".rail circle")) circle.classList.toggle("on", Number(circle.dataset.i) === i);
    for (const row of all("#table tbody tr")) row.classList.toggle("on", Number(row.dataset.i) === i);
    remember();
    draw();
    if (look) one("#detail").scrollIntoView({ block: innerWidth > 900 ? "nearest" : "start" });
  }
  function reveal(item) {
    const rail = one(".rail");
    const top = item.offsetTop - rail.offsetTop;
    if (top < rail.scrollTop + 30 || top > rail.scrollTop + rail.clientHeight - 60) rail.scrollTop = top - rail.clientHeight / 2;
  }
  function remember() {
    const state = new URLSearchParams({ layer: layers[chosen]?.name ?? "", lang: language });
    try {
      history.replaceState(null, "", "#" + state);
    } catch {
      location.hash = String(state); // where a page from a file may not change its address
    }
  }

  // The layer's own page.
  function facts(layer) {
    const rows = [];
    const add = (key, value, extra) => rows.push(el("div", {}, el("dt", {}, say(key)), el("dd", {}, value, extra ? el("div", { class: "muted" }, extra) : null)));
    add("shape", layer.output.join(" × ") || "–", layer.input.join(" × ") + " →");
    if (layer.grid) add("grid", `${say("bits", { bits: layer.grid.bits })}, ${say("step", { step: step(layer.grid) })}`, say("from_to", { low: number(layer.grid.lowest), high: number(layer.grid.highest) }));
    if (layer.low !== null) add("seen", say("from_to", { low: number(layer.low), high: number(layer.high) }), layer.used === null ? "" : `${say("used")} ${percent(layer.used)}`);
    if (layer.clipped !== null) add("clipped", percent(layer.clipped));
    if (layer.sqnr !== null) add("fact_sqnr", decibels(layer.sqnr), say("total_series"));
    if (layer.own_sqnr !== null) add("fact_own", decibels(layer.own_sqnr), say("own_series"));
    if (layer.accumulator) add("sum", say("bits", { bits: layer.accumulator }));
    if (layer.macs) add("macs", layer.macs.toLocaleString("en"));
    if (layer.cycles) add("work", say("cycles", { cycles: layer.cycles.toLocaleString("en") }));
    if (layer.weight_bytes) add("stored", bytes(layer.weight_bytes));
    add("results", bytes(layer.activation_bytes));
    if (layer.source) add("source", layer.source);
    return el("dl", { class: "facts" }, ...rows);
  }
  function links(key, rows) {
    if (!rows.length) return null;
    const made = rows.map((j) => (j < 0 ? el("span", {}, say("input")) : el("button", { type: "button", class: "link", onclick: () => choose(j) }, layers[j].name)));
    return el("p", { class: "links" }, el("span", { class: "muted" }, say(key)), ...made);
  }
  function detail() {
    const article = one("#detail");
    const layer = layers[chosen];
    if (!layer) return;
    const go = (key, i, sign) => el("button", { type: "button", class: "step", "aria-label": say(key), title: say(key), disabled: !layers[i], onclick: () => { choose(i); one(`#detail [aria-label="${say(key)}"]`).focus(); } }, sign);
    const head = el("header", {}, el("div", {}, el("h2", { id: "h-detail" }, layer.name), el("p", { class: "muted" }, `${layer.op} · ${say(layer.kind)}`)), el("div", { class: "steps" }, go("previous", chosen - 1, "↑"), go("next", chosen + 1, "↓")));
    const notes = violations.filter((v) => v.layer === layer.name).map((v) => el("li", { class: v.kind }, el("p", {}, el("span", { class: "tag" }, say("kind_" + v.kind)), ` ${v.found} `, el("span", { class: "muted" }, `· ${say("allowed")}: ${v.allowed}`)), el("p", { class: "muted" }, v.way)));
    article.setAttribute("aria-labelledby", "h-detail");
    article.replaceChildren(head, facts(layer), el("div", { class: "note" }, links("reads", layer.inputs) ?? "", links("feeds", readers[chosen]) ?? ""), notes.length ? el("ul", { class: "remarks" }, ...notes) : "");
    if (layer.histogram) article.append(histogram(say("values"), layer.histogram, layer.grid, wide(article)));
    else article.append(el("p", { class: "muted note" }, layer.island ? say("float_values", { island: layer.island }) : say("no_values")));
    const two = layer.weights.length > 1 && article.clientWidth >= 640;
    const grid = el("div", { class: two ? "two" : undefined });
    for (const weight of layer.weights) {
      const short = weight.name.split(".").pop();
      const block = histogram(say("weight_values", { name: short }), weight.histogram, weight.grid, two ? (wide(article) - 32) / 2 : wide(article));
      const told = [`${weight.shape.join(" × ")}`, `${say("bits", { bits: weight.grid.bits })}, ${say("step", { step: step(weight.grid) })}`, `${say("used")} ${percent(weight.used)}`];
      if (weight.sqnr !== null) told.push(`SQNR ${decibels(weight.sqnr)}`);
      if (weight.clipped) told.push(`${say("clipped")} ${percent(weight.clipped)}`);
      one("h3", block).after(el("p", { class: "muted" }, told.map((t) => t.replaceAll(" ", "\u00a0")).join(" · ")));
      grid.append(block);
    }
    article.append(grid);
    if (layer.histogram || layer.weights.length) article.append(legend([["bars", "", "legend_fixed"], ...(layer.histogram?.reference.length || layer.weights.some((w) => w.histogram.reference.length) ? [["ink", "line", "legend_float"]] : []), ["warm", "dash", "legend_grid"]]), el("p", { class: "muted" }, say("counts")));
  }
  function legend(items) {
    return el("ul", { class: "legend" }, ...items.map(([name, kind, key]) => el("li", {}, el("i", { class: kind, style: kind === "dash" ? undefined : `background:${color(name)}` }), say(key))));
  }

  // A chart is one picture with one label: what its parts are called says nothing.
  function labelled(plot, label) {
    for (const part of all("[aria-label]", plot)) part.removeAttribute("aria-label");
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", label);
  }

  // Values with their grid: bars are fixed point, the line is float, ticks are the levels where there is room for them.
  function histogram(title, counts, grid, width) {
    const bins = counts.fixed.length;
    const size = (counts.high - counts.low) / bins;
    const levels = 2 ** Math.min(grid.bits, 25);
    const per = Math.max(1, Math.round(bins / 1.5 / levels)); // bins of one level
    const bars = [];
    counts.fixed.forEach((n, i) => n && bars.push({ x1: counts.low + (per > 1 ? i - per / 4 : i) * size, x2: counts.low + (per > 1 ? i + per / 4 : i + 1) * size, n }));
    const total = counts.fixed.reduce((a, b) => a + b, 0) || 1;
    const sum = counts.reference.reduce((a, b) => a + b, 0) || 1;
    const line = [];
    counts.reference.forEach((n, i) => line.push({ x: counts.low + i * size, n: (n / sum) * total * per }, { x: counts.low + (i + 1) * size, n: (n / sum) * total * per }));
    const ticks = levels <= 64 ? Array.from({ length: levels }, (_, q) => grid.lowest + q / grid.scale) : [];
    const half = 0.5 / grid.scale;
    const plot = Plot.plot({
      width, height: 190, marginLeft: 8, marginRight: 8, marginTop: 10, marginBottom: 30,
      x: { domain: [counts.low, counts.high], label: null, ticks: Math.max(4, Math.floor(width / 90)), tickSize: 4 },
      y: { type: "sqrt", axis: null, domain: [0, Math.max(1, ...bars.map((b) => b.n), ...line.map((p) => p.n))] },
      marks: [
        Plot.rectY(bars, { x1: "x1", x2: "x2", y: "n", fill: color("bars"), insetLeft: 0.5, insetRight: 0 }),
        Plot.lineY(line, { x: "x", y: "n", stroke: color("ink"), strokeWidth: 1.25, strokeOpacity: 0.8 }),
        Plot.tickX(ticks, { x: (d) => d, insetTop: 142, stroke: color("soft"), strokeOpacity: 0.8 }),
        Plot.ruleY([0], { stroke: color("line") }),
        Plot.ruleX([grid.lowest - half, grid.highest + half], { stroke: color("warm"), strokeDasharray: "4 3", strokeWidth: 1.5 }),
      ],
    });
    const seen = bars.length ? [bars[0].x1, bars[bars.length - 1].x2] : [0, 0];
    labelled(plot, say("histogram_label", { name: title, low: number(seen[0]), high: number(seen[1]), lowest: number(grid.lowest), highest: number(grid.highest) }));
    return el("div", { class: "plot" }, el("h3", {}, title), plot);
  }

  // Error along the net.
  function growth() {
    const box = one("#growth");
    const points = layers.map((layer, i) => ({ i, name: layer.name, total: layer.sqnr, own: layer.own_sqnr })).filter((p) => p.total !== null || p.own !== null);
    if (!points.length) {
      box.replaceChildren(el("p", { class: "muted" }, say("no_float")));
      return;
    }
    const top = Math.max(...points.flatMap((p) => [p.total, p.own]).filter((v) => v !== null && v < 200), 10) + 6;
    const held = (v) => (v === null ? NaN : Math.min(v, top)); // what is exact stands at the top
    const now = points.filter((p) => p.i === chosen);
    const plot = Plot.plot({
      width: wide(box), height: 240, marginLeft: 34, marginRight: 10, marginTop: 12, marginBottom: 14,
      x: { axis: null, domain: [-0.5, layers.length - 0.5] },
      y: { domain: [Math.min(0, ...points.map((p) => p.total ?? 0)), top], grid: true, label: null, ticks: 5, tickSize: 0 },
      marks: [
        Plot.ruleX(now, { x: "i", stroke: color("tint"), strokeWidth: 10 }),
        Plot.dot(points, { x: "i", y: (p) => held(p.own), r: 2.5, stroke: color("shade"), strokeWidth: 1.25 }),
        Plot.lineY(points.filter((p) => p.total !== null), { x: "i", y: (p) => held(p.total), stroke: color("accent"), strokeWidth: 1.75, curve: "linear" }),
        Plot.dot(points.filter((p) => p.total !== null), { x: "i", y: (p) => held(p.total), r: points.length > 60 ? 2 : 3.5, fill: color("accent") }),
        Plot.tip(points, Plot.pointerX({ x: "i", maxRadius: Infinity, y: (p) => held(p.total ?? p.own), title: (p) => `${p.name}\n${p.total === null ? "" : `${say("fact_sqnr")} ${decibels(p.total)}\n`}${p.own === null ? "" : `${say("fact_own")} ${decibels(p.own)}`}`, fill: color("raised"), stroke: color("line"), textPadding: 9, fontSize: 13 })),
      ],
    });
    plot.addEventListener("click", () => plot.value && choose(plot.value.i, { look: true }));
    labelled(plot, `${say("growth")}. ${say("growth_note")}`);
    box.replaceChildren(plot, legend([["accent", "line", "total_series"], ["shade", "ring", "own_series"]]));
  }
  function draw() {
    growth();
    detail();
  }

  // The table: sort by a column, filter by words and kind.
  const body = one("#table tbody");
  const original = all("tr", body);
  function sort(header, button) {
    const column = Number(button.dataset.c);
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of all("#table thead th")) if (other !== header) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.children[column].dataset.s;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what has no value stays at the end
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : Number(x) - Number(y);
      return down ? -order : order;
    };
    body.append(...[...original].sort(compare));
  }
  function filter() {
    const wanted = one("#search").value.trim().toLowerCase();
    const kind = one("#kind").value;
    let shown = 0;
    for (const row of original) {
      const layer = layers[Number(row.dataset.i)];
      const fits = `${layer.name} ${layer.op}`.toLowerCase().includes(wanted) && (!kind || (kind === "look" ? layer.look : layer.kind === kind));
      row.hidden = !fits;
      shown += fits;
    }
    one("#shown").textContent = say("rows", { shown, total: layers.length });
  }

  // Hands on.
  for (const button of all("#table thead button")) button.addEventListener("click", () => sort(button.closest("th"), button));
  one("#search").addEventListener("input", filter);
  one("#kind").addEventListener("change", filter);
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) choose(Number(row.dataset.i), { look: Boolean(event.target.closest(".pick")) });
  });
  one(".rail").addEventListener("click", (event) => {
    const node = event.target.closest("[data-i]");
    if (node) choose(Number(node.dataset.i), { look: innerWidth <= 900 });
  });
  one(".rail").addEventListener("keydown", (event) => {
    const at = Number(event.target.dataset?.i);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: layers.length - 1 }[event.key];
    if (isNaN(at) || to === undefined) return;
    event.preventDefault();
    choose(Math.min(Math.max(to, 0), layers.length - 1), { focus: true });
  });
  one("#language").addEventListener("click", () => {
    language = language === "en" ? "zh" : "en";
    remember();
    translate();
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  one("#theme").addEventListener("click", () => {
    const root = document.documentElement;
    root.dataset.theme = (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
  });
  one(".scroll").addEventListener("scroll", (event) => event.target.classList.toggle("moved", event.target.scrollLeft > 0), { passive: true });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      draw();
    }
  });

  const state = new URLSearchParams(location.hash.slice(1));
  if (words[state.get("lang")]) language = state.get("lang");
  const named = layers.findIndex((layer) => layer.name === state.get("layer"));
  const first = layers.findIndex((layer) => layer.histogram);
  translate();
  choose(named >= 0 ? named : Math.max(first, 0));
})();
