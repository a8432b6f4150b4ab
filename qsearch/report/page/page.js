"use strict";
// The page: tables beside the figures, and one selection that all of them share.

const data = JSON.parse(byId("data").textContent);
const study = data.study;
let selected = -1;

function select(index) {
  selected = index;
  mark();
  const point = data.points[index];
  const chosen = byId("chosen");
  chosen.replaceChildren();
  put(chosen, "h3", {}, point.name, ...badges(point).map((name) => put(chosen, "span", { class: "badge" }, name)));
  put(chosen, "p", {}, describe(point) + (study.baseline ? `, ${(study.baseline.latency_ms / point.latency_ms).toFixed(2)} times as fast as float` : ""));
  put(chosen, "p", {}, `${countsText(point)}; ${point.words}`);
  for (const remark of remarks(point)) put(chosen, "p", {}, remark);
  put(chosen, "code", {}, point.command);
}

function mark() {
  for (const one of document.querySelectorAll("[data-point]")) {
    const is = Number(one.dataset.point) === selected;
    one.classList.toggle("selected", is);
    if (one.getAttribute("role") === "button") one.setAttribute("aria-pressed", String(is));
    if (is && one.classList.contains("point")) raise(one);
  }
}

// The last one drawn is on top; moved, an element loses the focus.
function raise(one) {
  const focused = document.activeElement === one;
  one.parentNode.append(one);
  if (focused) one.focus();
}

function badges(point) {
  const picked = Object.entries(data.picks).filter(([, name]) => name === point.name).map(([how]) => how);
  return [...picked, ...(point.kind === "front" ? [] : [point.kind]), ...(point.noisy_timing ? ["noisy timing"] : [])];
}

function remarks(point) {
  const found = [];
  if (point.latency_source === "modelled") found.push("Latency is modelled: the sum of kernel times that were measured on the device.");
  if (point.kind === "dropped") found.push(`Measured again, trial ${point.heldout.dominated_by} is no worse in any respect and better in one.`);
  if (point.kind === "closest") found.push("Beyond the study's constraints; among what comes closest.");
  return found;
}

function countsText(point) {
  return Object.entries(point.counts).map(([name, count]) => `${count} ${name}`).join(", ");
}

function header(table, names) {
  const row = put(put(table, "thead", {}), "tr", {});
  for (const [name, words] of names) put(row, "th", { class: words && "words", scope: "col" }, name);
  return put(table, "tbody", {});
}

function selectable(body, index) {
  const row = put(body, "tr", { "data-point": index, class: data.points[index].kind === "dropped" && "faint" });
  const cell = put(row, "th", { class: "words", scope: "row" });
  put(cell, "button", { type: "button" }, data.points[index].name);
  return [row, cell];
}

function margin(low, high) {
  return ((high - low) / 2).toFixed(2);
}

function pointsTable() {
  const base = study.baseline;
  const names = [["point", true], ["latency, ms"], ["speed-up"], ["memory"], [`${data.metric} loss, pp`], ["layers", true], ["calibration and methods", true]];
  const body = header(byId("points"), names);
  if (base) {
    const row = put(body, "tr", { class: "faint" });
    put(row, "th", { class: "words", scope: "row" }, "float");
    for (const text of [base.latency_ms.toFixed(3), "1.00", bytesText(base.peak_bytes), `(${base.top1.toFixed(2)} %)`]) put(row, "td", {}, text);
    put(row, "td", {});
    put(row, "td", {});
  }
  data.points.forEach((point, index) => {
    const [row, cell] = selectable(body, index);
    for (const name of badges(point)) put(cell, "span", { class: "badge" }, name);
    put(row, "td", {}, `${point.latency_ms.toFixed(3)} \u00b1 ${point.latency_spread_ms.toFixed(3)}`);
    put(row, "td", {}, base ? (base.latency_ms / point.latency_ms).toFixed(2) : "");
    put(row, "td", {}, bytesText(point.peak_bytes));
    put(row, "td", {}, `${signed(point.top1_loss_pp, 2)} \u00b1 ${margin(...point.top1_loss_ci_pp)}`);
    put(row, "td", { class: "words" }, countsText(point));
    put(row, "td", { class: "words" }, point.words);
  });
}

const SHORT = { fp32: "32", tf32: "t32", fp16: "f16", int16: "16", int8: "8", fp8: "f8", w4a8: "4" };

function colourOf(precision) {
  return data.colours[precision] || data.other_colour;
}

