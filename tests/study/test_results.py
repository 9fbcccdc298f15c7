"""An ablation's rows: means over seeds, what is noise, and the pages that show them."""

import html.parser
import re
from dataclasses import replace

import pytest
from helpers.checkpoints import final_metrics

from arplus.config import AblateConfig, TrainConfig
from arplus.study import report
from arplus.study.paper import COLUMNS, FIGURES, LABELS, STANDARD_COLUMNS, TABLES
from arplus.study.record import Evaluation, Trial
from arplus.study.results import Cell, Key, effect, rows, within_noise


def trial(preset: str, seed: int, ppl: float, sessions: int = 1000) -> Trial:
    groups = {
        "standard": {"response_ppl": ppl, "bleu": 2.0},
        "paper_compatible": {"paper_ppl": 3 * ppl, "paper_bleu": 0.001},
        "persona": {"questions": 4, "agreement": 0.5},
    }
    final = final_metrics(preset, examples=5000, best_response_ppl=ppl, train_seconds=90.0)
    return replace(
        not_evaluated(preset, f"{preset}-{sessions}-{seed}"),
        final=final,
        evaluation=Evaluation(splits={"test": {"examples": 10, **groups}}, sessions=sessions, parameters=31_000_000),
    )


def not_evaluated(preset: str, name: str) -> Trial:
    return Trial(name=name, values={"preset": preset}, config=TrainConfig())


TRIALS = [
    *(trial("arplus", seed, ppl) for seed, ppl in enumerate((30.0, 31.0, 32.0))),
    *(trial("ar", seed, ppl) for seed, ppl in enumerate((40.0, 41.0, 42.0))),
    *(trial("no-albert", seed, ppl) for seed, ppl in enumerate((30.5, 31.5, 32.5))),
    trial("no-memn2n", 0, 36.0),
    trial("arplus", 0, 60.0, sessions=100),
    trial("ar", 0, 50.0, sessions=100),
]


def test_rows_are_means_over_seeds_by_size() -> None:
    found = rows([*TRIALS, not_evaluated("ar", "another")])
    assert list(found) == sorted(found)
    assert found[Key(1000, "ar")]["response_ppl"] == Cell(41.0, 1.0, 3)
    assert found[Key(100, "ar")]["response_ppl"] == Cell(50.0, None, 1)
    cells = found[Key(1000, "arplus")]
    assert cells["peak_memory_mib"].mean == 1024
    assert cells["train_minutes"].mean == 1.5
    assert cells["agreement"].mean == 0.5


def test_noise_is_twice_the_standard_error_of_the_difference() -> None:
    base = Cell(31.0, 1.0, 3)  # with the same deviation: 2 · √(2/3) = 1.63
    assert within_noise(Cell(32.6, 1.0, 3), base) is True
    assert within_noise(Cell(32.7, 1.0, 3), base) is False
    assert within_noise(Cell(99.0, None, 1), base) is None


def test_the_effect_is_in_per_cent_of_the_whole_model() -> None:
    found = rows(TRIALS)
    without = effect(found[Key(1000, "ar")], found[Key(1000, "arplus")])
    assert without is not None
    assert without.mean == pytest.approx(100 * (41 / 31 - 1))
    # Relative errors add up as squares: (1/41)²/3 + (1/31)²/3.
    assert without.deviation == pytest.approx(100 * 41 / 31 * ((1 / 41) ** 2 / 3 + (1 / 31) ** 2 / 3) ** 0.5)
    assert effect(found[Key(100, "ar")], found[Key(100, "arplus")]) == Cell(pytest.approx(-100 / 6), None, 1)


def page() -> str:
    config = AblateConfig(run=TrainConfig(run_name="<full>"), seeds=3, sessions="100,1000")
    return report.page(
        config, rows(TRIALS), study_url="http://h/#/a", compare_url="http://h/#/b?c&d", unfinished={"x": "<why>"}
    )


