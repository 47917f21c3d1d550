'use strict';
// Draws the charts of the page from its data: {charts: [{title, note, unit, zero, baselines, lines}], clocks: [{step, tokens, hours}], keys}.
const {charts, clocks, keys} = JSON.parse(document.getElementById('data').textContent);
const control = name => document.getElementById(name);
const hidden = new Set();  // keys of lines that the reader has switched off
const UNITS = {step: 'step', tokens: 'tokens', hours: 'hours of training'};

function format(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) if (size >= unit) return `${+(value / unit).toPrecision(4)} ${name}`;
  return size && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
}

// The value at `at` of a line through points (xs, ys), of which xs ascends.
function interpolate(at, xs, ys) {
  const next = xs.findIndex(x => x >= at);
  if (next < 0) return ys[ys.length - 1];
  if (next === 0 || xs[next] === at) return ys[next];
  const part = (at - xs[next - 1]) / (xs[next] - xs[next - 1]);
  return ys[next - 1] + part * (ys[next] - ys[next - 1]);
}

// Means over a fraction of the curve to either side, fewer near its start, where a wide window would lag; gaps stay.
function smooth(ys, fraction) {
  const whole = Math.floor(ys.length * fraction), sums = [0], counts = [0];
  for (const y of ys) { sums.push(sums[sums.length - 1] + (y ?? 0)); counts.push(counts[counts.length - 1] + (y !== null)); }
  return ys.map((y, i) => {
    const width = Math.min(i, whole), first = i - width, end = Math.min(i + width + 1, ys.length);
    return y === null ? null : (sums[end] - sums[first]) / (counts[end] - counts[first]);
  });
}

function ticks(low, high, whole) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map(n => n * power).find(one => one >= rough);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9) + 1e-300; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [], wide = high / low > 1e3;
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const n of wide ? [1] : [1, 2, 5]) if (n * 10 ** power >= low && n * 10 ** power <= high) found.push(n * 10 ** power);
  return found;
}

function element(parent, name, attributes, text) {
  const found = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  parent.append(found);
  return found;
}

// The lines that are shown, with their places on the chosen axis.
function placed(chart) {
  const axis = control('axis').value, fraction = control('smoothing').value / 100;
  return chart.lines.filter(line => !hidden.has(line.key)).map(line => {
    const clock = clocks[line.run];
    const xs = axis === 'step' ? line.steps : line.steps.map(step => interpolate(step, clock.step, clock[axis]));
    const smoothed = line.smoothed && fraction > 0 && line.values.length >= 100;
    return {...line, xs, raw: line.values, ys: smoothed ? smooth(smooth(line.values, fraction), fraction) : line.values, smoothed};
  });
}

function limits(chart, lines, log) {
  const last = Math.max(...lines.flatMap(line => line.xs), 1e-9);
  let values = lines.flatMap(line => line.ys.filter((y, i) => y !== null && (!log || y > 0) && (!chart.late || line.xs[i] > 0.02 * last)));
  if (!values.length) values = lines.flatMap(line => line.ys.filter(y => y !== null && (!log || y > 0)));
  values.push(...chart.baselines.map(one => one.value));
  if (!values.length) values = [0, 1];
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  if (log) return [last, low / 1.05, high * 1.05];
  const margin = 0.05 * (high - low || Math.abs(high) || 1);
  return [last, chart.zero ? Math.min(0, low) : low - margin, high + margin];
}

