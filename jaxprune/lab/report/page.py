"""A page: one HTML file with everything inline, and the pieces it is made of."""

from collections.abc import Iterable
from html import escape

# the browser is told to load nothing, so a page that asks for something by mistake still does not get it
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""
_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f8; --sheet: #fff; --ink: #1c2126; --soft: #59626b; --rule: #dde1e5;
  --dense: #0072b2; --pruned: #b85100; --finetuned: #007a58; --sparse: #a04f85;
  --artifact: #5b5ea6; --good: #00694d; --bad: #a83a00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171a; --sheet: #1e2327; --ink: #e8eaec; --soft: #a3acb5; --rule: #363d44;
    --dense: #56b4e9; --pruned: #f08a3c; --finetuned: #35c79b; --sparse: #d78cbd;
    --artifact: #a9abec; --good: #4fd6ab; --bad: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1rem; color: var(--soft); overflow-wrap: anywhere; } h1 code { font-weight: 400; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.15rem; }
.lead { margin: .35rem 0 .5rem; font-size: clamp(1.35rem, 3.6vw, 2rem); line-height: 1.25; font-weight: 650; }
.soft, figcaption, .card small, th, dt { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11em, 1fr)); gap: .8rem; margin: 1.5rem 0 1rem }
.card, .scroll, pre { background: var(--sheet); border: 1px solid var(--rule); border-radius: 8px; }
.card { border-top: 4px solid var(--tone); padding: .8rem 1rem; } .card h3 { margin: 0; color: var(--tone); }
.card b { display: block; font-size: 1.75rem; line-height: 1.3; } .card small { display: block; font-size: .85rem; }
.verdict { border-left: 4px solid var(--tone); background: var(--sheet); padding: .7rem 1rem; margin: 0 0 1rem; }
.verdict b { color: var(--tone); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; border-bottom: 1px solid var(--rule); } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: min(9rem, 30vw); }
tbody tr:last-child td { border-bottom: 0; } tr.total td { font-weight: 650; border-top: 2px solid var(--rule); }
figure { margin: 1.4rem 0; } figcaption { margin-top: .5rem; font-size: .9rem; }
.scroll { overflow-x: auto; } figure .scroll { background: #fff; padding: .8rem; }
img { display: block; width: 100%; height: auto; min-width: 34rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.2rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; padding: .9rem 1rem; overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace; }
@media (max-width: 30rem) {
  main { padding: 1.4rem .9rem 3rem; } .cards { grid-template-columns: 1fr 1fr; gap: .6rem; }
  .card { padding: .6rem .75rem; } .card b { font-size: 1.35rem; } dl { display: block; } dd { margin-bottom: .5rem; } }
@media print {
  body { font-size: 10.5pt; background: #fff; } main { max-width: none; padding: 0; } img { min-width: 0; }
  .scroll { overflow: visible; } .cards { grid-template-columns: repeat(4, 1fr); } .card b { font-size: 1.3rem; }
  table { font-size: 7.5pt; } th, td { padding: .2rem .3rem; } td:first-child { min-width: 5rem; }
  pre { white-space: pre-wrap; } figure, .card, tr, .verdict { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def page(title: str, body: list[str]) -> str:
    """The whole file."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


def lead(text: str) -> str:
    """The sentence that a page begins with."""
    return f'<p class="lead">{escape(text).replace(" %", "&nbsp;%")}</p>'


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], total: Iterable[str] = ()) -> str:
    """Columns, rows of cells, and perhaps a last row that stands out."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    last = "".join(f"<td>{escape(cell)}</td>" for cell in total)
    body += f'<tr class="total">{last}</tr>' if last else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs_list(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms and what is to be said of each."""
    return f"<dl>{''.join(f'<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>' for k, v in pairs)}</dl>"


def code(text: str) -> str:
    """Text as it stands in a file."""
    return f"<pre><code>{escape(text)}</code></pre>"
