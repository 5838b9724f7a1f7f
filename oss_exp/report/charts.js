// Line charts: panels of lines, a legend that hides them, and a table of the values behind each panel.
// Keyboard: a chart is one tab stop; left and right walk along a line, up and down go to another, Escape leaves.

const [WIDTH, HEIGHT] = [400, 300];
const [LEFT, RIGHT, TOP, BOTTOM] = [58, WIDTH - 8, 24, HEIGHT - 36];
const MOST_TICKS = 12;

const tip = add(document.body, "div", { id: "tip", hidden: "" });

// ------------------------------------------------------------------------------------------------------------ Axes

const short = value => Number(value.toPrecision(4));
const tick = value => value > 0 && value < 2e-3 ? value.toExponential(0) : value;
const range = (first, last) => Array.from({ length: last - first + 1 }, (_, place) => first + place);
const thinned = values => values.filter((_, place) => place % Math.ceil(values.length / MOST_TICKS) === 0);

function logAxis(name, values) { // what is far below the rest, as rounding is, stands on the axis
  const high = Math.max(...values), low = Math.max(Math.min(...values), 1e-6 * high);
  const first = Math.floor(Math.log10(low)), last = Math.max(Math.ceil(Math.log10(high)), first + 1);
  const ticks = range(first, last).map(power => short(10 ** power));
  return { name, low: ticks[0], high: ticks.at(-1), log: true, ticks };
}

function linearAxis(name, values) { // round ticks around the values
  const low = Math.min(...values), high = Math.max(...values);
  const rough = (high - low || Math.abs(high) || 1) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(factor => factor * power >= rough) * power;
  const first = Math.floor(low / step), last = Math.max(Math.ceil(high / step), first + 1);
  const ticks = range(first, last).map(place => short(place * step));
  return { name, low: ticks[0], high: ticks.at(-1), ticks };
}

function scale({ low, high, log }, from, to) { // values of an axis -> pixels
  const power = value => Math.log(Math.max(value, low) / low);
  const share = log ? value => power(value) / power(high) : value => (value - low) / (high - low);
  return value => from + (high > low ? share(value) : 0.5) * (to - from);
}

// ---------------------------------------------------------------------------------------------------------- Panels

const path = points => "M" + points.map(point => point.map(value => value.toFixed(2)).join(" ")).join("L");

function drawPanel(parent, panel) {
  // title, across, up: axes, marks: ticks on the left, lines: { name, color, baseline, x, y, low, high, describe(point) }.
  const { title, across, up, lines } = panel;
  const figure = add(parent, "figure");
  const label = `${title}: ${up.name} by ${across.name}, ${lines.length} lines. Arrow keys read the points.`;
  const svg = add(figure, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "application",
    "aria-roledescription": "line chart", "aria-label": label });
  const x = scale(across, LEFT, RIGHT), y = scale(up, BOTTOM, TOP);
  drawAxes(svg, panel, x, y);
  const drawn = [...lines].sort((a, b) => b.baseline - a.baseline); // the searched ones on top
  readPoints(svg, drawn.flatMap(line => drawLine(svg, line, x, y)));
  addValues(figure, panel);
}

