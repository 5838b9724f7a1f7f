// What moves on a page: tables that sort, a filter of names, and pictures with their errors that a click enlarges.
// All data is in the page's JSON block; text goes in as text, never as HTML. charts.js follows in the same script.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);
const within = (number, count) => (number + count) % count;
const visible = element => element.getClientRects().length > 0;

function add(parent, tag, attributes = {}, text = "") {
  const drawn = tag === "svg" || parent.namespaceURI === SVG;
  const element = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

function walkByArrows(container, selector) { // many items, one tab stop
  container.tabIndex = 0;
  container.addEventListener("keydown", event => {
    const direction = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!direction) return;
    event.preventDefault();
    const items = [...container.querySelectorAll(selector)].filter(visible);
    const place = items.indexOf(document.activeElement);
    items[within(Math.max(place, direction < 0 ? 0 : -1) + direction, items.length)]?.focus();
  });
}

function asButton(element, label, action) { // within a container of walkByArrows
  for (const [name, value] of Object.entries({ role: "button", tabindex: -1, "aria-label": label })) {
    element.setAttribute(name, value);
  }
  element.onkeydown = event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    action();
  };
}

// ---------------------------------------------------------------------------------------------------------- Tables

function column(head) {
  const cells = [...head.closest("table").tBodies[0].rows].map(row => row.cells[head.cellIndex]);
  const entries = cells.map(cell => ({ cell, text: cell.textContent }));
  const isMissing = ({ text }) => text === "" || text === "-";
  const missing = entries.filter(isMissing);
  const filled = entries.filter(entry => !isMissing(entry));
  for (const entry of filled) entry.number = entry.text === "*" ? 0 : parseFloat(entry.text); // *: the best baseline's gain
  return { cells, missing, filled, numeric: filled.every(({ number }) => !isNaN(number)) };
}

function sort(head) {
  const { missing, filled, numeric } = column(head);
  const turned = { ascending: "descending", descending: "ascending" }[head.ariaSort];
  const order = turned ?? (numeric ? "descending" : "ascending");
  const compare = (a, b) => numeric ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
  filled.sort((a, b) => order === "ascending" ? compare(a, b) : compare(b, a)); // stable: the last order breaks ties
  const table = head.closest("table");
  table.tBodies[0].append(...[...filled, ...missing].map(({ cell }) => cell.parentNode));
  for (const other of head.parentNode.cells) other.ariaSort = other === head ? order : null;
  table.classList.add("sorted");
}

function makeSortable(table) {
  for (const head of table.tHead.rows[0].cells) {
    const { cells, numeric } = column(head);
    if (!numeric || head.cellIndex === 0) for (const cell of [head, ...cells]) cell.classList.add("word");
    const name = head.textContent;
    head.textContent = "";
    add(head, "button", {}, name);
    head.scope = "col";
    head.onclick = () => sort(head);
  }
}

function nameRows(table) { // after their strategy, and run if there is one, for the filter
  const heads = [...table.tHead.rows[0].cells].map(head => head.textContent);
  const [strategy, run] = [heads.indexOf("strategy"), heads.indexOf("run")];
  if (strategy < 0) return;
  for (const { cells, dataset } of table.tBodies[0].rows) {
    dataset.name = cells[strategy].textContent + (run < 0 ? "" : ` (run ${cells[run].textContent})`);
  }
}

for (const table of document.querySelectorAll("table")) {
  makeSortable(table);
  nameRows(table);
}

// ---------------------------------------------------------------------------------------------------------- Filter

const filter = document.getElementById("filter");

function applyFilter() { // hides what has the name of another strategy: rows, lines and pictures
  if (!filter) return;
  const parts = filter.value.toLowerCase().split(",").map(part => part.trim()).filter(part => part !== "");
  for (const element of document.querySelectorAll("[data-name]")) {
    const name = element.dataset.name.toLowerCase();
    element.toggleAttribute("hidden", parts.length > 0 && !parts.some(part => name.includes(part)));
  }
  const rows = [...document.querySelectorAll("tbody tr[data-name]")].filter(row => !row.closest("figure"));
  const matching = rows.filter(row => !row.hidden);
  filter.form.querySelector("output").textContent = `${matching.length} of ${rows.length} rows`;
}

if (filter) {
  filter.form.hidden = false;
  filter.form.onsubmit = event => event.preventDefault();
  filter.oninput = applyFilter;
}

// -------------------------------------------------------------------------------------------------------- Pictures

const dialog = add(document.body, "dialog", { "aria-label": "Enlarged; arrow keys show neighbours, Escape closes" });
const dialogText = add(dialog, "p", { "aria-live": "polite" });
const dialogRow = add(dialog, "div");
dialog.onclick = () => dialog.close();
let showNeighbour = null; // (down, right): of what is large
dialog.onkeydown = event => {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!move || !showNeighbour) return;
  event.preventDefault();
  showNeighbour(...move);
};

