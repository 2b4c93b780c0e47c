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

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em .9em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
.grid { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 104px; font-size: 12px; } figure img { width: 100px; border: 3px solid #ccc; }
figure.ok img { border-color: #2a2; } figure.bad img { border-color: #c22; } img { image-rendering: pixelated; }
svg { background: #fafafa; margin: 0 12px 12px 0; } pre { background: #f4f4f4; padding: 1em; overflow: auto; }
"""


def write(
    out, *, title, scores, metrics, seconds, config, curves=(), pictures=(), cases=(), examples=16,
    precision_recall=None, worst=(),
):  # fmt: skip
    """Writes both reports to the folder `out` -> path of report.html.

    scores: as `suites.scores`; metrics, seconds: name -> number; config: JSON-able;
    curves: (title, records, names) with records as `runtime.metrics.read`; pictures: (title, path of
    a PNG); cases: `suites.Case`s, of which `examples` a suite are shown, as they come; precision_recall:
    {name: (precision, recall)}, arrays along falling thresholds; worst: (pixels, pixels, words), what it should
    be beside what it is.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = {
        "scores": scores,
        "metrics": metrics,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_rss_bytes": peak,
        "config": config,
    }
    (out / "report.json").write_text(json.dumps(summary, indent=1))
    body = [f"<h1>{html.escape(title)}</h1>"] + ([_score_table(scores)] if scores else [])
    body.append(_number_table("Measured", metrics))
    body.append(_number_table("Seconds", seconds))
    body.append(f"<p>Peak memory {peak / 2**30:.2f} GiB.</p>")
    for suite in scores:
        chosen = [case for case in cases if case.suite == suite]
        body.append(f"<h2>{html.escape(suite)}</h2>")
        for label, flag in (("seen combinations", False), ("unseen combinations", True)):
            shown = [_figure(case) for case in chosen if case.unseen == flag][:examples]
            if shown:
                body.append(f"<h3>{label}</h3><div class=grid>{''.join(shown)}</div>")
    if worst:
        body.append("<h2>Worst</h2><div class=grid>")
        for *pair, words in worst:
            both = png(np.concatenate(pair, 1))
            body.append(
                f"<figure style='width:204px'><img style='width:200px' src='{both}'>{html.escape(words)}</figure>"
            )
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


def _score_table(scores):
    rows = "<tr><th>suite</th><th>seen</th><th>n</th><th>unseen</th><th>n</th><th>ceiling</th></tr>"
    for suite, row in scores.items():
        cells = []
        for right, total in (row["seen"], row["unseen"]):
            cells += [f"{right / total:.3f}" if total else "-", total]
        cells.append(f"{row['ceiling']:.3f}")
        rows += f"<tr><td>{html.escape(suite)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    note = "One sample a prompt. The ceiling is the judge's score on the tokenizer's own reconstructions."
    return f"<table>{rows}</table><p>{note}</p>"


def _number_table(title, numbers):
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.4g}</td></tr>" for name, value in numbers.items()
    )
    return f"<h3>{title}</h3><table>{rows}</table>"


def _figure(case):
    kind = "ok" if case.ok else "bad"
    why = "" if case.ok else f"<br><b>{html.escape(case.why)}</b>"
    return f"<figure class={kind}><img src='{png(case.pixels)}'>{html.escape(case.item.prompt)}{why}</figure>"


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
