"""The report of an ablation: one page that needs nothing else, and its tables as text."""

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from arplus import pages
from arplus.config import AblateConfig, Row, flag
from arplus.study.paper import COLUMNS, COMPARES, FIGURES, LABELS, STANDARD_COLUMNS, TABLES, Column
from arplus.study.results import BASE, Cell, Key, difference, effect, within_noise

Rows = Mapping[Key, Mapping[str, Cell]]

NOISE = "≈"
"""The mark of a difference that is within noise."""
_VARIANTS = "What the paper found ineffective"
"""Heading of the third table, of which the paper has no figures."""
_VARIANT_COLUMNS = (*STANDARD_COLUMNS, *(c for c in COLUMNS if c.name in ("parameters_m", "train_minutes")))
_INK = "#010203"
"""A colour that nothing else has: it becomes that of the text around the figure."""
_WITHOUT = {name: f"{LABELS[BASE]} without {label[1:]}" for name, label in LABELS.items() if label.startswith("-")}
"""The rows that lack a method, by what they are."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933")
"""Okabe and Ito's, which the colour-blind can tell apart, and one more."""


@dataclass(frozen=True)
class Shown:
    """A cell as it is shown."""

    mean: str
    deviation: str = ""
    mark: str = ""
    """That of a difference to the base which is within noise, or cannot be told from it."""
    judgement: str = ""
    """better or worse than the base; empty where that is not said."""

    @classmethod
    def of(cls, here: Mapping[str, Mapping[str, Cell]], name: str, column: Column, base_name: str = BASE) -> "Shown":
        """A row's cell, given all rows of its size, one of which is the base."""
        cell, base = here[name].get(column.name), here.get(base_name, {}).get(column.name)
        if cell is None:
            return cls("–")
        mark = judgement = ""
        if name != base_name and base is not None and column.lower_is_better is not None:
            mark = {True: NOISE, False: "", None: "?"}[within_noise(cell, base)]
            if not mark:
                judgement = "better" if (cell.mean < base.mean) == column.lower_is_better else "worse"
        return cls(_number(cell.mean), f"{cell.deviation:.2g}" if cell.deviation else "", mark, judgement)

    def __str__(self) -> str:
        """As plain text."""
        return " ".join(filter(None, (self.mean, self.deviation and f"± {self.deviation}", self.mark)))


def _rows(
    presets: Sequence[str], here: Mapping[str, Mapping[str, Cell]], columns: Sequence[Column]
) -> list[tuple[str, list[Shown], list[str]]]:
    """A label, cells, and what the paper printed, for each row."""
    return [
        (
            LABELS.get(preset, preset),
            [Shown.of(here, preset, column) for column in columns],
            [_number(value) for value in FIGURES.get(preset, ())] if columns is COLUMNS else [],
        )
        for preset in presets
    ]


def _variant_rows(
    variants: Sequence[Row], here: Mapping[str, Mapping[str, Cell]]
) -> list[tuple[str, list[Shown], list[str]]]:
    """The third table: each preset and its variants, and below a variant what it has more or less than its preset."""
    found: list[tuple[str, list[Shown], list[str]]] = []
    for preset in dict.fromkeys(row.preset for row in variants):
        mine = [row for row in variants if row.preset == preset and row.name in here]
        if mine and preset in here:
            cells = [Shown.of(here, preset, column, preset) for column in _VARIANT_COLUMNS]
            found.append((LABELS.get(preset, preset), cells, []))
        for row in mine:
            cells = [Shown.of(here, row.name, column, preset) for column in _VARIANT_COLUMNS]
            found.append((row.name, cells, [_less(here, row, column) for column in _VARIANT_COLUMNS]))
    return found


def _less(here: Mapping[str, Mapping[str, Cell]], row: Row, column: Column) -> str:
    """What a variant's figure is above its preset's, and twice the standard error of that."""
    mine, base = here[row.name].get(column.name), here.get(row.preset, {}).get(column.name)
    if mine is None or base is None:
        return "–"
    less = difference(mine, base)
    return f"{less.mean:+.3g}" + (f" ± {2 * less.deviation:.2g}" if less.deviation else "")


class Finding(NamedTuple):
    """What a row's response perplexity says, in words."""

    name: str
    ppl: Shown
    difference: str
    """To the row that it is held against, ± twice the standard error of that, in per cent of it."""
    verdict: str


