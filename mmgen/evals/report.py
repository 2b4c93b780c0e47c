"""`report.json` and `report.html`: what was measured, and the pictures themselves, in one file each."""

import base64
import html
import io
import json
import resource
from pathlib import Path

import numpy as np
from PIL import Image

from mmgen.data.images import straight
from mmgen.evals import compare, suites

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em .9em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
.grid { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; min-width: 104px; max-width: 640px; width: min-content; font-size: 12px; }
figure img { height: 100px; border: 3px solid #ccc; } small { color: #777; }
figure.ok img { border-color: #2a2; } figure.bad img { border-color: #c22; } img { image-rendering: pixelated; }
svg { background: #fafafa; margin: 0 12px 12px 0; } pre { background: #f4f4f4; padding: 1em; overflow: auto; }
"""


def write(
    out, *, title, scores, metrics, seconds, config, shares=None, curves=(), pictures=(), cases=(), examples=16,
    comparison=(), precision_recall=None, worst=(),
):  # fmt: skip
    """Writes both reports to the folder `out` -> path of report.html.

    scores: as `suites.scores`; metrics, seconds: name -> number; config: JSON-able; shares: {name: [right, total]},
    metrics too, with an interval; curves: (title, records, names) with records as `runtime.metrics.read`; pictures:
    (title, path of a PNG); cases: `suites.Case`s, of which `examples` wrong ones a suite are shown, and as many right
    ones; comparison: rows of `compare.compare`; precision_recall: {name: (precision, recall)}, arrays along falling
    thresholds; worst: (pixels, pixels ..., words), what it should be beside what it is.
    """
    out, shares = Path(out), shares or {}
    out.mkdir(parents=True, exist_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    metrics = metrics | {name: right / max(total, 1) for name, (right, total) in shares.items()}
    ranges = {name: list(compare.wilson(*share)) for name, share in shares.items()}
    summary = {
        "scores": scores,
        "metrics": metrics,
        "intervals": {"scores": suites.intervals(scores), "metrics": ranges},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_rss_bytes": peak,
        "config": config,
    }
    summary |= {"comparison": list(comparison)} if comparison else {}
    summary |= {"cases": compare.outcomes(cases)} if cases else {}
    (out / "report.json").write_text(json.dumps(summary, indent=1))
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [_score_table(scores, summary["intervals"]["scores"])] if scores else []
    body += [_comparison_table(comparison)] if comparison else []
    body.append(_number_table("Measured", metrics, ranges))
    body.append(_number_table("Seconds", seconds))
    body.append(f"<p>Peak memory {peak / 2**30:.2f} GiB.</p>")
    for suite in scores:
        body += _figures(suite, [case for case in cases if case.suite == suite], examples)
    if worst:
        body.append("<h2>Worst</h2><div class=grid>")
        for *pair, words in worst:
            both = png(np.concatenate(pair, 1))
            body.append(f"<figure><img src='{both}'>{html.escape(words)}</figure>")
        body.append("</div>")
    if precision_recall:
        body.append("<h2>Precision over recall</h2>")
        body += [_precision_recall(name, *curve) for name, curve in precision_recall.items()]
    if curves or pictures:
        body.append("<h2>Training</h2>")
    body += [_curve(title, records, names) for title, records, names in curves]
    for caption, path in pictures:
        data = base64.b64encode(Path(path).read_bytes()).decode()
        body.append(f"<h3>{html.escape(caption)}</h3><img width=768 src='data:image/png;base64,{data}'>")
    body.append(f"<h2>Config</h2><pre>{html.escape(json.dumps(config, indent=1))}</pre>")
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    (out / "report.html").write_text(page + "\n".join(body), "utf-8")
    return out / "report.html"


def _table(header, rows):
    line = lambda tag, cells: f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


def _between(interval):
    return "<small>{:.3f} to {:.3f}</small>".format(*interval)


def _score_table(scores, intervals):
    rows = []
    for suite, row in scores.items():
        cells = [f"<a href='#{html.escape(suite)}'>{html.escape(suite)}</a>"]
        for part in ("seen", "unseen"):
            right, total = row[part]
            cells += [f"{right / total:.3f} {_between(intervals[suite][part])}" if total else "-", total]
        rows.append([*cells, f"{row['ceiling']:.3f}"])
    note = (
        "One sample a prompt; 95 % intervals (Wilson). The ceiling is the judge's score on what the codes of "
        "right answers give back."
    )
    return _table(("suite", "seen", "n", "unseen", "n", "ceiling"), rows) + f"<p>{note}</p>"


def _comparison_table(rows):
    cells = []
    for row in rows:
        sign = compare.mark(row)
        delta = "{:+.3f} <small>{:+.3f} to {:+.3f}</small>".format(row["difference"], *row["interval"])
        bold = f"<b>{delta} {'better' if sign == '+' else 'worse'}</b>" if sign else delta
        was = [f"{row['baseline']:.3f}", f"{row['now']:.3f}"]
        cells.append([html.escape(row["suite"]), row["part"], row["cases"], *was, bold, f"{row['p']:.3f}"])
    note = (
        "The same cases of both. Bold where the exact McNemar test gives p below .05: of twenty rows without any "
        "difference one does."
    )
    header = ("suite", "part", "n", "baseline", "now", "difference (95 %)", "p")
    return f"<h2>Against the baseline</h2>{_table(header, cells)}<p>{note}</p>"


def _number_table(title, numbers, intervals={}):
    rows = [
        [html.escape(name), f"{value:.4g}", _between(intervals[name]) if name in intervals else ""]
        for name, value in numbers.items()
    ]
    return f"<h3>{title}</h3>{_table((), rows)}" if rows else ""


def _figures(suite, cases, examples):
    """The pictures of a suite, those that are wrong first."""
    cases = [case for case in cases if case.pixels is not None and case.ok is not None]
    parts = [f"<h2 id='{html.escape(suite)}'>{html.escape(suite)}</h2>"]
    for label, flag in (("wrong", False), ("right", True)):
        found = [case for case in cases if bool(case.ok) == flag]
        if found:
            shown = "".join(map(_figure, found[:examples]))
            head = f"{label}: {min(examples, len(found))} of {len(found)}"
            parts.append(f"<h3>{head}</h3><div class=grid>{shown}</div>")
    return parts if len(parts) > 1 else []


def _figure(case):
    """Source, answer and truth side by side, as far as there are."""
    panels = {"source": case.source, "answer": case.pixels, "a right one": case.truth}
    panels = {name: pixels for name, pixels in panels.items() if pixels is not None}
    names = f"<br><small>{' | '.join(panels)}</small>" if len(panels) > 1 else ""
    why = "" if case.ok else f"<br><b>{html.escape(case.why)}</b>"
    unseen = " <small>(unseen)</small>" if case.unseen else ""
    return (
        f"<figure class={'ok' if case.ok else 'bad'}><img src='{png(_beside(list(panels.values())))}'>"
        f"{html.escape(case.item.prompt)}{unseen}{why}{names}</figure>"
    )


def _beside(panels):
    """Pictures as one, in a row with gaps; one alone keeps its alpha."""
    if len(panels) == 1:
        return panels[0]
    panels = [pixels[..., :3] for pixels in panels]
    height, gap = max(len(pixels) for pixels in panels), max(len(pixels) // 16 for pixels in panels)
    grown = [np.pad(p, ((0, height - len(p)), (0, gap), (0, 0)), constant_values=255) for p in panels]
    return np.concatenate(grown, 1)[:, : -gap or None]


def png(pixels):
    """Pixels uint8 [H, W, 3], or 4 as `images.ALPHA` gives them -> the PNG as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(straight(pixels)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _precision_recall(name, precision, recall, side=150):
    """A small SVG of precision (up) over recall (right), from 0 to 1 both."""
    points = zip(recall, precision)
    path = " ".join(f"{10 + (side - 20) * x:.1f},{side - 10 - (side - 35) * y:.1f}" for x, y in points)
    text = f"<text x=10 y=14 font-size=11>{html.escape(name)}</text>"
    return (
        f"<svg width={side} height={side}>{text}<polyline fill=none stroke='#1560bd' points='{path}'/></svg>"
    )


def _curve(title, records, names, width=480, height=200):
    """An SVG line for each of `names` over steps; the first sets the scale."""
    lines, labels = [], []
    for name, colour in zip(names, ("#1560bd", "#c2410c", "#15803d")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if not points:
            continue
        x, y = np.array(points, float).T
        low, high = y.min(), max(y.max(), y.min() + 1e-9)
        px = 10 + (width - 20) * x / x.max()
        py = height - 20 - (height - 50) * (y - low) / (high - low)
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py))
        lines.append(f"<polyline fill=none stroke='{colour}' points='{path}'/>")
        labels.append(f"<tspan fill='{colour}'>{html.escape(name)} {y[0]:.3g} → {y[-1]:.3g} </tspan>")
    text = f"<text x=10 y=16 font-size=12>{html.escape(title)}: {''.join(labels)}</text>"
    return f"<svg width={width} height={height}>{text}{''.join(lines)}</svg>"
