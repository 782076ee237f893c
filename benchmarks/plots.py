"""The plots: how far each implementation is from the limit, and how cost grows with size."""

import matplotlib

from benchmarks.cases import CHUNKED, FUSED, IN_PLACE, PASSES

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLORS = {
    "eager": "#8c8c8c",
    "torch.compile": "#56b4e9",
    CHUNKED: "#009e73",
    "Liger": "#0072b2",
    "quack": "#cc79a7",
    "flash-attention": "#f0e442",
    "apex": "#7f5539",
    "Cut Cross-Entropy": "#8073ac",
    "reference": "#d8c9a3",
    FUSED: "#d55e00",
    IN_PLACE: "#e69f00",
    "autograd": "#8c8c8c",  # the rungs of the ladder
    "autograd, CUDA graph": "#009e73",
    "steps": "#d8c9a3",
    "fused": "#e69f00",
    "network": "#d55e00",
}
# What grows along a curve: op -> what the axis shows, its place in the shape, the number at the other place.
CURVES = {"cross_entropy": ("classes, of 512 rows", 1, 512), "batch_norm": ("rows, of 256 channels", 0, 256)}


def write(output, rows):
    """A file for each op with what was measured of it; returns their paths."""
    paths = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        for draw in (_bars, _curves):
            figure = draw(op, of_op)
            if figure is not None:
                paths.append(output / f"{op}_{draw.__name__.strip('_')}.png")
                figure.savefig(paths[-1], dpi=130)
                plt.close(figure)
    return paths


def _bars(op, rows):
    """Time over limit, forward and backward together: a panel for each dtype, with and without what follows."""
    rows = [row for row in rows if not row["curve"]]
    if not rows:
        return None

    def panel_of(row):
        following = [op for op in ("add", "relu") if op in row["variant"].split()]
        return " ".join([row["dtype"], "with" * bool(following), " and ".join(following)]).strip()

    panels = list(dict.fromkeys(map(panel_of, rows)))
    names = [name for name in COLORS if any(row["implementation"] == name for row in rows)]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.7 + 2.7 * len(panels)), squeeze=False, layout="constrained"
    )
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        of_panel = [row for row in rows if panel_of(row) == panel]
        cases = list(dict.fromkeys(map(_label, of_panel)))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = {_label(row): row["both_to_limit"] for row in of_panel if row["implementation"] == name}
            places = [cases.index(label) + (i - (len(names) - 1) / 2) * width for label in bars]
            drawn = ax.bar(places, bars.values(), width * 0.92, color=COLORS[name], label=name)
            on_white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # where the limit runs through it
            ax.bar_label(drawn, fmt=_short, fontsize=6.5, padding=1.5, bbox=on_white)
        limit = ax.axhline(1, color="black", linewidth=1.2, label="limit of the machine")
        ax.set_yscale("log")
        ax.set_ylim(min(0.5, ax.get_ylim()[0]), ax.get_ylim()[1] * 1.5)
        ax.set_ylabel("time ÷ limit")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks(range(len(cases)), cases, fontsize=8)
        ax.set_title(panel, fontsize=10, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    handles = [limit, *(plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names)]
    figure.legend(handles, ["limit of the machine", *names], loc="outside lower center", ncols=7, fontsize=8)
    figure.suptitle(f"{op}, forward and backward (log scale, less is better)", fontsize=11)
    return figure


def _label(row):
    kinds = [kind for kind in ("channels_last", "evaluation", "probabilities") if kind in row["variant"].split()]
    return "\n".join(["x".join(map(str, row["shape"])), *kinds])


def _short(value):
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _curves(op, rows):
    """Milliseconds against size, both axes logarithmic: a panel for each pass."""
    if op not in CURVES:
        return None
    axis, place, other = CURVES[op]
    rows = [
        row
        for row in rows
        if len(row["shape"]) == 2
        and row["shape"][1 - place] == other
        and row["dtype"] == "float32"
        and not row["variant"]
    ]
    rows.sort(key=lambda row: row["shape"][place])
    if len({row["shape"][place] for row in rows}) < 2:
        return None
    figure, axes = plt.subplots(1, len(PASSES), figsize=(11, 4), sharey=True, layout="constrained")
    for ax, of_pass in zip(axes, PASSES, strict=True):
        for name in COLORS:
            points = [(row["shape"][place], row[f"{of_pass}_ms"]) for row in rows if row["implementation"] == name]
            if points:
                ax.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=COLORS[name], label=name)
        limit = {row["shape"][place]: row[f"{of_pass}_limit_ms"] for row in rows}
        ax.plot(limit.keys(), limit.values(), "k--", linewidth=1.2, label="limit of the machine")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(of_pass, fontsize=10)
        ax.set_xlabel(axis)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.yaxis.set_major_locator(LogLocator(numticks=12))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    figure.suptitle(f"{op}, float32: how cost grows", fontsize=11)
    return figure
