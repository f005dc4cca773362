"""Report of a cleaned corpus as one HTML page without other files."""

from html import escape
from typing import Any

from tjx_data.cleaning.rules import RULES

_STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 60em; color: #222 }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: 0.2em 0.8em; border-bottom: 1px solid #ddd }
td.n { text-align: right }
div.bar { background: #4477aa; height: 0.8em }
pre { white-space: pre-wrap; background: #f5f5f5; padding: 0.6em; font-size: 13px }
"""
_ROW = (
    '<tr><td>{name}</td><td>{rule}</td><td class="n">{documents:,}</td><td class="n">{bytes:,}</td>'
    '<td style="width: 25%"><div class="bar" style="width: {share:.2f}%"></div></td></tr>'
)


def format_report(report: dict[str, Any]) -> str:
    """Return the HTML page of a report of `clean`.

    Parameters
    ----------
    report : dict
        The report.
    """
    read = report["read"]
    rules = {
        rule.name: f"{rule.description}: {rule.minimum:g} to {rule.maximum:g}" for rule in RULES
    }
    rows = []
    for name, found in {**report["dropped"], "kept": report["kept"]}.items():
        share = 100 * found["documents"] / max(read["documents"], 1)
        rule = escape(rules.get(name, ""))
        counts = {key: found[key] for key in ("documents", "bytes")}
        rows.append(_ROW.format(name=escape(name), rule=rule, share=share, **counts))
    examples = []
    for name, found in {"kept": report["kept"], **report["dropped"]}.items():
        examples.append(f"<h3>{escape(name)}</h3>")
        examples += [f"<pre>{escape(text)}</pre>" for text in found["examples"]]
    cut = report["cut"]
    if cut["spans"]:
        examples.append("<h3>repeated spans</h3>")
        examples += [f"<pre>{escape(text)}</pre>" for text in cut["examples"]]
    masked = ", ".join(f"{escape(name)} {count:,}" for name, count in report["masked"].items())
    source = ", ".join(f"{escape(k)}: {escape(v)}" for k, v in report["source"].items())
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>Cleaned corpus</title><style>{_STYLE}</style></head><body>",
            f"<h1>Cleaned corpus</h1><p>{source}</p>",
            f"<p>{read['documents']:,} documents of {read['bytes']:,} bytes read.",
            f"Masked: {masked or 'nothing'}. Repeated spans removed: {cut['spans']:,} of "
            f"{cut['bytes']:,} bytes in {cut['documents']:,} documents.</p>",
            "<table><tr><th>Rule</th><th>Kept if</th><th>Documents</th><th>Bytes</th></tr>",
            *rows,
            "</table><h2>Examples</h2>",
            *examples,
            "</body></html>\n",
        )
    )