def findings(config: AblateConfig, here: Mapping[str, Mapping[str, Cell]]) -> list[Finding]:
    """All rows of one size, the lowest response perplexity first."""
    column, of = STANDARD_COLUMNS[0], {row.name: row.preset for row in config.variants}
    found = []
    for name in sorted((n for n in here if column.name in here[n]), key=lambda n: here[n][column.name].mean):
        base = of.get(name, BASE)
        ppl, less = Shown.of(here, name, column, base), effect(here[name], here.get(base, {}))
        verdict, difference = "", ""
        if name != base and less is not None:
            words = {"better": "the method hurts", "worse": "the method helps"} if name in _WITHOUT else {}
            words |= {NOISE: f"{NOISE} within noise", "?": "? one seed cannot tell"}
            verdict = words.get(ppl.mark or ppl.judgement, ppl.judgement)
            error = "" if less.deviation is None else f" ± {2 * less.deviation:.1f}"
            difference = f"{less.mean:+.1f}{error} % of {LABELS.get(base, base)}"
        found.append(Finding(_WITHOUT.get(name, LABELS.get(name, name)), ppl, difference, verdict))
    return found


def headline(here: Mapping[str, Mapping[str, Cell]]) -> str:
    """Which row has the lowest response perplexity, and whether the next one can be told from it."""
    ppl = {name: cells["response_ppl"] for name, cells in here.items() if "response_ppl" in cells}
    best, *others = [
        (_WITHOUT.get(name, LABELS.get(name, name)), ppl[name]) for name in sorted(ppl, key=lambda name: ppl[name].mean)
    ]
    said = f"The lowest response perplexity is that of {best[0]}: {_number(best[1].mean)}."
    if not others:
        return said
    noise = within_noise(others[0][1], best[1])
    told = {
        True: "a difference within noise",
        False: "a difference beyond noise",
        None: "and one seed cannot tell them apart",
    }
    return f"{said} Next is {others[0][0]} with {_number(others[0][1].mean)}, {told[noise]}."


def advice(config: AblateConfig, found: Sequence[Finding]) -> list[str]:
    """What to do next, given the findings of the largest size."""
    said = []
    if config.tiny:
        said.append("The networks are shrunk by --tiny: train the real ones before you conclude anything.")
    if unclear := [one.name for one in found if one.ppl.mark]:
        said.append(f"Not told apart yet: {', '.join(unclear)}. More --seeds, under another --run-name, tell more.")
    if config.lr == "paper":
        said.append("With --lr paper, rows differ in their learning rate too. --lr tuned tells a method from its rate.")
    if len(config.sizes) == 1:
        said.append("--sessions 10000,100000,all shows whether a difference lasts with more data.")
    return [*said, "Read replies of two rows side by side: jobs/evaluate.py with --against and --replies."]


def page(config: AblateConfig, rows: Rows, *, study_url: str, compare_url: str, unfinished: Mapping[str, str]) -> str:
    """The whole report."""
    sizes = sorted({key.sessions for key in rows})
    rates = {
        "paper": "each row at the rate that the paper's code used for it",
        "common": f"all rows at the rate {config.run.optimizer.lr:g}",
        "tuned": f"each row at the best of {config.rates} rates",
    }
    tables = []
    for sessions in reversed(sizes):
        here = _of_size(rows, sessions)
        paper = {name: _rows([p for p in presets if p in here], here, COLUMNS) for name, presets in TABLES.items()}
        variants = _variant_rows(config.variants, here)
        tables.append((sessions, _rows(_presets(config, here), here, STANDARD_COLUMNS), paper, variants))
    presets = _presets(config, {key.preset: None for key in rows})
    largest = _of_size(rows, sizes[-1])
    found = findings(config, largest)
    methods = [preset for preset in presets if preset != BASE]
    shown = [row for row in config.variants if any(key.preset == row.name for key in rows)]
    return pages.render(
        "report.html",
        title=f"Ablation {config.run.run_name}",
        config=config,
        sizes=sizes,
        rate=rates[config.lr],
        noise=NOISE,
        headline=headline(largest),
        findings=found,
        advice=advice(config, found),
        base=LABELS[BASE],
        study_url=study_url,
        compare_url=compare_url,
        unfinished=unfinished,
        figure=effects_svg(rows, sizes, methods) if BASE in presets and methods else None,
        variants_title=_VARIANTS,
        variants={row.name: settings_of(row) for row in shown},
        variants_figure=variants_svg(rows, sizes, shown) if shown else None,
        tables=tables,
        columns=COLUMNS,
        standard_columns=STANDARD_COLUMNS,
        variant_columns=_VARIANT_COLUMNS,
        compares=COMPARES,
    )