function draw(chart, figure) {
  figure.querySelector('svg')?.remove();
  const width = figure.clientWidth, height = figure.classList.contains('first') ? Math.min(340, 0.75 * width) : 210;
  const svg = element(figure, 'svg', {viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': `${chart.title}, ${chart.unit}`});
  const [left, right, top, bottom] = [62, 8, 8, 36], lines = placed(chart), axis = control('axis').value, scale = control('scale').value;
  const positive = lines.flatMap(line => line.ys).filter(y => y !== null);
  const wide = Math.min(...positive) > 0 && Math.max(...positive) > 20 * Math.min(...positive);
  const log = scale === 'log' || scale === 'auto' && !chart.zero && wide;
  const [last, low, high] = limits(chart, lines, log), lift = log ? Math.log : y => y;
  const x = at => left + (width - left - right) * (0.02 + at / last) / 1.04;
  const y = at => top + (height - top - bottom) * (lift(high) - lift(at)) / (lift(high) - lift(low));
  for (const at of log ? logTicks(low, high) : ticks(low, high)) {
    element(svg, 'line', {x1: left, x2: width - right, y1: y(at), y2: y(at), stroke: 'var(--line)'});
    element(svg, 'text', {x: left - 6, y: y(at) + 4, 'text-anchor': 'end'}, format(at));
  }
  for (const at of ticks(0, last, axis !== 'hours')) element(svg, 'text', {x: x(at), y: height - bottom + 16, 'text-anchor': 'middle'}, format(at));
  element(svg, 'line', {x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, stroke: 'var(--muted)'});
  element(svg, 'text', {x: (left + width - right) / 2, y: height - 4, 'text-anchor': 'middle'}, UNITS[axis]);
  element(svg, 'text', {transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)`, 'text-anchor': 'middle'}, chart.unit);
  const id = `clip${charts.indexOf(chart)}`, clip = element(element(svg, 'defs', {}), 'clipPath', {id});
  element(clip, 'rect', {x: left, y: 0, width: width - left - right, height: height - bottom});
  const inside = element(svg, 'g', {'clip-path': `url(#${id})`});
  chart.baselines.forEach(({label, value}, i) => {  // names beside each other, since values may be close
    element(inside, 'line', {x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: 'var(--muted)', 'stroke-dasharray': '5 4'});
    element(svg, 'text', {x: width - right - 70 * i, y: y(value) - 4, 'text-anchor': 'end'}, label);
  });
  const path = (line, ys, attributes) => {
    let pen = 'M';
    const parts = ys.map((value, i) => {
      if (value === null || log && value <= 0) { pen = 'M'; return ''; }
      const part = `${pen}${x(line.xs[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = 'L';
      return part;
    });
    element(inside, 'path', {d: parts.join(''), fill: 'none', stroke: `var(--c${line.color})`, ...attributes});
  };
  for (const line of lines) {
    if (line.smoothed) path(line, line.raw, {'stroke-opacity': 0.25, 'stroke-width': 0.8});
    path(line, line.ys, {'stroke-width': line.points ? 1 : 1.7, ...(line.dashed ? {'stroke-dasharray': '4 3'} : {})});
    if (line.points || line.ys.length === 1) line.ys.forEach((value, i) => {
      if (value !== null) element(inside, 'circle', {cx: x(line.xs[i]), cy: y(value), r: 2.5, fill: `var(--c${line.color})`});
    });
    const broken = chart.late ? line.ys.indexOf(null) : -1;
    if (broken >= 0) {
      element(inside, 'line', {x1: x(line.xs[broken]), x2: x(line.xs[broken]), y1: top, y2: height - bottom, stroke: 'var(--bad)', 'stroke-dasharray': '2 3'});
      element(inside, 'text', {x: x(line.xs[broken]) + 4, y: top + 10}, 'not finite from here');
    }
  }
  hover(figure, svg, lines, x, y, axis, height - bottom);
}

// A vertical line at the place that is nearest to the pointer, and the values there.
function hover(figure, svg, lines, x, y, axis, floor) {
  const tip = figure.querySelector('.tip');
  const mark = element(svg, 'line', {y1: 8, y2: floor, stroke: 'var(--muted)', visibility: 'hidden'});
  svg.onpointermove = event => {
    const pointer = event.clientX - svg.getBoundingClientRect().left;
    const nearest = line => line.xs.reduce((best, at, i) => Math.abs(x(at) - pointer) < Math.abs(x(line.xs[best]) - pointer) ? i : best, 0);
    const found = lines.filter(line => line.xs.length).map(line => [line, nearest(line)]);
    if (!found.length) return;
    const [place] = found.map(([line, i]) => line.xs[i]).sort((a, b) => Math.abs(x(a) - pointer) - Math.abs(x(b) - pointer));
    mark.setAttribute('x1', x(place));
    mark.setAttribute('x2', x(place));
    mark.setAttribute('visibility', 'visible');
    tip.hidden = false;
    tip.replaceChildren(`${UNITS[axis]} ${format(place)}`, ...found.map(([line, i]) => {
      const row = document.createElement('div');
      row.style.color = `var(--c${line.color})`;
      row.textContent = `${line.label}: ${line.ys[i] === null ? 'not finite' : format(line.ys[i])}`;
      return row;
    }));
    const right = x(place) < figure.clientWidth / 2;
    Object.assign(tip.style, {top: `${svg.getBoundingClientRect().top - figure.getBoundingClientRect().top + 8}px`, left: right ? `${x(place) + 10}px` : '', right: right ? '' : `${figure.clientWidth - x(place) + 10}px`});
  };
  svg.onpointerleave = () => { tip.hidden = true; mark.setAttribute('visibility', 'hidden'); };
}

const span = (text, name = 'span') => Object.assign(document.createElement(name), {textContent: text});

// Shows and hides lines.
function button(key, text, color) {
  const found = Object.assign(span(text, 'button'), {type: 'button', className: 'key'});
  found.style.color = `var(--c${color})`;
  found.onclick = () => { if (!hidden.delete(key)) hidden.add(key); redraw(); };
  found.dataset.key = key;
  return found;
}

function frame(chart, number) {
  const figure = document.createElement('figure'), caption = document.createElement('figcaption'), tip = document.createElement('div');
  figure.className = number ? '' : 'first';
  caption.append(span(chart.title, 'b'), ...chart.lines.filter(line => line.named).map(
    line => button(line.key, `${line.points ? '\u25c6' : '\u25cf'} ${line.label}`, line.color)), span(chart.note));
  Object.assign(tip, {className: 'tip', hidden: true});
  figure.append(caption, tip);
  return figure;
}

const figures = charts.map(frame);
function redraw() {
  charts.forEach((chart, i) => draw(chart, figures[i]));
  for (const key of document.querySelectorAll('.key')) key.classList.toggle('off', hidden.has(key.dataset.key));
}
control('charts').replaceChildren(...figures);
control('keys').replaceChildren(...keys.map(({key, color}) => button(key, `\u25cf ${key}`, color)));
document.querySelector('.controls').oninput = redraw;
addEventListener('resize', redraw);
redraw();
