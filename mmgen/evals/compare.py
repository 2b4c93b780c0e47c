"""How sure a score is, and whether two models differ: intervals of shares, and tests on the same cases."""

import json
import math
from hashlib import blake2b
from pathlib import Path
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)  # of 95 % intervals
# What must be alike for cases to be the same ones; how pictures are drawn may differ, as that is what is compared.
SAME = ("seed", "split", "language", "size", "seen", "unseen")
PARTS = ("seen", "unseen")


def wilson(right, total):
    """The 95 % score interval (low, high) of a share (Wilson 1927); (0, 1) of nothing."""
    if not total:
        return 0.0, 1.0
    share, reach = right / total, Z**2 / total
    half = Z * math.sqrt(share * (1 - share) / total + reach / total / 4)
    low, high = ((share + reach / 2 + sign * half) / (1 + reach) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def mcnemar(gained, lost):
    """The two-sided exact p-value that two models are equally good, of which one alone was right `gained` times and
    the other alone `lost` times on the same cases (McNemar 1947, in the exact conditional form)."""
    n, least = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def difference(both, gained, lost, neither):
    """The difference of two shares of the same cases, and its 95 % interval (low, high): the square-and-add interval
    of Newcombe (1998, Statistics in Medicine 17, 2635-2650, method 10). gained, lost: right in one of the two alone."""
    n = both + gained + lost + neither
    now, before = (both + gained) / n, (both + lost) / n
    (l1, u1), (l2, u2) = wilson(both + gained, n), wilson(both + lost, n)
    product = both * neither - gained * lost
    if product > 0:
        product = max(product - n / 2, 0)  # a continuity correction
    spread = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    phi = product / math.sqrt(spread) if spread else 0.0
    reach = lambda a, b: math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))
    low, high = now - before - reach(now - l1, u2 - before), now - before + reach(u1 - now, before - l2)
    return now - before, (max(low, -1.0), min(high, 1.0))


def outcomes(cases):
    """Every case of `suites.Case`s in one character, so that another model can be compared on the same ones:
    {suite: {"asked": hash of what was asked, "seen": "1101-", "unseen": "01"}}; "-" is not counted."""
    table = {}
    for suite in dict.fromkeys(case.suite for case in cases):
        mine = [case for case in cases if case.suite == suite]
        asked = "\n".join(f"{case.unseen} {case.item!r}" for case in mine)
        table[suite] = {"asked": blake2b(asked.encode(), digest_size=8).hexdigest()}
        for name, flag in zip(PARTS, (False, True)):
            marks = ("-" if case.ok is None else "01"[bool(case.ok)] for case in mine if case.unseen == flag)
            table[suite][name] = "".join(marks)
    return table


def read(path):
    """The report.json of a report's folder, or the file itself. ValueError where it keeps no outcomes of cases."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"expected the folder of a report, or its report.json; found no {path}")
    try:
        report = json.loads(path.read_text("utf-8"))
        known = isinstance(report["cases"], dict) and isinstance(report["config"], dict)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{path} keeps no outcomes of single cases: expected a report of `mmgen evaluate` of this version "
            "on a suite with a judge; evaluate that checkpoint again"
        )
    return report


def check_settings(config, baseline):
    """ValueError where two configs of `mmgen evaluate` do not ask the same cases."""
    here, there = (json.loads(json.dumps(each)) for each in (config, baseline))
    wrong = [
        f"{name} is {here[name]!r} here and {there.get(name, 'unknown')!r} in the baseline"
        for name in SAME
        if here[name] != there.get(name, "unknown")
    ]
    if wrong:
        raise ValueError(f"a baseline of other cases cannot be compared: {'; '.join(wrong)}")


def compare(table, baseline):
    """`outcomes` of two models, case by case -> rows {"suite", "part", "cases", "baseline", "now", "difference",
    "interval", "p"}: shares, their difference with its interval, and McNemar's p.

    The baseline may have more suites. ValueError where it lacks one, or asked something else in it.
    """
    missing = [suite for suite in table if suite not in baseline]
    if missing:
        raise ValueError(
            f"the baseline has no suite {', '.join(missing)}: it has {', '.join(baseline) or 'none'}; evaluate both "
            "on the same suites"
        )
    other = [suite for suite in table if table[suite]["asked"] != baseline[suite]["asked"]]
    if other:
        raise ValueError(
            f"the baseline asked other cases in {', '.join(other)}, though its settings are the same: its world was "
            "another version; evaluate that checkpoint again"
        )
    rows = []
    for suite, found in table.items():
        for part in PARTS:
            pairs = zip(found[part], baseline[suite][part], strict=True)
            pairs = [pair for pair in pairs if "-" not in pair]
            if not pairs:
                continue
            counts = [pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))]
            both, gained, lost, _ = counts
            delta, interval = difference(*counts)
            rows.append({
                "suite": suite, "part": part, "cases": len(pairs), "baseline": (both + lost) / len(pairs),
                "now": (both + gained) / len(pairs), "difference": delta, "interval": list(interval),
                "p": mcnemar(gained, lost),
            })  # fmt: skip
    return rows


def mark(row):
    """The sign of a significant row: "+" better, "-" worse, "" where chance may be all."""
    return "" if row["p"] >= 0.05 else "+" if row["difference"] > 0 else "-"


def show(rows):
    """The comparison as lines of text."""
    lines = [
        f"{'against the baseline':<24}{'part':<8}{'was':>7}{'is':>7}{'difference':>12}{'95 %':>18}{'p':>8}"
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"{row['suite']:<24}{row['part']:<8}{row['baseline']:>7.3f}{row['now']:>7.3f}{row['difference']:>+12.3f}"
            f"{f'{low:+.3f} {high:+.3f}':>18}{row['p']:>8.3f} {mark(row)}"
        )
    return "\n".join(lines)