function mapTable() {
  const used = [...new Set(data.points.flatMap((point) => point.precisions))];
  const order = Object.keys(data.colours);
  for (const name of used.sort((one, other) => order.indexOf(one) - order.indexOf(other))) {
    const entry = put(byId("colours"), "li", {});
    put(entry, "i", {}).style.background = colourOf(name);
    entry.append(SHORT[name] && SHORT[name] !== name ? `${name} (${SHORT[name]})` : name);
  }
  // On paper the names of so many would lie over one another.
  byId("map").classList.toggle("dense", data.layers.length > 60);
  const row = put(put(byId("map"), "thead", {}), "tr", {});
  put(row, "th", { class: "corner" });
  for (const layer of data.layers) {
    const told = layer.type ? `${layer.name}: ${layer.type}, ${layer.weights.toLocaleString("en")} weights` : layer.name;
    put(put(row, "th", { scope: "col", title: told }), "span", {}, middle(layer.name, 30));
  }
  const body = put(byId("map"), "tbody", {});
  data.points.forEach((point, index) => {
    const [cells] = selectable(body, index);
    point.precisions.forEach((precision, at) => {
      const cell = put(cells, "td", { title: `${data.layers[at].name}: ${precision}` }, SHORT[precision] || precision.slice(0, 3));
      cell.style.background = colourOf(precision);
      cell.style.color = inkOn(colourOf(precision));
    });
  });
}

function againTable() {
  const names = [["point", true], ["loss in the search"], ["held-out loss"], ["95 % interval"], ["latency in the search"], ["again, ms"], ["change"], ["", true]];
  const body = header(byId("again"), names);
  data.points.forEach((point, index) => {
    const again = point.heldout;
    if (!again) return;
    const [row] = selectable(body, index);
    const [low, high] = again.top1_loss_ci_pp;
    const change = 100 * (again.latency_ms / point.latency_ms - 1);
    const texts = [
      `${signed(point.top1_loss_pp, 2)} \u00b1 ${margin(...point.top1_loss_ci_pp)}`,
      signed(again.top1_loss_pp, 2),
      `${signed(low, 2)} to ${signed(high, 2)}`,
      `${point.latency_ms.toFixed(3)} \u00b1 ${point.latency_spread_ms.toFixed(3)}`,
      `${again.latency_ms.toFixed(3)} \u00b1 ${again.latency_spread_ms.toFixed(3)}`,
      `${signed(change, 1)} %`,
    ];
    for (const text of texts) put(row, "td", {}, text);
    const words = [...(again.noisy_timing ? ["noisy timing"] : []), ...(again.dominated_by === null ? [] : [`dropped for trial ${again.dominated_by}`])];
    put(row, "td", { class: "words" }, words.join(", "));
  });
}

function layersTable() {
  const body = header(byId("tables"), [["layer", true], ["precision", true], ["divergence, nats", true], ["latency, \u00b5s"], ["weights"]]);
  const largest = Math.max(...data.tables.map((row) => row.divergence), 1e-12);
  for (const one of data.tables) {
    const row = put(body, "tr", {});
    put(row, "th", { class: "words", scope: "row", title: one.layer }, middle(one.layer, 48));
    put(row, "td", { class: "words" }, one.precision);
    const cell = put(row, "td", { class: "words" }, one.divergence.toExponential(2));
    // Five decades; what is smaller matters to nobody.
    const share = one.divergence > 0 ? Math.max(0, 1 + Math.log10(one.divergence / largest) / 5) : 0;
    const bar = put(put(cell, "span", { class: "bar-of" }), "span", { class: "bar" });
    bar.style.width = `${(100 * share).toFixed(1)}%`;
    bar.style.background = colourOf(one.precision);
    put(row, "td", {}, signed(1e3 * one.latency_ms, 1));
    put(row, "td", {}, signedBytes(one.weight_bytes));
  }
}

function legend(place, entries) {
  for (const [shape, kind, words] of entries) {
    const entry = put(byId(place), "li", {});
    const drawn = put(entry, "svg", { viewBox: "0 0 14 14" });
    const group = put(drawn, "g", { class: kind });
    if (shape === "triangle") put(group, "path", { class: "dot", d: "M7 1l6 11h-12z" });
    else if (shape === "line") put(group, "line", { class: "bound", x1: 0, x2: 14, y1: 7, y2: 7 });
    else if (shape === "diamond") put(group, "path", { class: "float", d: "M7 1l6 6l-6 6l-6 -6z" });
    else put(group, "circle", { class: shape, cx: 7, cy: 7, r: shape === "plain" ? 3 : 5 });
    entry.append(words);
  }
}

function hide(section) {
  byId(section).hidden = true;
}

function about() {
  const facts = Object.fromEntries(data.facts[0].rows);
  byId("name").textContent = study.study;
  byId("about").textContent = [facts.model, facts.target, facts.device].filter(Boolean).join(" \u00b7 ");
  const base = study.baseline;
  const trials = study.trials;
  const figures = [[String(study.front.length), `points of ${trials.complete + trials.stopped_early} measured trials`]];
  if (base) {
    figures.push([`${base.latency_ms.toFixed(3)} ms`, `float's latency${base.latency_source === "modelled" ? ", modelled" : ""}`]);
    figures.push([bytesText(base.peak_bytes), "float's memory"], [`${base.top1.toFixed(2)} %`, `float's ${data.metric}, ${base.images} images`]);
  }
  if (study.hypervolume !== null && study.front.length) figures.push([study.hypervolume.toFixed(4), "hypervolume"]);
  if (study.bound && study.bound.share !== null && study.front.length) figures.push([`${(100 * study.bound.share).toFixed(1)} %`, "of what the tables predict"]);
  for (const [value, words] of figures) put(byId("figures"), "li", {}, put(byId("figures"), "b", {}, value), put(byId("figures"), "span", {}, words));
  const notices = [];
  if (!study.front.length && data.points.length) notices.push(`No configuration is within the constraints (${facts.constraints}); the closest ones are shown.`);
  if (!data.points.length) notices.push("No trial of this study has completed yet; the command that made it continues it.");
  if (study.beats_float === false) notices.push("Nothing that was tried beats float in any objective.");
  byId("notice").textContent = notices.join(" ");
  byId("notice").hidden = !notices.length;
}