class Tags(html.parser.HTMLParser):
    """Fails on a tag that is closed without having been opened, or not closed at all."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "use"):
            return
        assert self.open.pop() == tag, tag


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = page()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert "&lt;full&gt;" in text
    assert "<why>" not in text
    links = re.findall(r'(?:src|href)="([^"#]+)', text)
    assert [link for link in links if not link.startswith("http://h/")] == [], "no script, style or image elsewhere"
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text, "a phone would show it as wide as a desk's screen"
    assert "#010203" not in text, "the figure takes the page's colour"
    assert text.count("<svg") == 1


def test_the_page_marks_noise_and_what_one_seed_cannot_tell() -> None:
    lines = page().split("<h3>Standard metrics</h3>")[1].split("<tr")
    albert, memn2n, ar = (
        next(line for line in lines if f"<td>{name}</td>" in line) for name in ("-ALBERT", "-MemN2N", "AR")
    )
    assert "31.5 <small>± 1</small> ≈" in albert
    assert "36 ?" in memn2n
    assert '<td class="worse">41 <small>± 1</small></td>' in ar


def test_the_papers_figures_stand_beside_ours() -> None:
    assert FIGURES.keys() == LABELS.keys() == {p for presets in TABLES.values() for p in presets}
    assert all(len(figures) == len(COLUMNS) for figures in FIGURES.values())
    text = page()
    assert text.count("the paper</small>") == 5 + 3, "each row of each table at each size"
    for value in ("0.00257", "614", "5,600"):
        assert f"<td>{value}</td>" in text


def test_the_text_has_every_row() -> None:
    text = report.text(AblateConfig(), rows(TRIALS))
    assert text.index("1,000 sessions") < text.index("100 sessions")
    assert "41 ± 1" in text
    for column in STANDARD_COLUMNS:
        assert column.title in text


def test_variants_have_a_table_of_their_own_against_their_presets() -> None:
    config = AblateConfig(variant=("loud=ar,model.dropout=0.5", "quiet=arplus,model.dropout=0"))
    loud = [replace(trial("ar", seed, 41.0 + seed)) for seed in range(3)]
    quiet = [replace(trial("arplus", seed, 31.0 + seed)) for seed in range(2)]
    more = [replace(t, values={"preset": "ar", "variant": "loud"}) for t in loud]
    more += [replace(t, values={"preset": "arplus", "variant": "quiet"}) for t in quiet]
    found = rows([*TRIALS, *more])
    text = report.text(config, found)
    standard, third = text.split("What the paper found ineffective")
    assert "loud" not in standard
    lines = [re.split("  +", line.strip())[:2] for line in third.splitlines()]
    start = lines.index(["AR", "41 ± 1"])
    assert lines[start + 1 : start + 6] == [
        ["loud", "42 ± 1 ≈"],  # of AR, not of AR+
        ["difference ± 2 errors", "+1 ± 1.6"],  # 2 · √(1/3 + 1/3)
        ["AR+", "31 ± 1"],
        ["quiet", "31.5 ± 0.71 ≈"],
        ["difference ± 2 errors", "+0.5 ± 1.5"],
    ]
    page = report.page(config, found, study_url="u", compare_url="c", unfinished={})
    (tags := Tags()).feed(page)
    assert tags.open == []
    assert page.count("<svg") == 2
    assert "loud: AR, model.dropout = 0.5" in page
    assert page.count("difference</small>") == 2
    assert "<td>+1 ± 1.6</td>" in page


def test_a_single_row_has_no_figure() -> None:
    alone = rows([replace_preset(t) for t in TRIALS if t.values["preset"] == "ar"])
    text = report.page(AblateConfig(), alone, study_url="u", compare_url="c", unfinished={})
    assert "<svg" not in text
    assert "AR+ and another row are needed" in text


def replace_preset(one: Trial) -> Trial:
    return replace(one, values={"preset": "no-albert"})


def test_the_page_begins_with_what_won_and_whether_that_is_noise() -> None:
    text = page()
    short = text.split("<h2>In short</h2>")[1].split("<h2>")[0]
    assert "The lowest response perplexity is that of AR+: 31." in short
    assert "Next is AR+ without ALBERT with 31.5, a difference within noise." in short
    lines = {
        line.split("</td>")[0].removeprefix("<td>"): line for line in re.findall(r"<tr.*?>(<td>.*?)</tr>", short, re.S)
    }
    assert list(lines) == ["AR+", "AR+ without ALBERT", "AR+ without MemN2N", "AR"], "the best one first"
    assert "+1.6 ± 5.3 % of AR+" in lines["AR+ without ALBERT"]
    assert "≈ within noise" in lines["AR+ without ALBERT"]
    assert "? one seed cannot tell" in lines["AR+ without MemN2N"]
    assert '<td class="worse">worse</td>' in lines["AR"]
    assert "Not told apart yet: AR+ without ALBERT, AR+ without MemN2N." in short
    assert "--lr tuned tells a method from its rate" in short


def test_a_method_whose_row_is_worse_helps() -> None:
    found = rows([*TRIALS, *(trial("no-rezero", seed, 50.0 + seed) for seed in range(2))])
    here = {key.preset: cells for key, cells in found.items() if key.sessions == 1000}
    verdicts = {one.name: one.verdict for one in report.findings(AblateConfig(), here)}
    assert verdicts["AR+ without ReZero"] == "the method helps"
    assert verdicts["AR+"] == ""


def test_names_in_chinese_are_text_in_the_figure() -> None:
    config = AblateConfig(variant=("词向量=arplus,model.dropout=0",))
    more = [replace(t, values=t.values | {"variant": "词向量"}) for t in TRIALS[:3]]
    text = report.page(config, rows([*TRIALS, *more]), study_url="u", compare_url="c", unfinished={})
    assert re.search(r"<text[^>]*>词向量</text>", text)
