"use strict";
// The figures, each drawn into the width that its place on the page has.

// Digits that tell neighbouring ticks apart.
function decimals(ticks) {
  const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : Math.abs(ticks[0]) || 1;
  return Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
}

// Paper is narrower than most screens: what is drawn for a screen would have tiny letters there.
let onPaper = false;

function canvas(place, height) {
  const width = onPaper ? Number(place.dataset.paper) : Math.max(280, Math.round(place.clientWidth));
  place.replaceChildren();
  return [put(place, "svg", { viewBox: `0 0 ${width} ${height}`, role: "group" }), width];
}

function frame(chart, box, x, y) {
  const across = placer(x.ends, [box.left, box.right]);
  const up = placer(y.ends, [box.bottom, box.top]);
  const xs = ticksBetween(...x.ends, Math.max(3, Math.floor((box.right - box.left) / 75)));
  const ys = ticksBetween(...y.ends, 5);
  for (const value of ys) {
    put(chart, "line", { class: "grid", x1: box.left, x2: box.right, y1: up(value), y2: up(value) });
    put(chart, "text", { x: box.left - 7, y: up(value) + 4, "text-anchor": "end" }, y.words(value, decimals(ys)));
  }
  for (const value of xs) {
    put(chart, "line", { class: "axis", x1: across(value), x2: across(value), y1: box.bottom, y2: box.bottom + 4 });
    put(chart, "text", { x: across(value), y: box.bottom + 18, "text-anchor": "middle" }, x.words(value, decimals(xs)));
  }
  put(chart, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  put(chart, "text", { x: (box.left + box.right) / 2, y: box.bottom + 37, "text-anchor": "middle" }, x.title);
  put(chart, "text", { x: box.left - 44, y: box.top - 10 }, y.title);
  return [across, up];
}

function drawFront(place, data, measure, withFloat) {
  const height = 330;
  const [chart, width] = canvas(place, height);
  const bytes = measure === "peak_bytes";
  const base = withFloat ? data.study.baseline : null;
  const most = data.loss_bound_pp;
  const shown = [...data.points, ...(base ? [{ ...base, top1_loss_pp: 0 }] : [])];
  if (!shown.length) return;
  // What loses more than anyone wants is drawn at the upper edge: it would press all others flat.
  const losses = shown.map((point) => Math.min(point.top1_loss_pp, most));
  const x = {
    ends: endsOf(shown.map((point) => point[measure]), 0.07),
    words: (value, digits) => (bytes ? bytesText(value) : value.toFixed(digits)),
    title: bytes ? "memory: weights, arena and workspace" : "latency, ms",
  };
  const y = { ends: endsOf(losses, 0.12), words: signed, title: `${data.metric} loss, percentage points` };
  const box = { left: 52, right: width - 14, top: 30, bottom: height - 48 };
  const [across, up] = frame(chart, box, x, y);
  const inside = (point) =>
    point[measure] >= x.ends[0] && point[measure] <= x.ends[1] && point.top1_loss_pp >= y.ends[0] && point.top1_loss_pp <= y.ends[1];
  const others = data.others.filter(inside);
  for (const point of others) {
    const dot = put(chart, "circle", { class: "plain", cx: across(point[measure]), cy: up(point.top1_loss_pp), r: 2.5 });
    put(dot, "title", {}, `${point.name}${point.feasible ? "" : ", beyond the constraints"}`);
  }
  const beyond = data.others.length - others.length;
  if (beyond) {
    put(chart, "text", { x: box.right, y: box.top - 10, "text-anchor": "end" }, `${beyond} other${beyond > 1 ? "s" : ""} beyond the axes`);
  }
  if (base) {
    const [left, top] = [across(base[measure]), up(0)];
    put(chart, "path", { class: "float", d: `M${left} ${top - 7}l7 7l-7 7l-7 -7z` });
    put(chart, "text", { class: "halo", x: left - 11, y: top + 4, "text-anchor": "end" }, "float");
  }
  drawLimits(chart, data.study.constraints, { measure, x, y, box, across, up });
  data.points.forEach((point, index) => {
    drawPoint(chart, point, index, { left: across(point[measure]), up, ends: y.ends, box, most });
  });
}

// The study's constraints, where they are within the axes.
function drawLimits(chart, limits, { measure, x, y, box, across, up }) {
  const within = (value, ends) => value !== undefined && value >= ends[0] && value <= ends[1];
  const lines = [];
  if (within(limits[measure], x.ends)) lines.push({ x1: across(limits[measure]), x2: across(limits[measure]), y1: box.top, y2: box.bottom });
  if (within(limits.top1_loss_pp, y.ends)) lines.push({ x1: box.left, x2: box.right, y1: up(limits.top1_loss_pp), y2: up(limits.top1_loss_pp) });
  for (const line of lines) put(put(chart, "line", { class: "bound", ...line }), "title", {}, "constraint of the study");
}

function drawPoint(chart, point, index, { left, up, ends, box, most }) {
  const [low, high] = point.top1_loss_ci_pp.map((end) => up(Math.min(Math.max(end, ends[0]), ends[1])));
  const beyond = point.top1_loss_pp > most;
  const top = up(Math.min(point.top1_loss_pp, most));
  const told = describe(point);
  const group = put(chart, "g", { class: `point ${point.kind}`, "data-point": index, tabindex: 0, role: "button", "aria-label": told });
  put(group, "title", {}, told);
  put(group, "line", { class: "whisker", x1: left, x2: left, y1: low, y2: high });
  put(group, "circle", { class: "hit", cx: left, cy: top, r: 13 });
  if (beyond) put(group, "path", { class: "dot", d: `M${left} ${top - 7}l7 12h-14z` });
  else put(group, "circle", { class: "dot", cx: left, cy: top, r: 5.5 });
  const right = left > (box.left + box.right) / 2;
  const words = beyond ? `${point.name}, ${signed(point.top1_loss_pp, 1)} pp` : point.name;
  put(group, "text", { class: "label strong halo", x: left + (right ? -12 : 12), y: top - 9, "text-anchor": right ? "end" : "start" }, words);
}

function describe(point) {
  const [low, high] = point.top1_loss_ci_pp;
  return (
    `${point.name}: ${point.latency_ms.toFixed(3)} ms, ${bytesText(point.peak_bytes)}, loss ` +
    `${signed(point.top1_loss_pp, 2)} pp (${signed(low, 2)} to ${signed(high, 2)})`
  );
}

function drawIntervals(place, data) {
  const again = data.points.map((point, index) => [point, index]).filter(([point]) => point.heldout);
  const row = 24;
  const height = again.length * row + 74;
  const [chart, width] = canvas(place, height);
  const box = { left: 84, right: width - 14, top: 24, bottom: height - 48 };
  const ends = again.flatMap(([point]) => [...point.top1_loss_ci_pp, ...point.heldout.top1_loss_ci_pp]);
  const x = { ends: endsOf([0, ...ends], 0.05), words: signed, title: `${data.metric} loss, pp, with 95 % intervals` };
  const across = placer(x.ends, [box.left, box.right]);
  const ticks = ticksBetween(...x.ends, Math.max(3, Math.floor((box.right - box.left) / 75)));
  for (const [point, index] of again) {
    const top = box.top + again.findIndex(([, other]) => other === index) * row;
    const group = put(chart, "g", { class: "interval", "data-point": index });
    put(group, "rect", { class: "band", x: 0, y: top, width, height: row });
    put(group, "text", { class: "strong", x: box.left - 10, y: top + row / 2 + 4, "text-anchor": "end" }, point.name);
    put(group, "title", {}, describe(point));
    whisker(group, "before", across, point.top1_loss_pp, point.top1_loss_ci_pp, top + row / 2 - 4);
    whisker(group, "after", across, point.heldout.top1_loss_pp, point.heldout.top1_loss_ci_pp, top + row / 2 + 4);
  }
  for (const value of ticks) {
    put(chart, "line", { class: value === 0 ? "axis" : "grid", x1: across(value), x2: across(value), y1: box.top, y2: box.bottom + 4, "pointer-events": "none" });
    put(chart, "text", { x: across(value), y: box.bottom + 18, "text-anchor": "middle" }, signed(value, decimals(ticks)));
  }
  put(chart, "text", { x: (box.left + box.right) / 2, y: box.bottom + 37, "text-anchor": "middle" }, x.title);
}

function whisker(group, kind, across, value, [low, high], top) {
  put(group, "line", { class: kind, x1: across(low), x2: across(high), y1: top, y2: top });
  put(group, "circle", { class: kind, cx: across(value), cy: top, r: 3 });
}

function drawHistory(place, data) {
  const height = 290;
  const [chart, width] = canvas(place, height);
  const steps = data.history;
  const bound = data.study.bound ? data.study.bound.hypervolume : null;
  const x = { ends: [0, Math.max(1, steps.length)], words: (value) => (Number.isInteger(value) ? String(value) : ""), title: "trials" };
  const values = steps.map((step) => step.hypervolume).filter((value) => value > 0);
  const y = { ends: endsOf([...values, ...(bound ? [bound] : []), ...(values.length ? [] : [0, 1])], 0.12), words: (value, digits) => value.toFixed(digits), title: "hypervolume" };
  const box = { left: 52, right: width - 14, top: 30, bottom: height - 60 };
  const [across, up] = frame(chart, box, x, y);
  if (bound) {
    put(chart, "line", { class: "bound", x1: box.left, x2: box.right, y1: up(bound), y2: up(bound) });
    put(chart, "text", { class: "halo", x: box.right, y: up(bound) - 6, "text-anchor": "end" }, "what the planner's tables predict");
  }
  let path = "";
  let before = 0;
  steps.forEach((step, index) => {
    const [left, top] = [across(index + 1), up(Math.max(step.hypervolume, y.ends[0]))];
    if (step.hypervolume > 0) path += path ? `H${left}V${top}` : `M${left} ${top}`;
    if (step.hypervolume > before) {
      const dot = put(chart, "circle", { class: "gain", cx: left, cy: top, r: 3.5 });
      put(dot, "title", {}, `trial ${step.trial}: ${step.hypervolume.toFixed(4)}`);
    } else if (step.fate !== "measured") {
      const mark = put(chart, "line", { class: `fate ${step.fate}`, x1: left, x2: left, y1: box.bottom - 9, y2: box.bottom });
      put(mark, "title", {}, `trial ${step.trial}: ${step.fate}`);
    }
    before = Math.max(before, step.hypervolume);
  });
  chart.prepend(put(chart, "path", { class: "volume", d: path || "M0 0" }));
}