const canvas = (across, down) => Object.assign(document.createElement("canvas"), { width: across, height: down });

async function loaded(url) {
  const image = new Image();
  await new Promise(done => Object.assign(image, { onload: done, src: url }));
  return image;
}

function enlarge(text, pictures, neighbour = null) {
  showNeighbour = neighbour;
  dialogText.textContent = text;
  dialogRow.replaceChildren();
  for (const [caption, picture] of pictures) {
    const figure = add(dialogRow, "figure");
    figure.append(picture);
    add(figure, "figcaption", {}, caption);
  }
  if (!dialog.open) dialog.showModal();
}

for (const image of document.querySelectorAll("figure img")) { // GenEval's
  const prompt = image.closest("section").querySelector("b").textContent;
  const caption = image.nextElementSibling.textContent;
  image.onclick = () => enlarge(prompt, [[caption, image.cloneNode()]]);
  asButton(image, `${prompt}: ${caption}`, image.onclick);
}
for (const part of document.querySelectorAll(".schedule")) walkByArrows(part, "img");

async function drawSamples({ width, height, frames, milliseconds, inferno, rows }) {
  // A row's strip: its samples beside each other, the frames of each below each other.
  const grid = document.getElementById("grid"), errors = document.getElementById("errors");
  const colors = inferno.match(/.{6}/g).map(hex => [0, 2, 4].map(place => parseInt(hex.slice(place, place + 2), 16)));
  let frame = 0, zoomed = null;

  for (const row of rows) {
    const image = await loaded(row.strip);
    row.picture = canvas(image.width, image.height);
    row.picture.getContext("2d", { willReadFrequently: true }).drawImage(image, 0, 0);
  }

  function difference(student, teacher) { // mean over the channels; 0 black, 0.5 and above bright
    const pixels = source => source.getContext("2d").getImageData(0, 0, student.width, student.height).data;
    const values = pixels(student), targets = pixels(teacher);
    const image = new ImageData(student.width, student.height), error = i => Math.abs(values[i] - targets[i]);
    for (let i = 0; i < values.length; i += 4) {
      const color = colors[Math.min(255, Math.round((error(i) + error(i + 1) + error(i + 2)) * 2 / 3))];
      for (let c = 0; c < 3; c++) image.data[i + c] = color[c];
      image.data[i + 3] = 255;
    }
    const picture = canvas(student.width, student.height);
    picture.getContext("2d").putImageData(image, 0, 0);
    return picture;
  }

  const errorOf = row => row.error ??= difference(row.picture, rows[0].picture);

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
    if (row !== rows[0]) pictures.push([row.label, one(row.picture)], ["error, 0.5 and above bright", one(errorOf(row))]);
    enlarge(`${row.label}, sample ${sample}` + (row.values ? `: ${row.values[sample]} dB` : ""), pictures, neighbour);
  }

  function neighbour(down, right) {
    zoom(zoomed[0] + down, zoomed[1] + right);
  }

  function redraw() {
    for (const row of rows) draw(row.canvas, errors.checked && row !== rows[0] ? errorOf(row) : row.picture);
    if (dialog.open && showNeighbour === neighbour) zoom(...zoomed);
  }

  let budget = null;
  for (const [number, row] of rows.entries()) {
    if (row.k !== budget && row.k !== null) add(grid, "h3", {}, `K = ${budget = row.k}`);
    const title = add(grid, "span", {}, row.name);
    add(title, "small", {}, row.psnr ?? "");
    row.canvas = add(grid, "canvas", { width: row.picture.width, height });
    if (row !== rows[0]) row.canvas.dataset.name = title.dataset.name = row.name;
    const count = row.picture.width / width;
    row.canvas.style.width = `${count * Math.min(Math.max(width, 64), 128)}px`;
    row.canvas.style.minWidth = `${count * 24}px`;
    row.canvas.onclick = event => zoom(number, Math.floor(event.offsetX / row.canvas.clientWidth * count));
    asButton(row.canvas, `${row.label}, ${count} samples${row.psnr ? `, ${row.psnr}` : ""}`, () => zoom(number, 0));
  }
  walkByArrows(grid, "canvas");
  applyFilter();
  errors.onchange = redraw;
  redraw();
  if (frames > 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
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
        asButton(picture, `${row.label}, t = ${row.times[sample][step]}`, picture.onclick);
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
    const title = add(ways, "span", {}, row.name);
    row.steps = add(ways, "div");
    if (row !== rows[0]) row.steps.dataset.name = title.dataset.name = row.name;
    for (const _ of row.times[0]) {
      const figure = add(row.steps, "figure");
      figure.append(canvas(width, height));
      add(figure, "figcaption");
    }
  }
  walkByArrows(ways, "figure:first-child canvas"); // arrow keys in the enlarged one go along the row
  applyFilter();
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
