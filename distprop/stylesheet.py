"""How the report looks: colours for a light and a dark theme, and the arrangement of tables and charts, as CSS."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2330; --muted: #667085; --rule: #e1e5ec; --card: #f7f8fa;
  --run0: #2563c9; --run1: #d9622b; --run2: #178a5b; --run3: #8a4bc4; --run4: #b8860b; --run5: #c2396b;
  --phase0: #c9a227; --phase1: #2563c9; --phase2: #6c4bc4; --phase3: #d9622b; --phase4: #178a5b; --phase5: #5b8aa6;
  --phase6: #98a2b3; --wrong: #c62828; --warn: #b26a00; --good: #178a5b; }
@media (prefers-color-scheme: dark) { :root { --back: #12161d; --text: #e4e8ef; --muted: #97a1b3; --rule: #2b3340;
  --card: #1a2029; --run0: #6ea3ff; --run1: #ff9a66; --run2: #4ccb95; --run3: #bd8cf2; --run4: #e0b83c; --run5: #f07aa5;
  --phase0: #e0bf4a; --phase1: #6ea3ff; --phase2: #a48bf2; --phase3: #ff9a66; --phase4: #4ccb95; --phase5: #8fbdd6;
  --phase6: #6b7688; --wrong: #ff7b72; --warn: #f0b45a; --good: #4ccb95; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 32px 0 10px; }
h3 { font-size: 15px; margin: 4px 0; } h4 { margin: 16px 0 4px; font-size: 14px; }
section { border-top: 1px solid var(--rule); } section:first-of-type { border: 0; }
table { border-collapse: collapse; font-size: 14px; } th, td { text-align: left; padding: 3px 18px 3px 0;
  vertical-align: top; border-bottom: 1px solid var(--rule); } th { font-weight: 500; color: var(--muted); }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
tr.differs td { color: var(--warn); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 18px;
  align-items: start; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(380px, 1fr); gap: 24px;
  overflow-x: auto; }
figure { margin: 0 0 6px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 12px; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 4px; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 11px; } svg .grid { stroke: var(--rule); stroke-width: 1; fill: none; }
svg .bad { fill: var(--wrong); stroke: var(--wrong); } svg rect.bad { stroke: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin-top: 4px; }
.legend i, .swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.legend i.dashed { background: none; height: 0; width: 16px; vertical-align: 4px; border-top: 2px dashed; }
.note { color: var(--muted); font-size: 13px; margin: 6px 0; } pre { overflow-x: auto; font-size: 13px; }
.state { padding: 1px 9px; border-radius: 9px; border: 1px solid currentColor; font-size: 13px; }
.good, .fine { color: var(--good); } .busy { color: var(--run0); } .wrong { color: var(--wrong); }
.warn { color: var(--warn); } .verdicts { padding-left: 20px; } .verdicts small { color: var(--muted); }
"""