function historyWords() {
  const trials = study.trials;
  const images = study.image_evaluations;
  const words = ["Hypervolume: the share of the box below float's latency and memory and", `${data.loss_bound_pp} pp of loss that the front dominates, as the search saw it.`];
  const counts = [[trials.complete, "completed"], [trials.stopped_early, "stopped early"], [trials.failed, "failed"]];
  words.push(`Trials: ${counts.filter(([count]) => count).map(([count, fate]) => `${count} ${fate}`).join(", ") || "none"}.`);
  if (trials.infeasible) words.push(`${trials.infeasible} of them ${trials.infeasible > 1 ? "are" : "is"} beyond the constraints.`);
  if (trials.stopped_early) words.push(`${((100 * images.made) / images.without_early_stopping).toFixed(0)} % of the images were run.`);
  document.querySelector("#history .lead").textContent = words.join(" ");
}

function draw() {
  const withFloat = byId("with-float").checked || !data.points.length;
  drawFront(byId("by-latency"), data, "latency_ms", withFloat);
  drawFront(byId("by-bytes"), data, "peak_bytes", withFloat);
  if (data.points.some((point) => point.heldout)) drawIntervals(byId("intervals"), data);
  if (data.history.some((step) => step.hypervolume > 0)) drawHistory(byId("volume"), data);
  mark();
}

function start() {
  about();
  const kinds = { front: "on the front", dropped: "dropped by the second measurement", closest: "closest to the constraints" };
  const found = Object.keys(kinds).filter((kind) => data.points.some((point) => point.kind === kind));
  const others = data.others.length ? [["plain", "", "other trials"]] : [];
  const more = data.points.some((point) => point.top1_loss_pp > data.loss_bound_pp) ? [["triangle", "point", `loses more than ${data.loss_bound_pp} pp`]] : [];
  const limits = Object.keys(study.constraints).length ? [["line", "", "constraint"]] : [];
  const base = study.baseline ? [["diamond", "", "float"]] : [];
  legend("kinds", [...found.map((kind) => ["dot", `point ${kind}`, kinds[kind]]), ...more, ...others, ...base, ...limits]);
  if (data.points.length) {
    pointsTable();
    mapTable();
  } else ["front", "precisions", "export"].forEach(hide);
  if (data.points.some((point) => point.heldout)) {
    const images = data.points.find((point) => point.heldout).heldout.images;
    document.querySelector("#heldout .lead").textContent = `Images that chose the front flatter it. Its points were measured again: loss on ${images} images that the search never saw, latency in a fresh process.`;
    legend("measured", [["before", "", "as the search saw it"], ["after", "", "on held-out images"]]);
    againTable();
  } else hide("heldout");
  if (data.history.length) historyWords();
  else hide("history");
  if (data.tables.length) layersTable();
  else hide("layers");
  data.points.forEach((point) => put(put(byId("commands"), "dt", {}, point.name).parentNode, "dd", {}, put(byId("commands"), "code", {}, point.command)));
  for (const { title, rows } of data.facts.filter((list) => list.rows.length)) {
    const list = put(byId("lists"), "div", {});
    put(list, "h3", {}, title);
    const pairs = put(list, "dl", {});
    for (const [name, value] of rows) put(put(pairs, "dt", {}, name).parentNode, "dd", {}, value);
  }
  draw();
  if (data.points.length) select(Math.max(0, data.points.findIndex((point) => point.name === data.picks.knee)));
}

function chosenBy(event) {
  const one = event.target.closest("[data-point]");
  return one ? Number(one.dataset.point) : -1;
}

document.addEventListener("click", (event) => {
  const index = chosenBy(event);
  if (index >= 0) select(index);
});

document.addEventListener("keydown", (event) => {
  const index = chosenBy(event);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Enter: 0, " ": 0 }[event.key];
  if (index < 0 || step === undefined || !event.target.classList.contains("point")) return;
  event.preventDefault();
  const next = Math.min(Math.max(index + step, 0), data.points.length - 1);
  select(next);
  event.target.ownerSVGElement.querySelector(`[data-point="${next}"]`).focus();
});

byId("with-float").addEventListener("change", draw);

for (const [event, paper] of [["beforeprint", true], ["afterprint", false]]) {
  window.addEventListener(event, () => {
    onPaper = paper;
    draw();
  });
}

let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  draw();
});

start();
