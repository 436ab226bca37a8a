"""The report's style sheet: light and dark, one column on a phone, printable, and nothing from elsewhere."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --ink: #18212c; --muted: #566272; --paper: #f3f5f8; --card: #ffffff; --line: #dde3ea; --sunk: #eef1f5;
  --base: #8a97a8; --cand: #2b6cdf; --good: #14795a; --bad: #b5342b; --unsure: #8f6000;
  --good-soft: #e3f4ed; --bad-soft: #fbe9e7; --unsure-soft: #fbf1d9; --none-soft: #e9edf3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6ebf1; --muted: #9ba8b7; --paper: #10151b; --card: #181f27; --line: #2b3541; --sunk: #212a34;
    --base: #76859a; --cand: #6ea1ff; --good: #4cc79b; --bad: #ff8a7d; --unsure: #e3b341;
    --good-soft: #12332a; --bad-soft: #3d1d1b; --unsure-soft: #362b10; --none-soft: #232c37;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main, footer { max-width: 1000px; margin: 0 auto; padding: 0 20px; }
header { padding: 40px 0 8px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 4px 0 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
p { margin: 0 0 12px; max-width: 72ch; }
.eyebrow, .note, caption, .tile p, figcaption { color: var(--muted); }
.eyebrow { font-size: .85rem; margin: 0; }
.note { font-size: .92rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 24px; margin: 20px 0;
}
.verdict { border-left: 8px solid var(--muted); display: grid; gap: 4px 22px; grid-template-columns: auto 1fr; }
.verdict > div { min-width: 0; }
.verdict .badge { align-self: start; font-size: 1.35rem; font-weight: 700; padding: 8px 18px; border-radius: 10px; }
.verdict h2 { font-size: 1.3rem; margin: 6px 0 12px; }
.verdict.pass { border-left-color: var(--good); } .verdict.fail { border-left-color: var(--bad); }
.verdict.undecided { border-left-color: var(--unsure); }
.verdict dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: 6px 16px; }
dt { color: var(--muted); } dd { margin: 0; min-width: 0; }
.badge { display: inline-block; border-radius: 6px; padding: 1px 9px; font-weight: 600; white-space: nowrap; }
.badge.pass { color: var(--good); background: var(--good-soft); }
.badge.fail { color: var(--bad); background: var(--bad-soft); }
.badge.undecided { color: var(--unsure); background: var(--unsure-soft); }
.badge.none { color: var(--muted); background: var(--none-soft); }
.tiles { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); margin-top: 18px; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px 10px; min-width: 0; }
.tile h3 { margin: 0; font-size: .95rem; font-weight: 600; }
.tile .change { font-size: 1.7rem; font-weight: 700; line-height: 1.3; margin: 0; color: var(--ink); }
.tile .change small { font-size: .85rem; font-weight: 600; margin-left: 6px; }
.tile .better { color: var(--good); } .tile .worse { color: var(--bad); } .tile .same { color: var(--muted); }
.tile p { font-size: .82rem; line-height: 1.4; margin: 4px 0 0; }
.key {
  display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 10px 0 0; padding: 0; list-style: none; font-size: .9rem;
}
.key li::before {
  content: ""; display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px;
}
.key .base::before { background: var(--base); } .key .cand::before { background: var(--cand); }
.plots {
  display: grid; gap: 22px 28px; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); margin-top: 18px;
}
.ladder {
  display: grid; gap: 18px 32px; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); align-items: start;
}
figure { margin: 0; min-width: 0; }
figcaption { font-size: .88rem; margin-top: 4px; }
figure h3 { margin: 0 0 4px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
caption { text-align: left; font-size: .85rem; padding-bottom: 6px; }
th, td { padding: 8px 12px 8px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
.ladder table { font-size: .88rem; } .ladder th, .ladder td { padding-right: 9px; }
tr:last-child > * { border-bottom: 0; }
thead th { font-size: .82rem; font-weight: 600; color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 600; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody th small { white-space: nowrap; }
td small, th small { display: block; color: var(--muted); font-weight: 400; font-size: .82rem; }
tr.chosen > * { background: var(--sunk); } tr.chosen > :first-child { box-shadow: -10px 0 0 var(--sunk); }
pre {
  background: var(--sunk); border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 8px 0 12px;
  font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em; }
.facts {
  display: grid; grid-template-columns: minmax(110px, auto) 1fr; gap: 5px 20px; margin: 8px 0; font-size: .93rem;
}
.aside {
  border-left: 4px solid var(--unsure); background: var(--unsure-soft); border-radius: 6px; padding: 10px 14px;
}
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
footer { color: var(--muted); font-size: .85rem; padding-bottom: 40px; }
:focus-visible { outline: 2px solid var(--cand); outline-offset: 2px; border-radius: 4px; }

svg { display: block; width: 100%; height: auto; font-size: 12px; font-family: inherit; }
svg text { fill: var(--ink); } svg .tick, svg .name { fill: var(--muted); font-size: 11px; }
.tile svg { max-width: 300px; margin-top: 8px; } .gauge { width: 180px; min-width: 120px; }
.plots svg, .ladder svg { max-width: 560px; }
.base { fill: var(--base); stroke: var(--base); } .cand { fill: var(--cand); stroke: var(--cand); }
rect.base, rect.cand, circle.base, circle.cand { stroke: none; }
.run { fill-opacity: .75; } .median { stroke-width: 2.5; }
.grid { stroke: var(--line); } .axis { stroke: var(--muted); }
.track { fill: var(--good); opacity: .22; } .wrong { fill: var(--bad); opacity: .5; }
.edge { stroke: var(--ink); stroke-width: 2; } .reach { stroke: var(--cand); stroke-width: 3; }
line.limit { stroke: var(--bad); stroke-dasharray: 6 4; stroke-width: 1.5; } svg text.limit { fill: var(--bad); }
.path { fill: none; stroke: var(--line); stroke-width: 2; }
.error { stroke: var(--ink); stroke-width: 1.3; } .lead { stroke: var(--muted); stroke-width: .8; }
.point { stroke: var(--card); stroke-width: 1.5; } .point.dense { fill: var(--base); }
.point.pass { fill: var(--good); }
.point.fail { fill: var(--bad); } .point.undecided { fill: var(--unsure); }
.ring { fill: none; stroke: var(--cand); stroke-width: 2.5; } .label { font-weight: 600; }
@media (min-width: 860px) { .ladder { grid-template-columns: minmax(0, 3fr) minmax(0, 4fr); } }
@media (max-width: 560px) {
  main, footer { padding: 0 12px; } section { padding: 18px 16px; } header { padding-top: 24px; }
  .verdict { grid-template-columns: 1fr; } .verdict .badge { justify-self: start; } h1 { font-size: 1.4rem; }
  .facts, .verdict dl { grid-template-columns: 1fr; gap: 0; } .facts dd, .verdict dd { margin-bottom: 8px; }
}
@media (max-width: 430px) {
  .plots svg, .ladder svg { font-size: 15px; } .plots svg text.tick, .ladder svg text.tick { font-size: 14px; }
  .plots svg text.name, .ladder svg text.name { font-size: 14px; } caption { max-width: 80vw; }
}
@media print {
  body { background: none; }
  section { break-inside: avoid; border-color: #ccc; } details, .scroll { overflow: visible; }
}
"""
