"""Style sheet (light and dark) and script of the HTML report."""

CSS = """
:root { color-scheme: light dark; --ink: #222222; --soft: #5b6069; --grid: #dddddd;
  --page: #f4f5f7; --card: #ffffff; --good: #1a7f4b; --bad: #b3261e; --line: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #a3a9b3; --grid: #3d434d;
  --page: #14161a; --card: #1f2329; --good: #5ec48e; --bad: #ff8a80; --line: #6db7e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem 1rem 3rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
p { margin: .2rem 0; } .soft { color: var(--soft); } .good { color: var(--good); }
.bad { color: var(--bad); } .card { background: var(--card); border: 1px solid var(--grid);
  border-radius: 8px; padding: .8rem 1rem; min-width: 0; }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
.charts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit,
  minmax(min(27rem, 100%), 1fr)); align-items: start; }
.wide { grid-column: 1 / -1; }
dl { display: grid; grid-template-columns: auto auto; gap: .1rem 1rem; margin: .3rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.chart { position: relative; touch-action: pan-y; }
.chart svg { display: block; width: 100%; height: auto; max-height: 44rem; }
.chart .rule { position: absolute; width: 1px; background: var(--soft); pointer-events: none; }
.chart .tip { position: absolute; z-index: 1; background: var(--card);
  border: 1px solid var(--soft); border-radius: 5px; padding: .2rem .5rem; font-size: .8rem;
  white-space: nowrap;
  pointer-events: none; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 0; font-size: .85rem; }
input { width: 100%; max-width: 24rem; margin: .5rem 0; padding: .35rem .6rem; font: inherit;
  color: inherit; background: var(--page); border: 1px solid var(--soft); border-radius: 5px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
td { padding: .15rem .8rem .15rem 0; border-top: 1px solid var(--grid); vertical-align: top;
  overflow-wrap: anywhere; }
td:first-child { color: var(--soft); }
@media print { .card, .chart { break-inside: avoid; } input { display: none; } }
"""

SCRIPT = """
const write = (v) => v === null ? '-' : Math.abs(v) >= 1e6 || (v && Math.abs(v) < 1e-3)
  ? v.toExponential(3) : String(Number(v.toPrecision(5)));
for (const chart of document.querySelectorAll('.chart')) {
  const panels = JSON.parse(chart.dataset.hover);
  if (!panels.length) continue;
  const rule = chart.appendChild(document.createElement('div'));
  const tip = chart.appendChild(document.createElement('div'));
  rule.className = 'rule'; tip.className = 'tip'; rule.hidden = tip.hidden = true;
  chart.addEventListener('pointerleave', () => { rule.hidden = tip.hidden = true; });
  chart.addEventListener('pointermove', (event) => {
    const size = chart.querySelector('svg').getBoundingClientRect();
    const view = chart.querySelector('svg').viewBox.baseVal;
    const zoom = Math.min(size.width / view.width, size.height / view.height);
    const width = view.width * zoom, height = view.height * zoom;
    const left = (size.width - width) / 2, top = (size.height - height) / 2;
    const x = (event.clientX - size.left - left) / width;
    const y = (event.clientY - size.top - top) / height;
    const panel = panels.find(({box}) => box[0] <= x && x <= box[2] && box[1] <= y && y <= box[3]);
    rule.hidden = tip.hidden = !panel;
    if (!panel) return;
    const [from, to] = panel.log ? panel.x.map(Math.log) : panel.x;
    let at = from + (to - from) * (x - panel.box[0]) / (panel.box[2] - panel.box[0]);
    if (panel.log) at = Math.exp(at);
    const lines = panel.series.map(({name, x, y}) => {
      let best = 0;
      x.forEach((v, i) => { if (Math.abs(v - at) < Math.abs(x[best] - at)) best = i; });
      return `${name.replace(/ [(].*/, '')}: ${write(y[best])} at ${write(x[best])}`;
    });
    tip.innerText = lines.join('\\n');
    rule.style.left = left + x * width + 'px';
    rule.style.top = top + panel.box[1] * height + 'px';
    rule.style.height = (panel.box[3] - panel.box[1]) * height + 'px';
    const place = left + x * width + (x > 0.5 ? -tip.offsetWidth - 10 : 10);
    tip.style.left = Math.max(0, Math.min(place, size.width - tip.offsetWidth)) + 'px';
    tip.style.top = top + y * height + 12 + 'px';
  });
}
for (const input of document.querySelectorAll('input[type=search]')) {
  input.addEventListener('input', () => {
    const word = input.value.toLowerCase();
    for (const row of input.parentElement.querySelectorAll('tr'))
      row.hidden = !row.textContent.toLowerCase().includes(word);
  });
}
"""