function drawAxes(svg, { title, across, up, marks = [] }, x, y) {
  const [centre, middle] = [(LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2];

  // Names.
  add(svg, "text", { x: centre, y: 14, "text-anchor": "middle", "font-weight": 600 }, title);
  add(svg, "text", { x: centre, y: HEIGHT - 4, "text-anchor": "middle" }, across.name);
  add(svg, "text", { transform: `translate(12 ${middle}) rotate(-90)`, "text-anchor": "middle" }, up.name);

  // Ticks.
  for (const value of up.ticks) {
    add(svg, "path", { d: path([[LEFT, y(value)], [RIGHT, y(value)]]) });
    add(svg, "text", { x: LEFT - 14, y: y(value) + 4, "text-anchor": "end" }, tick(value));
  }
  for (const value of across.ticks) {
    add(svg, "path", { d: path([[x(value), TOP], [x(value), BOTTOM]]) });
    add(svg, "text", { x: x(value), y: BOTTOM + 14, "text-anchor": "middle" }, value);
  }
  for (const value of marks) add(svg, "path", { d: path([[LEFT - 9, y(value)], [LEFT - 3, y(value)]]), class: "node" });
}

function drawLine(svg, line, x, y) { // -> its points
  const group = add(svg, "g", { class: line.baseline ? "line baseline" : "line", style: `--color:${line.color}` });
  group.dataset.name = line.name;
  const places = line.x.map((value, point) => [x(value), y(line.y[point])]);
  if (line.low) {
    const edge = values => values.map((value, point) => [places[point][0], y(value)]);
    add(group, "path", { d: path([...edge(line.low), ...edge(line.high).reverse()]), class: "band" });
  }
  add(group, "path", { d: path(places) });
  return places.map(([cx, cy], point) => {
    const circle = add(group, "circle", { cx, cy, r: line.baseline ? 1.8 : 3, tabindex: -1, role: "img" });
    return { line, group, circle, point, cx, cy };
  });
}

function highlight(svg, isChosen) { // of its lines; the others fade
  const groups = [...svg.querySelectorAll(".line")];
  for (const group of groups) group.classList.toggle("near", isChosen(group));
  svg.classList.toggle("focus", groups.some(group => isChosen(group) && visible(group)));
}

function readPoints(svg, points) { // by mouse, finger or keyboard
  function select(chosen) {
    highlight(svg, group => group === chosen?.group);
    tip.hidden = !chosen;
    if (!chosen) return;
    tip.textContent = chosen.line.describe(chosen.point);
    const box = chosen.circle.getBoundingClientRect(), below = box.bottom + 10;
    const top = below + tip.offsetHeight < innerHeight ? below : box.top - 10 - tip.offsetHeight;
    tip.style.left = `${Math.max(4, Math.min(box.right + 10, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${top}px`;
  }

  // Mouse and finger: the nearest point.
  const onLines = () => {
    const groups = new Set([...svg.querySelectorAll(".line")].filter(visible));
    return points.filter(({ group }) => groups.has(group));
  };
  svg.onpointermove = svg.onpointerdown = event => {
    const mouse = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const distance = ({ cx, cy }) => Math.hypot(cx - mouse.x, cy - mouse.y);
    const near = onLines().filter(point => distance(point) < 25);
    select(near.reduce((a, b) => a && distance(a) <= distance(b) ? a : b, null));
  };
  svg.onpointerleave = event => event.pointerType !== "touch" && select(null);

  // Keyboard.
  function neighbour(current, key) {
    const candidates = onLines();
    if (!current) return candidates[0];
    const groups = [...new Set(candidates.map(({ group }) => group))];
    const along = candidates.filter(({ group }) => group === current.group);
    const move = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (move) return along[along.indexOf(current) + move];
    if (key === "Home" || key === "End") return along.at(key === "Home" ? 0 : -1);
    const next = groups[within(groups.indexOf(current.group) + (key === "ArrowUp" ? -1 : 1), groups.length)];
    const distance = ({ cx }) => Math.abs(cx - current.cx);
    return candidates.filter(({ group }) => group === next).reduce((a, b) => distance(a) <= distance(b) ? a : b);
  }

  svg.onkeydown = event => {
    if (event.key === "Escape") svg.focus(); // the tip goes as the point loses the focus
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const current = points.find(({ circle }) => circle === document.activeElement);
    const next = neighbour(current, event.key);
    if (!next) return;
    next.circle.setAttribute("aria-label", next.line.describe(next.point).replaceAll("\n", ", "));
    next.circle.focus();
    select(next);
  };
  svg.addEventListener("focusout", () => select(null));
}

function addValues(figure, { title, across, lines }) { // a table, made when it is opened
  const details = add(figure, "details");
  add(details, "summary", {}, `Values, ${title}`);
  details.ontoggle = () => {
    if (details.querySelector("table")) return;
    const columns = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b);
    const table = add(add(details, "div", { class: "wide", tabindex: 0 }), "table");
    const head = table.createTHead().insertRow();
    for (const name of ["strategy", ...columns.map(value => `${across.name} ${value}`)]) add(head, "th", {}, name);
    const body = table.createTBody();
    for (const line of lines) {
      const row = body.insertRow();
      for (const text of [line.name, ...columns.map(value => cell(line, line.x.indexOf(value)))]) add(row, "td", {}, text);
    }
    makeSortable(table);
    nameRows(table);
    applyFilter();
  };
}

