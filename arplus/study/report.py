"""The report of an ablation: one page that needs nothing else, in light and dark, and its tables as text."""

import html
import io
import re
from collections.abc import Mapping, Sequence

from arplus.config import AblateConfig
from arplus.study.paper import COLUMNS, COMPARES, FIGURES, LABELS, STANDARD_COLUMNS, TABLES, Column
from arplus.study.results import BASE, Cell, Key, effect, within_noise

Rows = Mapping[Key, Mapping[str, Cell]]

NOISE = "≈"
"""The mark of a difference to AR+ that is within noise."""
_INK = "#010203"
"""A colour that nothing else has: it becomes that of the text around the figure."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933")
"""Okabe and Ito's, which the colour-blind can tell apart, and one more."""
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bad: #c2410c; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --bad: #fb923c; --good: #4ade80; } }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2em } h3 { font-size: 1em }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .5em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left } tr.base { background: var(--soft) }
.wide table { font-size: .93em } td small { opacity: .7 }
.worse { color: var(--bad) } .better { color: var(--good) } .theirs { opacity: .75 }
figure { margin: 1em 0 } svg { max-width: 100%; height: auto } .wide { overflow-x: auto }
"""


def page(config: AblateConfig, rows: Rows, *, study_url: str, compare_url: str, unfinished: Mapping[str, str]) -> str:
    """The whole report."""
    sizes = sorted({key.sessions for key in rows})
    seeds = f"{config.seeds} seed{'s'[: config.seeds != 1]}"
    rate = {
        "paper": "each row at the rate that the paper's code used for it",
        "common": f"all rows at the rate {config.run.optimizer.lr:g}",
        "tuned": f"each row at the best of {config.rates} rates",
    }[config.lr]
    parts = [
        f"<h1>Ablation {_escaped(config.run.run_name)}</h1>",
        f"<p>{', '.join(f'{n:,}' for n in sizes)} training sessions, {seeds}, {rate}"
        f"{'; networks shrunk by --tiny' if config.tiny else ''}. "
        f'<a href="{_escaped(study_url)}">Runs</a> · <a href="{_escaped(compare_url)}">compared</a> in MLflow.</p>',
        "<p>Figures are of the test set, at each run's best checkpoint on validation: mean ± standard deviation over "
        f"seeds. {NOISE} marks a difference to AR+ of less than twice its standard error; a ? that one seed cannot "
        "tell. Colours say better or worse than AR+ beyond that.</p>",
    ]
    if unfinished:
        names = "; ".join(f"{_escaped(name)}: {_escaped(why)}" for name, why in unfinished.items())
        parts.append(f"<p><b>Without a result:</b> {names}</p>")
    parts += ["<h2>Do the methods help, and does it last?</h2>", _effects(rows, sizes)]
    for sessions in reversed(sizes):
        parts.append(f"<h2>{sessions:,} sessions</h2>")
        here = {key.preset: cells for key, cells in rows.items() if key.sessions == sessions}
        parts += ["<h3>Standard metrics</h3>", _table(_order(here), here, STANDARD_COLUMNS)]
        for name, presets in TABLES.items():
            listed = [preset for preset in presets if preset in here]
            if listed:
                parts += [f"<h3>The paper's {name}, as its code computed it</h3>", _table(listed, here, COLUMNS, True)]
    parts += ["<h2>What compares with the paper's figures</h2>", "<ul>"]
    parts += [*(f"<li>{_escaped(line)}</li>" for line in COMPARES), "</ul>"]
    head = f'<meta charset="utf-8"><title>Ablation {_escaped(config.run.run_name)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def text(rows: Rows) -> str:
    """The standard tables, largest training set first."""
    lines: list[str] = []
    for sessions in sorted({key.sessions for key in rows}, reverse=True):
        here = {key.preset: cells for key, cells in rows.items() if key.sessions == sessions}
        table = [[f"{sessions:,} sessions", *(c.title for c in STANDARD_COLUMNS), "train (min)"]]
        for preset in _order(here):
            cells = here[preset]
            found = [_plain(cells.get(c.name), _noise(here, preset, c)) for c in STANDARD_COLUMNS]
            table.append([LABELS.get(preset, preset), *found, _plain(cells.get("train_minutes"), "")])
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines.append("")
    return "\n".join(lines[:-1])


def effects_svg(rows: Rows, sizes: Sequence[int]) -> str:
    """How much worse the response perplexity is without each method, against the size of the training set."""
    from matplotlib.figure import Figure  # seconds, and only a report needs it
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=_INK, linewidth=0.8)
    shown = [p for p in _order({key.preset: None for key in rows}) if p != BASE]
    for i, preset in enumerate(shown):
        points = []
        for sessions in sizes:
            key, base = Key(sessions, preset), Key(sessions, BASE)
            found = effect(rows[key], rows[base]) if key in rows and base in rows else None
            if found is not None:
                points.append((sessions * (1 + 0.02 * (i - len(shown) / 2)), found.mean, 2 * (found.deviation or 0.0)))
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, error, color=_COLOURS[i % 7], marker="osD^vPX"[i % 7], markersize=5, linewidth=1.4,
                          capsize=3, label=LABELS.get(preset, preset))  # fmt: skip
    axes.set(xscale="log", xlabel="training sessions", ylabel="response PPL against AR+ (%)")
    axes.set_xticks(list(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=_INK, alpha=0.15)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK, which="both")
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL).replace(_INK, "currentColor")


def _effects(rows: Rows, sizes: Sequence[int]) -> str:
    if not any(key.preset == BASE for key in rows) or len({key.preset for key in rows}) < 2:
        return "<p>AR+ and another row are needed to tell.</p>"
    return (
        f"<figure>{effects_svg(rows, sizes)}<figcaption>Response perplexity without each method, in per cent above "
        "that of AR+; above zero the method helps. Bars are twice the standard error over seeds.</figcaption></figure>"
    )


def _table(presets: Sequence[str], here: Mapping[str, Mapping[str, Cell]], columns: Sequence[Column],
           theirs: bool = False) -> str:  # fmt: skip
    lines = ["<tr><th></th>" + "".join(f"<th>{column.title}</th>" for column in columns) + "</tr>"]
    for preset in presets:
        cells = [_cell(here, preset, column) for column in columns]
        kind = ' class="base"' if preset == BASE else ""
        lines.append(f"<tr{kind}><td>{_escaped(LABELS.get(preset, preset))}</td>{''.join(cells)}</tr>")
        if theirs and preset in FIGURES:
            figures = "".join(f"<td>{_number(value)}</td>" for value in FIGURES[preset])
            lines.append(f'<tr class="theirs"><td><small>the paper</small></td>{figures}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _cell(here: Mapping[str, Mapping[str, Cell]], preset: str, column: Column) -> str:
    cell = here[preset].get(column.name)
    if cell is None:
        return "<td>–</td>"
    mark, kind = _noise(here, preset, column), ""
    if mark == "" and preset != BASE and BASE in here and column.lower_is_better is not None:
        better = (cell.mean < here[BASE][column.name].mean) == column.lower_is_better
        kind = ' class="better"' if better else ' class="worse"'
    deviation = "" if not cell.deviation else f" <small>± {cell.deviation:.2g}</small>"
    return f"<td{kind}>{_number(cell.mean)}{deviation}{f' {mark}' if mark else ''}</td>"


def _noise(here: Mapping[str, Mapping[str, Cell]], preset: str, column: Column) -> str:
    """The mark of a cell: a difference to AR+ within noise, or one that cannot be told."""
    base, cell = here.get(BASE, {}).get(column.name), here[preset].get(column.name)
    if preset == BASE or base is None or cell is None or column.lower_is_better is None:
        return ""
    return {True: NOISE, False: "", None: "?"}[within_noise(cell, base)]


def _plain(cell: Cell | None, mark: str) -> str:
    if cell is None:
        return "-"
    deviation = "" if not cell.deviation else f" ± {cell.deviation:.2g}"
    return f"{_number(cell.mean)}{deviation}{f' {mark}' if mark else ''}"


def _order(presets: Mapping[str, object]) -> list[str]:
    """Presets in the paper's order, others last."""
    return [*(p for p in LABELS if p in presets), *sorted(set(presets) - set(LABELS))]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _escaped(text: str) -> str:
    return html.escape(text)
