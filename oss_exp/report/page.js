// What moves on a page: tables that sort, the plot of schedules, pictures with their errors that a click enlarges.
// All data is in the page's JSON block; text goes in as text, never as HTML.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);

function add(parent, tag, attributes = {}, text = "") {
  const drawn = tag === "svg" || parent.namespaceURI === SVG;
  const element = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

// ---------------------------------------------------------------------------------------------------------- Tables

function column(head) {
  const cells = [...head.closest("table").tBodies[0].rows].map(row => row.cells[head.cellIndex]);
  const all = cells.map(cell => ({ cell, text: cell.textContent }));
  const missing = all.filter(({ text }) => text === "" || text === "-");
  const known = all.filter(each => !missing.includes(each));
  for (const each of known) each.number = each.text === "*" ? 0 : parseFloat(each.text); // *: the best baseline's gain
  return { cells, missing, known, numeric: known.every(({ number }) => !isNaN(number)) };
}

function sort(head) {
  const { missing, known, numeric } = column(head);
  const turned = { ascending: "descending", descending: "ascending" }[head.ariaSort];
  const order = turned ?? (numeric ? "descending" : "ascending");
  const compare = (a, b) => numeric ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
  known.sort((a, b) => order === "ascending" ? compare(a, b) : compare(b, a)); // stable: the last order breaks ties
  const table = head.closest("table");
  table.tBodies[0].append(...[...known, ...missing].map(({ cell }) => cell.parentNode));
  for (const other of head.parentNode.cells) other.ariaSort = other === head ? order : null;
  table.classList.add("sorted");
}

for (const head of document.querySelectorAll("th")) {
  const { cells, numeric } = column(head);
  if (!numeric || head.cellIndex === 0) for (const cell of [head, ...cells]) cell.classList.add("word");
  head.tabIndex = 0;
  head.onclick = () => sort(head);
  head.onkeydown = event => event.key === "Enter" && sort(head);
}

// ----------------------------------------------------------------------------------------------------------- Panels

const tip = add(document.body, "div", { id: "tip", hidden: "" });
const short = value => Number(value.toPrecision(4));

const tick = value => value > 0 && value < 2e-3 ? value.toExponential(0) : value;

function place({ low, high, log }, from, to) { // values of an axis -> pixels
  const power = value => Math.log(Math.max(value, low) / low);
  const share = log ? value => power(value) / power(high) : value => (value - low) / (high - low);
  return value => from + (high > low ? share(value) : 0.5) * (to - from);
}

function drawPanel(parent, { title, across, up, marks = [], lines }) {
  // across, up: { name, low, high, log, ticks }; lines: { name, color, baseline, x, y, low, high, said(point) }.
  const [width, height, left, right, top, bottom] = [400, 300, 58, 8, 24, 36];
  const x = place(across, left, width - right), y = place(up, height - bottom, top);
  const [centre, middle] = [(left + width - right) / 2, (top + height - bottom) / 2];
  const path = points => "M" + points.map(point => point.map(value => value.toFixed(2)).join(" ")).join("L");
  const svg = add(parent, "svg", { viewBox: `0 0 ${width} ${height}` });

  add(svg, "text", { x: centre, y: 14, "text-anchor": "middle", "font-weight": 600 }, title);
  add(svg, "text", { x: centre, y: height - 4, "text-anchor": "middle" }, across.name);
  add(svg, "text", { transform: `translate(12 ${middle}) rotate(-90)`, "text-anchor": "middle" }, up.name);
  for (const value of up.ticks) {
    add(svg, "path", { d: path([[left, y(value)], [width - right, y(value)]]) });
    add(svg, "text", { x: left - 14, y: y(value) + 4, "text-anchor": "end" }, tick(value));
  }
  for (const value of across.ticks) {
    add(svg, "path", { d: path([[x(value), top], [x(value), height - bottom]]) });
    add(svg, "text", { x: x(value), y: height - bottom + 14, "text-anchor": "middle" }, value);
  }
  for (const value of marks) add(svg, "path", { d: path([[left - 9, y(value)], [left - 3, y(value)]]), class: "node" });

  const drawn = [...lines].sort((a, b) => b.baseline - a.baseline); // the searched ones on top
  const points = drawn.flatMap(line => {
    const group = add(svg, "g", { class: line.baseline ? "line baseline" : "line", style: `--color:${line.color}` });
    group.dataset.name = line.name;
    const at = line.x.map((value, point) => [x(value), y(line.y[point])]);
    if (line.low) {
      const [low, high] = [line.low, line.high].map(edge => edge.map((value, point) => [at[point][0], y(value)]));
      add(group, "path", { d: path([...low, ...high.reverse()]), class: "band" });
    }
    add(group, "path", { d: path(at) });
    return at.map(([cx, cy], point) => {
      add(group, "circle", { cx, cy, r: line.baseline ? 1.8 : 3 });
      return { line, group, point, cx, cy };
    });
  });

  svg.onpointermove = event => { // names the point nearest to the mouse
    const mouse = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const far = ({ cx, cy }) => Math.hypot(cx - mouse.x, cy - mouse.y);
    const shown = points.filter(({ group, cx, cy }) => group.style.display !== "none" && far({ cx, cy }) < 25);
    const best = shown.reduce((a, b) => a && far(a) <= far(b) ? a : b, null);
    svg.classList.toggle("focus", best !== null);
    for (const { group } of points) group.classList.toggle("near", group === best?.group);
    tip.hidden = best === null;
    if (best === null) return;
    tip.textContent = best.line.said(best.point);
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  };
  svg.onpointerleave = () => svg.onpointermove({ clientX: -1e4, clientY: -1e4 });
}

function drawLegend(panels, lines) { // in the element after the panels
  const legend = panels.nextElementSibling, names = new Map(lines.map(line => [line.name, line]));
  const button = name => [...legend.children].find(each => each.textContent === name);
  const show = () => {
    for (const group of panels.querySelectorAll(".line")) {
      group.style.display = button(group.dataset.name).ariaPressed === "true" ? "" : "none";
    }
  };
  for (const [name, line] of names) {
    const entry = add(legend, "button", { "aria-pressed": true, style: `--color:${line.color}` }, name);
    entry.classList.toggle("baseline", line.baseline);
    entry.onclick = () => {
      entry.ariaPressed = entry.ariaPressed !== "true";
      show();
    };
    entry.ondblclick = () => { // alone, or all where it is alone already
      const others = [...legend.children].filter(each => each !== entry);
      const alone = others.every(each => each.ariaPressed === "false");
      for (const other of others) other.ariaPressed = alone;
      entry.ariaPressed = true;
      show();
    };
  }
}

function drawSchedules({ teacher, lines }) {
  const panels = document.getElementById("panels");
  const up = { name: "time t (1 noise, 0 data)", low: 0, high: 1, ticks: [0, 0.25, 0.5, 0.75, 1] };

  const said = line => step => {
    const text = [`${line.name}, K = ${line.k}`, `step ${step}: t = ${line.times[step]}`];
    if (line.low) text[1] += ` (median of ${line.samples}, 10-90 %: ${line.low[step]} to ${line.high[step]})`;
    if (line.orders && step < line.k) text.push(`from here with order ${line.orders[step]}`);
    return [...text, line.kind].join("\n");
  };

  for (const k of [...new Set(lines.map(line => line.k))].sort((a, b) => a - b)) {
    const steps = Array.from({ length: k + 1 }, (_, step) => step);
    const ticks = steps.filter(step => step % Math.ceil(k / 12) === 0);
    const own = lines.filter(line => line.k === k);
    const drawn = own.map(line => ({ ...line, x: steps, y: line.times, said: said(line) }));
    const across = { name: "step", low: 0, high: k, ticks };
    drawPanel(panels, { title: `K = ${k}`, across, up, marks: teacher, lines: drawn });
  }
  drawLegend(panels, lines);
}

if (data.schedules) drawSchedules(data.schedules);

function axis(name, values, log) { // round ticks around the values
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (log) { // what is far below the rest, as rounding is, stands on the axis
    const powers = [Math.floor(Math.log10(Math.max(low, 1e-6 * high))), Math.ceil(Math.log10(high))];
    if (powers[0] === powers[1]) powers[1] += 1;
    const ticks = Array.from({ length: powers[1] - powers[0] + 1 }, (_, i) => short(10 ** (powers[0] + i)));
    return { name, low: ticks[0], high: ticks.at(-1), log, ticks };
  }
  const rough = (high - low || Math.abs(high) || 1) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(factor => factor * power >= rough) * power;
  [low, high] = [Math.floor(low / step), Math.ceil(high / step)];
  if (low === high) high += 1;
  const ticks = Array.from({ length: high - low + 1 }, (_, i) => short((low + i) * step));
  return { name, low: ticks[0], high: ticks.at(-1), ticks };
}

function drawCurves(id, all) {
  const panels = document.getElementById(id);
  for (const { title, across, up, log, lines } of all) {
    const values = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b);
    const said = line => point => `${line.name}, ${title}\n${across} = ${line.x[point]}: ${up} ${line.y[point]}`;
    const ticks = values.filter((_, place) => place % Math.ceil(values.length / 12) === 0);
    drawPanel(panels, {
      title,
      across: { name: across, low: values[0], high: values.at(-1), ticks },
      up: axis(up, lines.flatMap(line => line.y), log),
      lines: lines.map(line => ({ ...line, said: said(line) })),
    });
  }
  drawLegend(panels, all.flatMap(panel => panel.lines));
}

