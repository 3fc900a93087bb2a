"""The page of the demo: two runs side by side, beside the paper."""

from collections.abc import Sequence
from pathlib import Path

from coupled_adam import experiments
from coupled_adam.figures import FIGURES, figures
from coupled_adam.report import charts
from coupled_adam.report.aggregate import Evaluated, short
from coupled_adam.report.charts import Chart
from coupled_adam.report.page import write_page
from coupled_adam.report.study import read_study
from coupled_adam.report.table import Row, rows

#: The published result that stands beside the demo's.
PUBLISHED_MODEL, PUBLISHED_TOKENS = "125M", "20B"

#: What the demo shows, in the order of the paper. Word similarity is not among it: it takes millions of tokens.
SHOWN = (
    "validation_loss",
    "isotropy",
    "norm_of_mean",
    "mean_shift_ratio",
    "inverse_condition",
    "norm_frequency_pearson",
    "norm_frequency_spearman",
)


def demo_rows(runs: Sequence[Evaluated]) -> list[Row]:
    """Make one row a figure: the final figures of the runs, beside those of the paper for the same optimizers."""
    published = [experiments.published_result(PUBLISHED_MODEL, PUBLISHED_TOKENS, run.method) for run in runs]
    return rows(figures(SHOWN), [run.figures for run in runs], published)


def write_demo_page(path: Path, runs: Sequence[Evaluated], source: str) -> None:
    """Write the page of two runs that differ in the optimizer of the embedding alone; it opens offline.

    Args:
        path: of the page.
        runs: trained with AdamW and with Coupled Adam, evaluated.
        source: what the text is called.
    """

    def drawn(name: str, caption: str, highest: float | None = None) -> Chart:
        series = [(run.method, [(line["step"], line[name]) for line in run.curve if name in line]) for run in runs]
        return Chart(charts.curves(FIGURES[name].title, series, y=FIGURES[name].axis, highest=highest), caption)

    samples = {run.method: sample for run in runs if (sample := run.token_sample)}
    experiment = runs[0].experiment
    shift, loss = ([run.figures[name] for run in runs] for name in ("mean_shift_ratio", "validation_loss"))
    training = {
        "mean_shift": drawn(
            "mean_shift_ratio",
            "How far the mean embedding is from the origin, relative to the length of an embedding.",
            1,
        ),
        "isotropy": drawn("isotropy", "1 = isotropic: no preferred direction.", 1.02),
        "loss": drawn("validation_loss", "Loss on held-out text (lower is better): does centering cost anything?"),
    }
    drifts = {f"drift-{i}": each for i, each in enumerate(charts.drifts({r.method: [r.curve] for r in runs}))}
    maps = {f"embeddings-{i}": each for i, each in enumerate(charts.token_maps(samples))}
    write_page(
        path,
        __name__,
        training | drifts | maps,
        headline=(
            f"After {experiment.train.steps:,} steps the norm of the mean embedding is {shift[0]:.3f} of the mean norm "
            f"with AdamW and {shift[1]:.3f} with Coupled Adam; the validation losses are {loss[0]:.2f} and "
            f"{loss[1]:.2f}."
        ),
        steps=f"{experiment.train.steps:,}",
        parameters=short(runs[0].parameters),
        tokens=short(runs[0].tokens),
        source=source,
        published_model=PUBLISHED_MODEL,
        published_tokens=PUBLISHED_TOKENS,
        names=[run.method for run in runs],
        rows=demo_rows(runs),
        training=list(training),
        drifts=list(drifts),
        map_caption=charts.MAP_CAPTION,
        mapped=f"{len(next(iter(samples.values())).text):,}",
        lr=charts.number_text(experiment.schedule.lr),
        study=read_study(),
    )
