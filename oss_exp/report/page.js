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

// ------------------------------------------------------------------------------------------------------- Schedules

function drawSchedules({ teacher, lines }) {
  const [width, height, left, right, top, bottom] = [400, 300, 58, 8, 24, 36];
  const panels = document.getElementById("panels"), legend = document.getElementById("legend");
  const tip = add(document.body, "div", { id: "tip", hidden: "" });
  const y = t => top + (1 - t) * (height - top - bottom);
  const path = points => "M" + points.map(point => point.map(value => value.toFixed(2)).join(" ")).join("L");

  for (const k of [...new Set(lines.map(line => line.k))].sort((a, b) => a - b)) {
    const svg = add(panels, "svg", { viewBox: `0 0 ${width} ${height}` });
    const x = step => left + (step / k) * (width - left - right);

    // Axes.
    add(svg, "text", { x: x(k / 2), y: 14, "text-anchor": "middle", "font-weight": 600 }, `K = ${k}`);
    add(svg, "text", { x: x(k / 2), y: height - 4, "text-anchor": "middle" }, "step");
    const turned = `translate(12 ${y(0.5)}) rotate(-90)`;
    add(svg, "text", { transform: turned, "text-anchor": "middle" }, "time t (1 noise, 0 data)");
    for (const t of [0, 0.25, 0.5, 0.75, 1]) {
      add(svg, "path", { d: path([[left, y(t)], [width - right, y(t)]]) });
      add(svg, "text", { x: left - 14, y: y(t) + 4, "text-anchor": "end" }, t);
    }
    for (let step = 0; step <= k; step += Math.ceil(k / 12)) {
      add(svg, "path", { d: path([[x(step), top], [x(step), height - bottom]]) });
      add(svg, "text", { x: x(step), y: height - bottom + 14, "text-anchor": "middle" }, step);
    }
    for (const t of teacher) add(svg, "path", { d: path([[left - 9, y(t)], [left - 3, y(t)]]), class: "node" });

    // Lines, the searched ones on top.
    const drawn = lines.filter(line => line.k === k).sort((a, b) => b.baseline - a.baseline);
    const points = drawn.flatMap(line => {
      const group = add(svg, "g", { class: line.baseline ? "line baseline" : "line", style: `--color:${line.color}` });
      group.dataset.name = line.name;
      const at = line.times.map((t, step) => [x(step), y(t)]);
      if (line.low) {
        const [low, high] = [line.low, line.high].map(edge => edge.map((t, step) => [x(step), y(t)]));
        add(group, "path", { d: path([...low, ...high.reverse()]), class: "band" });
      }
      add(group, "path", { d: path(at) });
      return at.map(([cx, cy], step) => {
        add(group, "circle", { cx, cy, r: line.baseline ? 1.8 : 3 });
        return { line, group, step, cx, cy };
      });
    });

    // The point nearest to the mouse.
    svg.onpointermove = event => {
      const mouse = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const far = ({ cx, cy }) => Math.hypot(cx - mouse.x, cy - mouse.y);
      const shown = points.filter(({ group, cx, cy }) => group.style.display !== "none" && far({ cx, cy }) < 25);
      const best = shown.reduce((a, b) => a && far(a) <= far(b) ? a : b, null);
      svg.classList.toggle("focus", best !== null);
      for (const { group } of points) group.classList.toggle("near", group === best?.group);
      tip.hidden = best === null;
      if (best === null) return;
      tip.textContent = said(best);
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4)}px`;
      tip.style.top = `${event.clientY + 14}px`;
    };
    svg.onpointerleave = () => svg.onpointermove({ clientX: -1e4, clientY: -1e4 });
  }

  function said({ line, step }) {
    const text = [`${line.name}, K = ${line.k}`, `step ${step}: t = ${line.times[step]}`];
    if (line.low) text[1] += ` (median of ${line.samples}, 10-90 %: ${line.low[step]} to ${line.high[step]})`;
    if (line.orders && step < line.k) text.push(`from here with order ${line.orders[step]}`);
    return [...text, line.kind].join("\n");
  }

  const names = new Map(lines.map(line => [line.name, line]));
  const show = () => {
    for (const group of panels.querySelectorAll(".line")) {
      group.style.display = button(group.dataset.name).ariaPressed === "true" ? "" : "none";
    }
  };
  const button = name => [...legend.children].find(each => each.textContent === name);
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

if (data.schedules) drawSchedules(data.schedules);

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
