"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = 6;
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];

/* Elements. Text always goes in as text: names in the data are nobody's markup. */

function html(name, attributes = {}, ...children) {
  return build(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function build(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function figure(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return size >= 0.0001 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

/* Axes. */

function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step); tick * step <= high + 1e-9 * step; tick++) ticks.push(tick * step);
  return ticks;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const factors = last - first > 3 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = first; power <= last; power++)
    for (const factor of factors) ticks.push(factor * 10 ** power);
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

function range(values, log) {
  const low = Math.min(...values), high = Math.max(...values);
  if (log) return [low / 1.15, high * 1.15];
  const margin = (high - low || Math.abs(high) || 1) * 0.07;
  return [low - margin, high + margin];
}

/* A chart of series over the removed share (`over`: of what), as wide as its host. `ring` marks one point. */

function drawChart(host, chart) {
  const points = chart.series.flatMap((series) => series.points).filter((point) => point[1] !== null);
  if (!points.length) return;
  const width = Math.max(280, host.clientWidth || 600), height = Math.min(380, Math.max(240, width * 0.55));
  const left = 62, right = width - 12, top = 12, bottom = height - 44;
  const log = chart.log && points.every((point) => point[1] > 0);
  const heights = points.flatMap((point) => point.slice(1).filter((value) => value !== null && (!log || value > 0)));
  const [lowest, highest] = range(heights, log);
  const widest = Math.max(10, ...points.map((point) => point[0])) * 1.04;
  const scale = log ? Math.log10 : (value) => value;
  const x = (value) => left + ((right - left) * value) / widest;
  const y = (value) => bottom - ((bottom - top) * (scale(value) - scale(lowest))) / (scale(highest) - scale(lowest));
  const over = chart.over;
  const names = chart.series.map((series) => series.name).join("; ");
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${chart.title}. ${chart.unit} over ${over}. ${names}. The figures are in the table below.` });

  for (const tick of log ? logTicks(lowest, highest) : linearTicks(lowest, highest, 5)) {
    image.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }));
    image.append(svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, figure(tick)));
  }
  for (const tick of linearTicks(0, widest, Math.max(3, width / 90))) {
    image.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: bottom }));
    image.append(svg("text", { x: x(tick), y: bottom + 17, "text-anchor": "middle" }, String(tick)));
  }
  image.append(svg("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, over));
  image.append(svg("text", { transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, chart.unit));

  chart.series.forEach((series, number) => {
    const known = series.points.filter((point) => point[1] !== null);
    if (series.line) {
      const path = known.map((point, index) => `${index ? "L" : "M"}${x(point[0])} ${y(point[1])}`).join("");
      image.append(svg("path", { class: "curve", d: path, stroke: color(number), "stroke-dasharray": dash(chart, number) }));
    }
    for (const [removed, value, low, high] of known) {
      if (low !== null && low !== undefined && (!log || low > 0))
        image.append(svg("line", { class: "mark", stroke: color(number), x1: x(removed), x2: x(removed), y1: y(low), y2: y(high) }));
      const mark = marker(series.line ? "dot" : number, x(removed), y(value), color(number), series.line ? 3 : 5);
      mark.append(svg("title", {}, `${series.name}: ${figure(removed)} % removed, ${figure(value)}`));
      image.append(mark);
    }
  });
  if (chart.ring) {
    const [removed, value] = chart.ring;
    const height = log && value <= 0 ? bottom : y(value);
    image.append(svg("circle", { class: "ring", cx: x(removed), cy: height, r: 9 }));
    const anchor = x(removed) > (left + right) / 2 ? "end" : "start";
    image.append(svg("text", { class: "label", x: x(removed) + (anchor === "end" ? -13 : 13), y: height - 9, "text-anchor": anchor }, "chosen"));
  }

  const caption = html("figcaption", {}, chart.title);
  const legend = html("ul", { class: "legend" }, ...chart.series.map((series, number) => html("li", {}, symbol(chart, series, number), series.name)));
  host.replaceChildren(caption, image, legend, table(chart));
}

function color(number) {
  return `var(--s${number % COLORS})`;
}

function dash(chart, number) {
  const lines = chart.series.filter((series) => series.line);
  return DASHES[lines.indexOf(chart.series[number]) % DASHES.length];
}

function marker(shape, x, y, paint, size) {
  const attributes = { class: "mark", fill: paint, stroke: paint };
  if (shape === "dot") return svg("circle", { ...attributes, cx: x, cy: y, r: size });
  const shapes = [
    `M${x} ${y - size}L${x + size} ${y}L${x} ${y + size}L${x - size} ${y}Z`,
    `M${x - size} ${y - size}H${x + size}V${y + size}H${x - size}Z`,
    `M${x} ${y - size}L${x + size} ${y + size}H${x - size}Z`,
  ];
  return svg("path", { ...attributes, d: shapes[shape % shapes.length] });
}

function symbol(chart, series, number) {
  const image = svg("svg", { viewBox: "0 0 28 12", "aria-hidden": "true" });
  if (series.line) image.append(svg("path", { class: "curve", d: "M0 6H28", stroke: color(number), "stroke-dasharray": dash(chart, number) }));
  image.append(marker(series.line ? "dot" : number, 14, 6, color(number), series.line ? 3 : 5));
  return image;
}

function table(chart) {
  const rows = chart.series.flatMap((series) => series.points.map(([removed, value, low, high]) => {
    const interval = low === null || low === undefined ? "" : ` (${figure(low)} to ${figure(high)})`;
    return html("tr", {}, html("th", { scope: "row" }, series.name), html("td", {}, figure(removed)), html("td", {}, value === null ? "not finite" : figure(value) + interval));
  }));
  const head = ["", "removed, %", chart.unit || "value"].map((name) => html("th", { scope: "col" }, name));
  const content = html("div", { class: "wide" }, html("table", {}, html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...rows)));
  return html("details", {}, html("summary", {}, "The figures"), content);
}

/* One layer: what it could have become. */

const cells = [...document.querySelectorAll(".map .cell")];
const panel = document.getElementById("panel");
const select = document.getElementById("panel-select");
let shown = null;

function chooseCell(cell) {
  for (const other of cells) other.setAttribute("aria-pressed", String(other === cell));
  const layers = JSON.parse(cell.dataset.layers);
  select.replaceChildren(...layers.map((name) => html("option", {}, name)));
  document.getElementById("panel-pick").hidden = layers.length < 2;
  showLayer(layers[0]);
}

function showLayer(name) {
  const layer = data.layers[name];
  const [form, removed, cost] = layer.chosen;
  shown = name;
  document.getElementById("panel-title").textContent = name;
  document.getElementById("panel-facts").textContent =
    `${layer.shape[0]} × ${layer.shape[1]}, becomes ${form}: ${figure(removed)} % removed, cost ${figure(cost)}, ` +
    `${layer.dense_bytes.toLocaleString("en")} to ${layer.bytes.toLocaleString("en")} bytes`;
  const series = Object.entries(layer.options).filter(([other]) => other !== "dense")
    .map(([other, points]) => ({ name: other, points, line: true }));
  const host = document.getElementById("panel-chart");
  host.replaceChildren();
  if (series.length) drawChart(host, { title: "What it could have become", unit: data.unit, over: "removed, % of this layer", series, log: true, ring: [removed, cost] });
}

/* The map by keyboard: one stop for Tab, arrows within. */

function move(cell, rows, columns) {
  const row = cell.closest("tr"), table = cell.closest("tbody");
  let [down, across] = [row.sectionRowIndex, cell.parentElement.cellIndex];
  for (;;) {
    [down, across] = [down + rows, across + columns];
    const place = table.rows[down]?.cells[across];
    if (!place || across < 1) return;
    const next = place.querySelector(".cell");
    if (next) return focusCell(next);
  }
}

function focusCell(cell) {
  for (const other of cells) other.tabIndex = other === cell ? 0 : -1;
  cell.focus();
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const tip = document.getElementById("tip");

function showTip(cell) {
  const place = cell.getBoundingClientRect();
  tip.textContent = cell.dataset.about;
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${place.top > tip.offsetHeight + 8 ? place.top - tip.offsetHeight - 6 : place.bottom + 6}px`;
}

cells.forEach((cell, index) => {
  cell.tabIndex = index ? -1 : 0;
  cell.addEventListener("mouseenter", () => showTip(cell));
  cell.addEventListener("mouseleave", () => { tip.hidden = true; });
  cell.addEventListener("focus", () => { if (cell.matches(":focus-visible")) showTip(cell); });
  cell.addEventListener("blur", () => { tip.hidden = true; });
  cell.addEventListener("keydown", (event) => {
    const arrow = ARROWS[event.key];
    if (!arrow) return;
    event.preventDefault();
    move(cell, ...arrow);
  });
  cell.addEventListener("click", () => {
    focusCell(cell);
    chooseCell(cell);
    if (matchMedia("(max-width: 60rem)").matches) panel.scrollIntoView({ block: "nearest" });
  });
});
select.addEventListener("change", () => showLayer(select.value));
for (const radio of document.querySelectorAll("[name=shade]"))
  radio.addEventListener("change", () => {
    for (const id of ["maps", "scale"]) {
      document.getElementById(id).classList.toggle("shade-removed", radio.value === "removed");
      document.getElementById(id).classList.toggle("shade-cost", radio.value === "cost");
    }
  });

/* What is there at first: all charts, and the layer that costs most. */

const charts = document.getElementById("charts");
charts.replaceChildren(...data.charts.map(() => html("figure")));
const costliest = Object.keys(data.layers).reduce((most, name) => (data.layers[name].chosen[2] > data.layers[most].chosen[2] ? name : most));
chooseCell(cells.find((cell) => JSON.parse(cell.dataset.layers).includes(costliest)));
select.value = costliest;
showLayer(costliest);

function drawAll() {
  data.charts.forEach((chart, index) => drawChart(charts.children[index], chart));
  showLayer(shown);
}
drawAll();
let width = document.body.clientWidth;
addEventListener("resize", () => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  drawAll();
});
addEventListener("beforeprint", () => { document.getElementById("config").open = true; });
