"""Texts, names, settings and metric names that want to be HTML, script or something else than they look like."""

import html.parser
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from evaluation_toys import GOOD, TEST, make_report
from rich.console import Console
from test_render import make_details

from pipeline.evaluation.pages import page as pages
from pipeline.evaluation.pages import runs_pages
from pipeline.evaluation.pages.page import markdown_page, print_table, visible, write_json
from pipeline.evaluation.pages.render import write_report
from pipeline.evaluation.pages.reward_pages import print_reward_report, write_reward_report
from pipeline.evaluation.pages.tables import Table
from pipeline.evaluation.reward_quality import ScoredPair, ScoredText, evaluate_reward_model
from pipeline.rewards.pairs import HELD_OUT, Pair

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "</title></svg><iframe src=//host>",
    "--><!-- ]]>",
    '" onmouseover="alert(1)" \'',
    "' autofocus onfocus='alert(1)",
    "javascript:alert(1) [x](javascript:alert(1))",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "a\0b\x1b[31m\x7f\x85",
    "\u202egpj.exe\u2066 \u200f\u061c\ufeff",
    "half \ud83d of one",
    "[bold]rich[/bold] [/nothing] \\u0000",
)
ALL = " ".join(HOSTILE)
WHOLE = ALL.replace("\ud83d", "")  # models write no halves of characters, and data with some are refused


class Reader(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def harmless(page: str, marked: int) -> Reader:
    """The page as read, with nothing in it that was not meant: `marked` is how often the hostile text is shown."""
    found = Reader(page)
    assert found.tags.count("script") == 1 and found.tags.count("style") == 1 + found.tags.count("svg")
    assert not {"iframe", "img", "object", "embed", "link", "base", "form"} & set(found.tags)
    assert not [
        name for name, _ in found.attributes if name.startswith("on") or name in ("src", "action", "autofocus")
    ]
    links = [value for name, value in found.attributes if name in ("href", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert not pages.HIDDEN.search(page)
    assert "".join(found.text).count("<script>alert(1)</script>") >= marked
    page.encode("utf-8")
    return found


def hostile_report():
    """A report whose systems, metrics, rewards, settings and texts are all hostile."""
    report, outputs = make_report({"sft": [WHOLE] * 12, "ppo": GOOD}, name=ALL, rewards=[ALL], language=ALL)
    systems = {
        name: replace(system, metrics={f"bleu {WHOLE}": next(iter(system.metrics.values()))})
        for name, system in report.systems.items()
    }
    report = replace(report, systems=systems, warnings=[ALL, *report.warnings], findings=[ALL], verdict=ALL)
    return report, outputs


def test_the_report_shows_hostile_texts_as_texts(tmp_path):
    report, outputs = hostile_report()
    details = make_details(outputs)
    examples = [replace(s, prompt=ALL, reference=ALL, texts={**s.texts, "sft": ALL}) for s in details.examples]
    write_report(report, replace(details, examples=examples), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = harmless(page, marked=12 * 3 + 3)
    clean, plain_outputs = make_report({"sft": ["a text"] * 12, "ppo": GOOD})
    write_report(clean, make_details(plain_outputs), tmp_path / "clean")
    expected = Reader((tmp_path / "clean" / "report.html").read_text(encoding="utf-8"))
    assert set(found.tags) == set(expected.tags)  # not one kind of element more
    assert {name for name, _ in found.attributes} == {name for name, _ in expected.attributes}
    for file in (tmp_path / "plots").iterdir():
        assert not pages.HIDDEN.search(file.read_text(encoding="utf-8"))
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<" not in markdown.replace("&lt;", "") and not pages.HIDDEN.search(markdown)


def test_the_page_of_a_reward_model_and_of_a_comparison(tmp_path, monkeypatch):
    pairs = [ScoredPair(n, *scores, 3, 4, {ALL: (1.0, 0.0)}) for n, scores in enumerate([(1.0, 0.0), (0.0, 1.0)])]
    texts = [ScoredText(row, float(row), 3, {ALL: float(row)}) for row in range(4)]
    report = evaluate_reward_model(pairs, pairs, texts, (0.0, 1.0), 0.5, {ALL: ALL}, {"name": ALL, ALL: ALL})
    shown = [Pair(HELD_OUT, 0, ALL, ALL, ALL, [1], [2], None, "data")] * 2
    write_reward_report(report, shown, pairs, tmp_path, f"Reward model of {ALL}")
    harmless((tmp_path / "report" / "report.html").read_text(encoding="utf-8"), marked=8)
    print_reward_report(report, Console(file=StringIO(), width=200))  # brackets are no markup

    names = [f"run{n} <script>alert(1)<\u2215script> [/b] \u202e" for n in (1, 2)]  # what a directory may be called
    for number, name in enumerate(names):
        found, outputs = make_report({"sft": [WHOLE] * 12, "ppo": GOOD}, seed=number)
        write_report(found, make_details(outputs), tmp_path / name / "eval")
        (tmp_path / name / "eval" / "stage.json").write_text(
            json.dumps({"settings": {"seed": number, ALL: ALL * number}})
        )
    monkeypatch.setattr(runs_pages, "compare_runs", lambda runs: replace(real(runs), warnings=[ALL], findings=[ALL]))
    runs_pages.write_comparison([tmp_path / name for name in names], tmp_path / "comparison")
    harmless((tmp_path / "comparison" / "report.html").read_text(encoding="utf-8"), marked=2)
    markdown = (tmp_path / "comparison" / "report.md").read_text(encoding="utf-8")
    assert "<" not in markdown and not pages.HIDDEN.search(markdown)


real = runs_pages.compare_runs


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_in_markdown_and_in_the_terminal(text):
    report, _ = make_report({"sft": GOOD, "ppo": GOOD})
    page = markdown_page(text, report, [Table(text, [text, "b"], [[text, text]], text)])
    assert "<" not in page.replace("&lt;", "") and not pages.HIDDEN.search(page)
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line.replace("-->", "")]
    assert len(rows) == 2
    shown = StringIO()
    print_table(Table(text, [text, "b"], [[text, text]]), Console(file=shown, width=300, color_system=None))
    assert visible(text).split()[0] in shown.getvalue() and "\x1b" not in shown.getvalue()


def test_hidden_characters_become_numbers_and_others_stay():
    text = "\0\x1b\u202e\ud83d|é ü 日本 \U0001f600 \u200d \n\t"
    assert visible(text) == "\\x00\\x1b\\u202e\\ud83d|é ü 日本 \U0001f600 \u200d \n\t"


def test_json_of_a_report_is_plain_data(tmp_path):
    report, _ = make_report({"sft": GOOD, "ppo": GOOD}, name="</script>\0\u202e")
    write_json(report, tmp_path / "report.json")
    assert (
        json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["settings"]["name"] == "</script>\0\u202e"
    )
    assert "report.json" not in (Path(pages.TEMPLATES) / "report.html").read_text()  # no page embeds it
    assert TEST.prompts[0] == "prompt 0"