function cell(line, point) {
  if (point < 0) return "-";
  return line.low ? `${line.y[point]} (${line.low[point]} to ${line.high[point]})` : String(line.y[point]);
}

// ---------------------------------------------------------------------------------------------------------- Legend

function drawLegend(panels, lines) { // in the element after the panels
  const legend = panels.nextElementSibling;
  const isPressed = entry => entry.ariaPressed === "true";
  const entries = new Map();

  function press(isShown) { // the entries that the filter leaves
    for (const entry of entries.values()) if (visible(entry)) entry.ariaPressed = isShown(entry);
    for (const group of panels.querySelectorAll(".line")) {
      group.style.display = isPressed(entries.get(group.dataset.name)) ? "" : "none";
    }
  }

  for (const { name, color, baseline } of lines) {
    if (entries.has(name)) continue;
    const entry = add(legend, "button", { "aria-pressed": true, tabindex: -1, style: `--color:${color}` }, name);
    entry.dataset.name = name;
    entry.classList.toggle("baseline", baseline);
    entries.set(name, entry);

    const mark = on => panels.querySelectorAll("svg").forEach(svg =>
      highlight(svg, group => on && group.dataset.name === name));
    entry.onpointerenter = entry.onfocus = () => mark(true);
    entry.onpointerleave = entry.onblur = () => mark(false);
    entry.onclick = () => press(other => isPressed(other) !== (other === entry));
    entry.ondblclick = () => { // alone, or all where it is alone already
      const alone = [...entries.values()].every(other => other === entry || !isPressed(other));
      press(other => alone || other === entry);
    };
  }
  legend.setAttribute("role", "group");
  legend.setAttribute("aria-label", "Lines; arrow keys go from one to the next");
  walkByArrows(legend, "button");

  // All or none.
  const both = add(document.body, "p", { class: "both" });
  add(both, "button", {}, "show all").onclick = () => press(() => true);
  add(both, "button", {}, "hide all").onclick = () => press(() => false);
  legend.after(both);
}

// -------------------------------------------------------------------------------------------------------- Drawings

function drawSchedules({ teacher, lines }) {
  const panels = document.getElementById("panels");
  const up = { name: "time t (1 noise, 0 data)", low: 0, high: 1, ticks: [0, 0.25, 0.5, 0.75, 1] };

  const describe = line => step => {
    const text = [`${line.name}, K = ${line.k}`, `step ${step}: t = ${line.times[step]}`];
    if (line.low) text[1] += ` (median of ${line.samples}, 10-90 %: ${line.low[step]} to ${line.high[step]})`;
    if (line.orders && step < line.k) text.push(`from here with order ${line.orders[step]}`);
    return [...text, line.kind].join("\n");
  };

  for (const k of [...new Set(lines.map(line => line.k))].sort((a, b) => a - b)) {
    const steps = range(0, k), own = lines.filter(line => line.k === k);
    drawPanel(panels, {
      title: `K = ${k}`,
      across: { name: "step", low: 0, high: k, ticks: thinned(steps) },
      up,
      marks: teacher,
      lines: own.map(line => ({ ...line, x: steps, y: line.times, describe: describe(line) })),
    });
  }
  drawLegend(panels, lines);
}

function drawCurves(id, curves) {
  const panels = document.getElementById(id);
  for (const { title, across, up, log, lines } of curves) {
    const describe = line => point => `${line.name}, ${title}\n${across} = ${line.x[point]}: ${up} ${line.y[point]}`;
    const steps = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b);
    const values = lines.flatMap(line => line.y);
    drawPanel(panels, {
      title,
      across: { name: across, low: steps[0], high: steps.at(-1), ticks: thinned(steps) },
      up: log ? logAxis(up, values) : linearAxis(up, values),
      lines: lines.map(line => ({ ...line, describe: describe(line) })),
    });
  }
  drawLegend(panels, curves.flatMap(panel => panel.lines));
}

if (data.schedules) drawSchedules(data.schedules);
for (const [id, curves] of Object.entries(data.curves ?? {})) drawCurves(id, curves);
applyFilter(); // counts the rows
