"""The report's plots as SVG, for light and dark pages."""

import warnings
from collections.abc import Sequence
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.evaluation.curves import Panel
from pipeline.evaluation.pages.tables import sentence_score_name
from pipeline.evaluation.report import EvaluationReport
from pipeline.evaluation.reward_quality import Reliability, ScoredPair

INK = "#808080"  # stands out from white and from black
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#06b6d4")
WIDTH, HEIGHT = 3.0, 2.0  # of a panel, in inches
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "font.size": 8,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.framealpha": 0,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text: small, selectable, and coloured by the page's style
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a token is no formula
    "xtick.color": INK,
    "ytick.color": INK,
}


def score_plot(report: EvaluationReport) -> str:
    """Plot every system's corpus score with its interval, a panel for each metric."""
    names = list(report.systems)
    with matplotlib.rc_context(STYLE):
        metrics = list(report.systems[names[0]].metrics)
        figure, axes = _grid(len(metrics), columns=3)
        for axis, metric in zip(axes, metrics, strict=True):
            for position, name in enumerate(names):
                score = report.systems[name].metrics[metric]
                # An interval of a percentile bootstrap need not hold the score itself.
                low, high = max(0.0, score.value - score.low), max(0.0, score.high - score.value)
                axis.errorbar(score.value, position, xerr=[[low], [high]], fmt="o", capsize=3)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_title(metric)
        return _svg(figure, "scores")


def curve_plot(panels: Sequence[Panel]) -> str:
    """Plot the curves of one stage's training."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(panels), columns=3)
        for axis, panel in zip(axes, panels, strict=True):
            for curve in panel.curves:
                marker = "." if len(curve.steps) < 30 else ""
                axis.plot(curve.steps, curve.values, marker=marker, linewidth=1.2, label=curve.name)
            axis.set_title(panel.title)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if len(panel.curves) > 1:
                axis.legend(fontsize=7)
        return _svg(figure, f"curves-{panels[0].stage}")


def best_of_plot(report: EvaluationReport) -> str:
    """Plot the best of n samples of every system, and as a dashed line the report's decoding on the same prompts."""
    with matplotlib.rc_context(STYLE):
        curves = list(next(iter(report.best_of.values())).curves)
        figure, axes = _grid(len(curves), columns=2)
        for axis, name in zip(axes, curves, strict=True):
            for number, (system, best_of) in enumerate(report.best_of.items()):
                colour = COLOURS[number % len(COLOURS)]
                values = best_of.curves[name]
                axis.plot(range(1, len(values) + 1), values, marker="o", color=colour, label=system)
                axis.axhline(best_of.decoded[name], linestyle="--", linewidth=1, color=colour)
            axis.set_title(f"best {sentence_score_name(report, name)} of n samples")
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axis.legend(fontsize=7)
        return _svg(figure, "best-of-n")


def gain_plot(a: str, b: str, metric: str, gains: Sequence[float]) -> str:
    """Plot the distribution of the gains, of the examples on which the systems differ."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(1, columns=1)
        moved = [gain for gain in gains if abs(gain) > 1e-9]
        axes[0].hist(moved, bins=min(40, max(5, len(moved) // 5)))
        axes[0].axvline(0, color=INK, linewidth=1)
        axes[0].set_title(f"{metric}, {b} - {a}: {len(moved)} examples")
        return _svg(figure, "gains")


def reliability_plot(table: Sequence[Reliability]) -> str:
    """Plot a reward model's predicted against its observed frequency; on the dashed line both are equal."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(1, columns=1)
        axes[0].plot([0.5, 1.0], [0.5, 1.0], linestyle="--", color=INK, linewidth=1)
        axes[0].plot([bin_.predicted for bin_ in table], [bin_.observed for bin_ in table], marker="o")
        axes[0].set_title("reliability: right against predicted")
        return _svg(figure, "reliability")


def pair_score_plot(pairs: Sequence[ScoredPair], shift: float, scale: float) -> str:
    """Plot the distribution of a reward model's scores of chosen and rejected held-out texts."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(1, columns=1)
        chosen = [(pair.chosen_score - shift) / scale for pair in pairs]
        rejected = [(pair.rejected_score - shift) / scale for pair in pairs]
        axes[0].hist([chosen, rejected], bins=20, label=["chosen", "rejected"])
        axes[0].set_title("scores of held-out texts")
        axes[0].legend(fontsize=7)
        return _svg(figure, "pair-scores")


def _grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Make a figure with `count` panels."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _svg(figure: Figure, name: str) -> str:
    """Render a figure as an `<svg>` element, always the same; its ids hold `name`, so figures can share a page."""
    buffer = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.id": name}), warnings.catch_warnings():
        # The text stays text, so the reader's fonts draw what matplotlib's own cannot.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()
