"""Tables and plots from the JSON of `run.sh bench` and `run.sh peers`: report.py RESULTS_FOLDER.

Writes prefill.png and decode.png beside them where matplotlib is installed, and prints the tables either way.
"""

import json
import pathlib
import sys


def load(path):
    return [r for r in json.loads(path.read_text())["rows"] if "ms" in r] if path.exists() else []


def table(rows, key, figure):
    """Prints figures by peer (columns) and shape (rows)."""
    shapes = sorted({key(r) for r in rows})
    peers = sorted({r.get("peer", "ferroflash") for r in rows}, key=lambda p: (p != "ferroflash", p))
    print("| shape | " + " | ".join(peers) + " |")
    print("|---|" + "---|" * len(peers))
    for shape in shapes:
        cells = []
        for peer in peers:
            found = [r[figure] for r in rows if key(r) == shape and r.get("peer", "ferroflash") == peer]
            cells.append(f"{found[0]:.0f}" if found else "")
        print(f"| {' '.join(map(str, shape))} | " + " | ".join(cells) + " |")


def plot(rows, series, x, figure, path):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print(f"skipped: {path.name}, no matplotlib")
        return
    for name in sorted({series(r) for r in rows}):
        points = sorted((r[x], r[figure]) for r in rows if series(r) == name)
        pyplot.plot(*zip(*points), marker="o", label=name)
    pyplot.xscale("log", base=2)
    pyplot.xlabel(x)
    pyplot.ylabel(figure)
    pyplot.legend(fontsize=6)
    pyplot.savefig(path, dpi=150)
    pyplot.clf()
    print(path)


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "results")
    rows = load(folder / "bench.json") + load(folder / "peers.json")
    prefill = [r for r in rows if r.get("op") == "prefill"]
    decode = [r for r in rows if r.get("op") == "decode"]
    if not rows:
        sys.exit(f"no results in {folder}")
    print("prefill, TFLOP/s\n")
    kind = lambda r: (f"{r['heads']}:{r.get('kv_heads', r['heads'])}", f"page {r.get('page_size', 0)}")
    table(prefill, lambda r: (r["head_dim"], "causal" if r["causal"] else "full", r["seq_len"], *kind(r)), "tflops")
    print("\ndecode, GB/s of K and V\n")
    table(decode, lambda r: (r["kv"], r["batch"], r["len"], r.get("page_size", 0)), "gbps")
    mla = [r for r in rows if r.get("op") == "mla"]
    for row in mla:
        if row.get("splits", "Auto") != "Auto":
            row["peer"] = "ferroflash, 16 rows"
    for figure, unit in (("gbps", "GB/s"), ("tflops", "TFLOP/s")):
        print(f"\nlatent attention, {unit}\n")
        table(mla, lambda r: (f"{r['heads']} heads", r["batch"], r["len"]), figure)
    name = lambda r: r.get("peer", "ferroflash")
    plain = lambda r: r.get("kv_heads", r["heads"]) == r["heads"] and not r.get("page_size")
    causal = [r for r in prefill if r["causal"] and plain(r)]
    plot(causal, lambda r: f"{name(r)} d{r['head_dim']} causal", "seq_len", "tflops", folder / "prefill.png")
    plot(decode, lambda r: f"{name(r)} {r['kv']} batch {r['batch']} page {r.get('page_size', '-')}", "len", "gbps", folder / "decode.png")


if __name__ == "__main__":
    main()