for (const [id, panels] of Object.entries(data.curves ?? {})) drawCurves(id, panels);

// -------------------------------------------------------------------------------------------------------- Pictures

const dialog = add(document.body, "dialog");
dialog.onclick = () => dialog.close();
let turn = null; // (down, right): shows the neighbour of what is large
dialog.onkeydown = event => {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!move || !turn) return;
  event.preventDefault();
  turn(...move);
};

const canvas = (across, down) => Object.assign(document.createElement("canvas"), { width: across, height: down });
const within = (number, count) => (number + count) % count;

async function loaded(url) {
  const image = new Image();
  await new Promise(done => Object.assign(image, { onload: done, src: url }));
  return image;
}

function enlarge(text, pictures, neighbour = null) {
  turn = neighbour;
  dialog.replaceChildren();
  add(dialog, "p", {}, text);
  const row = add(dialog, "div");
  for (const [caption, picture] of pictures) {
    const figure = add(row, "figure");
    figure.append(picture);
    add(figure, "figcaption", {}, caption);
  }
  if (!dialog.open) dialog.showModal();
}

for (const image of document.querySelectorAll("figure img")) { // GenEval's
  image.onclick = () => enlarge(image.closest("section").querySelector("b").textContent,
    [[image.nextElementSibling.textContent, image.cloneNode()]]);
}

