"""Gain with its interval against cost, one panel for each student."""

from __future__ import annotations

from pathlib import Path

from .table import StageSummary

FORMATS = ('.svg', '.png', '.pdf')


def draw(summary: StageSummary, reference: str, path: Path) -> None:
    """Draws a stage: the gain over the reference in mAP points against the cost of its training.

    The bar is the interval over seeds and images where there is one, else over seeds. The cost is
    in milliseconds per step where all runs have logged it, else in minutes of training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [line for line in summary.lines if line.gain is not None]
    students = [student for student in summary.stage.students if summary.of(student)]
    steps = all(line.step_ms is not None for line in drawn)
    figure = Figure(figsize=(1.5 + 4.5 * len(students), 4.5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(students), squeeze=False, sharey=True)[0]
    for ax, student in zip(axes, students, strict=True):
        ax.axhline(0, color='grey', linewidth=1)
        for line in drawn:
            cost = line.step_ms if steps else (line.seconds or 0) / 60
            if line.entry.student != student or cost is None or line.gain is None:
                continue
            low, high = line.seeds_and_images or line.interval or (line.gain, line.gain)
            # A percentile interval need not hold the mean.
            ends = [[max(line.gain - low, 0)], [max(high - line.gain, 0)]]
            ax.errorbar([cost], [line.gain], yerr=ends, fmt='o', capsize=3)
            ax.annotate(
                line.entry.variant.label, (cost, line.gain), xytext=(5, 5), fontsize=8,
                textcoords='offset points',
            )  # fmt: skip
        ax.set_title(student or summary.stage.name)
        ax.set_xlabel('ms per training step' if steps else 'training time (min)')
        ax.margins(x=0.25)
    axes[0].set_ylabel(f'gain over {reference} (mAP points, 95 % interval)')
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, the same results give the same file.
    figure.savefig(path, dpi=150, metadata={'Date': None} if path.suffix == '.svg' else None)