def text(config: AblateConfig, rows: Rows) -> str:
    """The standard tables, largest training set first, each with the variants' below it."""
    lines: list[str] = []
    columns = [*STANDARD_COLUMNS, Column("train_minutes", "train (min)", None)]
    for sessions in sorted({key.sessions for key in rows}, reverse=True):
        here = _of_size(rows, sessions)
        table = [[f"{sessions:,} sessions", *(column.title for column in columns)]]
        table += [[label, *map(str, cells)] for label, cells, _ in _rows(_presets(config, here), here, columns)]
        lines += [*_aligned(table), ""]
        if variants := _variant_rows(config.variants, here):
            table = [[_VARIANTS, *(column.title for column in _VARIANT_COLUMNS)]]
            for label, cells, less in variants:
                table += [[label, *map(str, cells)], *([["  difference ± 2 errors", *less]] if less else [])]
            lines += [*_aligned(table), ""]
    return "\n".join(lines[:-1])


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]


def settings_of(row: Row) -> str:
    """What a variant changes, as it is written."""
    return f"{LABELS.get(row.preset, row.preset)}, " + ", ".join(f"{flag(k)} = {v}" for k, v in row.values.items())


def effects_svg(rows: Rows, sizes: Sequence[int], methods: Sequence[str]) -> str:
    """How much worse the response perplexity is without each method, against the size of the training set."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = _axes(4.2)
    axes.axhline(0, color=_INK, linewidth=0.8)
    for i, preset in enumerate(methods):
        points = []
        for sessions in sizes:
            found = _effect(rows, sessions, preset, BASE)
            if found is not None:
                points.append((sessions * (1 + 0.02 * (i - len(methods) / 2)), found.mean, 2 * (found.deviation or 0)))
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, error, color=_COLOURS[i % 7], marker="osD^vPX"[i % 7], markersize=5, linewidth=1.4,
                          capsize=3, label=LABELS.get(preset, preset))  # fmt: skip
    axes.set(xscale="log", xlabel="training sessions", ylabel="response PPL against AR+ (%)")
    axes.set_xticks(list(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=_INK, alpha=0.15)
    axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, axes)


def variants_svg(rows: Rows, sizes: Sequence[int], variants: Sequence[Row]) -> str:
    """How much worse each variant's response perplexity is than its preset's: a line for each, a colour per size."""
    figure, axes = _axes(0.9 + 0.32 * len(variants))
    axes.axvline(0, color=_INK, linewidth=0.8)
    for i, sessions in enumerate(sizes):
        found = [(y, _effect(rows, sessions, row.name, row.preset)) for y, row in enumerate(variants)]
        points = [
            (less.mean, y + 0.16 * (i - (len(sizes) - 1) / 2), 2 * (less.deviation or 0)) for y, less in found if less
        ]
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, xerr=error, color=_COLOURS[i % 7], marker="osD^vPX"[i % 7], markersize=5, linewidth=1.4,
                          linestyle="none", capsize=3, label=f"{sessions:,} sessions")  # fmt: skip
    axes.set(xlabel="response PPL against the preset (%)", ylim=(len(variants) - 0.5, -0.5))
    axes.set_yticks(range(len(variants)), [row.name for row in variants])
    axes.grid(axis="x", color=_INK, alpha=0.15)
    axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, axes)


def _effect(rows: Rows, sessions: int, name: str, base: str) -> Cell | None:
    mine, other = rows.get(Key(sessions, name)), rows.get(Key(sessions, base))
    return effect(mine, other) if mine and other else None


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # seconds, and only a report needs it

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any, axes: Any) -> str:
    """The figure in the page's ink, and its text as text: names may be in Chinese, which the browser has a font for."""
    from matplotlib import rc_context

    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK, which="both")
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL).replace(_INK, "currentColor")


def _of_size(rows: Rows, sessions: int) -> dict[str, Mapping[str, Cell]]:
    return {key.preset: cells for key, cells in rows.items() if key.sessions == sessions}


def _presets(config: AblateConfig, names: Iterable[str]) -> list[str]:
    """The presets among the rows' names, in the paper's order, others last."""
    presets = set(names) - {row.name for row in config.variants}
    return [*(p for p in LABELS if p in presets), *sorted(presets - set(LABELS))]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