async function drawSamples({ width, height, frames, milliseconds, inferno, rows }) {
  // A row's strip: its samples beside each other, the frames of each below each other.
  const grid = document.getElementById("grid"), errors = document.getElementById("errors");
  const colors = inferno.match(/.{6}/g).map(hex => [0, 2, 4].map(place => parseInt(hex.slice(place, place + 2), 16)));
  let frame = 0, zoomed = null;

  for (const row of rows) {
    const image = await loaded(row.strip);
    row.picture = canvas(image.width, image.height);
    row.picture.getContext("2d", { willReadFrequently: true }).drawImage(image, 0, 0);
    row.error = difference(row.picture, rows[0].picture);
  }

  function difference(student, teacher) { // mean over the channels; 0 black, 0.5 and above bright
    const pixels = source => source.getContext("2d").getImageData(0, 0, student.width, student.height).data;
    const made = canvas(student.width, student.height), [mine, truth] = [pixels(student), pixels(teacher)];
    const shown = new ImageData(student.width, student.height), apart = i => Math.abs(mine[i] - truth[i]);
    for (let i = 0; i < mine.length; i += 4) {
      const color = colors[Math.min(255, Math.round((apart(i) + apart(i + 1) + apart(i + 2)) * 2 / 3))];
      for (let c = 0; c < 3; c++) shown.data[i + c] = color[c];
      shown.data[i + 3] = 255;
    }
    made.getContext("2d").putImageData(shown, 0, 0);
    return made;
  }

  function draw(target, source, sample = 0) {
    target.height = height; // clears it
    target.getContext("2d").drawImage(source, -sample * width, -frame * height);
    return target;
  }

  function zoom(number, sample) {
    const row = rows[within(number, rows.length)];
    sample = within(sample, row.picture.width / width);
    zoomed = [rows.indexOf(row), sample];
    const one = source => draw(canvas(width, height), source, sample);
    const pictures = [["teacher", one(rows[0].picture)]];
    if (row !== rows[0]) pictures.push([row.label, one(row.picture)], ["error, 0.5 and above bright", one(row.error)]);
    enlarge(`${row.label}, sample ${sample}` + (row.values ? `: ${row.values[sample]} dB` : ""), pictures, neighbour);
  }

  function neighbour(down, right) {
    zoom(zoomed[0] + down, zoomed[1] + right);
  }

  function redraw() {
    for (const row of rows) draw(row.canvas, errors.checked && row !== rows[0] ? row.error : row.picture);
    if (dialog.open && turn === neighbour) zoom(...zoomed);
  }

  let budget = null;
  for (const [number, row] of rows.entries()) {
    if (row.k !== budget && row.k !== null) add(grid, "h3", {}, `K = ${budget = row.k}`);
    add(add(grid, "span", {}, row.name), "small", {}, row.psnr ?? "");
    row.canvas = add(grid, "canvas", { width: row.picture.width, height });
    const count = row.picture.width / width;
    row.canvas.style.width = `${count * Math.min(Math.max(width, 64), 128)}px`;
    row.canvas.onclick = event => zoom(number, Math.floor(event.offsetX / row.canvas.clientWidth * count));
  }
  errors.onchange = redraw;
  redraw();
  if (frames > 1) {
    setInterval(() => {
      frame = (frame + 1) % frames;
      redraw();
    }, milliseconds);
  }
}

if (data.samples) drawSamples(data.samples);

async function drawTrajectories({ width, height, rows }) {
  // A row's strip: its samples beside each other, the steps of each below each other.
  const choice = document.getElementById("choice"), ways = document.getElementById("ways");
  for (const row of rows) row.picture = await loaded(row.strip);

  function piece(row, sample, step, target = canvas(width, height)) {
    target.getContext("2d").drawImage(row.picture, -sample * width, -step * height);
    return target;
  }

  function zoom(number, sample, step) {
    const row = rows[within(number, rows.length)], times = row.times[sample], end = times.length - 1;
    const pictures = [["the sample", piece(row, sample, end)]];
    step = Math.min(step, end); // of a shorter row
    if (step < end) pictures.unshift([`predicted at t = ${times[step]}`, piece(row, sample, step)]);
    enlarge(`${row.label}, sample ${sample}`, pictures,
      (down, right) => zoom(rows.indexOf(row) + down, sample, within(step + right, times.length)));
  }

  function show(sample) {
    for (const [place, button] of [...choice.children].entries()) button.ariaPressed = place === sample;
    for (const [number, row] of rows.entries()) {
      for (const [step, figure] of [...row.steps.children].entries()) {
        const [picture, caption] = figure.children;
        piece(row, sample, step, picture);
        picture.onclick = () => zoom(number, sample, step);
        caption.textContent = Number(row.times[sample][step].toPrecision(3));
      }
    }
  }

  for (const sample of rows[0].times.keys()) {
    const button = add(choice, "button", { title: `sample ${sample}` });
    button.append(piece(rows[0], sample, rows[0].times[sample].length - 1));
    button.onclick = () => show(sample);
  }
  let budget = null;
  for (const row of rows) {
    if (row.k !== budget && row.k !== null) add(ways, "h3", {}, `K = ${budget = row.k}`);
    add(ways, "span", {}, row.name);
    row.steps = add(ways, "div");
    for (const _ of row.times[0]) {
      const figure = add(row.steps, "figure");
      figure.append(canvas(width, height));
      add(figure, "figcaption");
    }
  }
  show(0);
}

if (data.trajectories) drawTrajectories(data.trajectories);

// --------------------------------------------------------------------------------------------- GenEval: which pictures

const label = document.getElementById("label"), wrong = document.getElementById("wrong");
if (label) {
  label.onchange = wrong.onchange = () => {
    for (const part of document.querySelectorAll(".schedule")) part.hidden = part.dataset.label !== label.value;
    document.body.dataset.only = wrong.checked ? "wrong" : "";
  };
  label.onchange();
}
