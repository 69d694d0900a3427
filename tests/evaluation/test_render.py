"""What the report's files say, and that nothing a model writes can break them."""

from dataclasses import replace
from io import StringIO

import pytest
from evaluation_toys import BAD, BLEU, GOOD, MIXED, TER, TEST, make_report
from rich.console import Console

from pipeline.evaluation.assemble import Details, all_examples
from pipeline.evaluation.curves import Curve, Panel
from pipeline.evaluation.inspection import Attention, Inspection, Passage, Token
from pipeline.evaluation.pages.render import draw_plots, print_report, to_html, to_markdown, write_report
from pipeline.evaluation.pages.tables import best_of_table, score_table, sentence_score_name

AWKWARD = 'a | b\nc <script>alert("x")</script> \\ d\r\n\n| --- | </style></svg> $x_1$'


def make_details(outputs, **changes) -> Details:
    examples = all_examples(TEST, outputs, "bleu")
    token = Token(AWKWARD, -1.0, -0.5)
    inspection = Inspection(
        0,
        "a large gain",
        AWKWARD,
        [Passage("reference", [token])],
        Attention([AWKWARD, "b"], ["c"], [[0.25, 0.5]]),
    )
    panels = [Panel("ppo", "reward", [Curve("objective/scores", [1.0, 2.0], [0.1, 0.2])])]
    return Details(**{"examples": examples, "panels": panels, "inspections": [inspection], **changes})


def test_markdown_escapes_what_models_write():
    report, plain_outputs = make_report({"sft": BAD, "ppo": GOOD}, name="a|b\n<script>")
    _, outputs = make_report({"sft": [AWKWARD] * 12, "ppo": GOOD})
    plain = to_markdown(report, make_details(plain_outputs, num_samples=1))
    page = to_markdown(report, make_details(outputs, num_samples=1))
    assert len(page.splitlines()) == len(plain.splitlines())  # one line for each row, whatever is in it
    assert "<script" not in page
    row = next(line for line in page.splitlines() if "alert" in line)
    assert "| a \\| b c &lt;script>" in row and "\\\\ d" in row
    assert row.replace("\\\\", "").replace("\\|", "").count("|") == 5  # the edges of four cells
    assert "| name | a\\|b &lt;script> |" in page


def test_scores_of_texts_have_another_name_where_the_measure_counts_errors():
    drawn = {name: MIXED * 2 for name in ("sft", "ppo")}
    for metric, name in ((TER, "1 - ter"), (BLEU, "bleu")):
        report, outputs = make_report({"sft": MIXED, "ppo": GOOD}, metrics=(metric,), samples=drawn)
        details = Details(all_examples(TEST, outputs, metric.name))
        page = to_markdown(report, details)
        assert f"| group | examples | sft {name} | ppo {name} | gain |" in page and f"| sft | {name} | " in page
        drawings = draw_plots(report, details)
        assert f"best {name} of n samples" in drawings["best-of-n"] and f"{name}, ppo - sft" in drawings["gains"]
        assert f"Scores of one example are its {name} as a sentence score" in to_html(report, details, drawings)
        assert ("ter: lower is better. [a, b]: 95%" in page) == (metric is TER)
        (shares,) = [line for line in report.findings if line.startswith("Example by example")]
        assert ("PPO is better on" in shares and "worse on" in shares) == (metric is TER)


def test_markdown_shows_every_figure():
    settings = {
        "nothing": None,
        "named": [{"name": "bleu", "options": {}}, {"name": "ter", "options": {"case": True}}],
    }
    texts = {"base": BAD, "sft": MIXED, "ppo": GOOD}
    report, outputs = make_report(texts, metrics=(BLEU, TER), seed=3, **settings)
    page = to_markdown(report, make_details(outputs))
    assert page.startswith(f"# Evaluation\n\n{report.verdict}\n")
    rows: dict[str, str] = {}
    for line in page.splitlines():
        if line.startswith("|"):
            rows.setdefault(line.split("|")[1].strip(), line)
    score = report.systems["ppo"].metrics["bleu"]
    assert f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]" in rows["bleu"]
    assert rows["mean reward"] == "| mean reward | 0.5000 | 0.5000 | 0.5000 |"
    assert rows["cumulative reward"] == "| cumulative reward | 6.00 | 6.00 | 6.00 |"
    assert rows["KL to SFT, nats/completion"].count("0.500") == 3
    assert rows["copied from the prompt"].endswith("| 0.0% | 0.0% | 0.0% | 0.0% |")
    assert "| nothing | - |" in page and "| named | bleu, ter (case True) |" in page
    assert "ppo - sft" in rows and "| seed | 3 |" in page and score.signature.replace("|", "\\|") in page
    assert "| group | examples | sft bleu | ppo bleu | gain |" in page


def test_without_rewards_nothing_is_said_of_them():
    report, outputs = make_report({"sft": BAD, "ppo": GOOD}, scores={})
    assert [c.metric for c in report.comparisons] == ["bleu"]
    assert "| mean reward | - | - |" in to_markdown(report, make_details(outputs))


def test_the_terminal_shows_the_same():
    report, _ = make_report({"sft": MIXED, "ppo": MIXED})
    output = StringIO()
    print_report(report, Console(width=200, file=output))
    text = output.getvalue()
    assert report.verdict in text and f"warning: {report.warnings[0]}" in text
    assert "Scores" in text and "Comparisons" in text and report.findings[0][:60] in text


def test_html_escapes_what_models_write_and_asks_for_nothing(tmp_path):
    report, outputs = make_report({"sft": [AWKWARD] * 12, "ppo": GOOD}, name="<script>alert(1)</script>")
    write_report(report, make_details(outputs), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and page.count("</script>") == 1  # its own
    assert page.count("<style>") == 1 and "&lt;script&gt;alert(&#34;x&#34;)" in page
    for word in ("src=", "@import", "url(http", 'href="http', "<link", "<iframe"):
        assert word not in page.replace('xmlns:xlink="http', "")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "curves-ppo.svg",
        "gains.svg",
        "scores.svg",
    ]


def test_the_same_report_is_the_same_page(tmp_path):
    report, outputs = make_report({"sft": BAD, "ppo": GOOD})
    for name in ("a", "b"):
        write_report(report, make_details(outputs), tmp_path / name)
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()


@pytest.mark.parametrize(("listed", "rows"), [(500, 12), (4, 4), (0, 0)])
def test_how_many_samples_are_listed(tmp_path, listed, rows):
    report, outputs = make_report({"sft": BAD, "ppo": GOOD})
    write_report(report, make_details(outputs, num_listed=listed), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<td data-label="example">') == rows
    assert ('href="#samples"' in page) == ('id="samples"' in page) == (rows > 0)


def test_one_system_alone_knows_which_scores_count_errors():
    """There is no comparison to read the direction from."""
    never = [text for text in BAD for _ in range(2)]
    report = make_report({"ppo": GOOD}, metrics=(TER,), samples={"ppo": never})[0]
    assert report.lower_is_better == ["ter"] and score_table(report).note.startswith("ter: lower is better. ")
    assert "1 - ter" in {row[1] for row in best_of_table(report).rows}
    mine = replace(report, lower_is_better=["mine.py:Cost", "evaluate:wer"])
    assert sentence_score_name(mine, "mine.py:Cost") == "mine.py:Cost, turned: more is better"
    assert (sentence_score_name(mine, "evaluate:wer"), sentence_score_name(mine, "ter")) == ("-evaluate:wer", "ter")


def test_scores_of_a_small_scale_have_more_decimals():
    report = make_report({"sft": MIXED, "ppo": GOOD})[0]
    small = replace(report.systems["sft"].metrics["bleu"], value=0.50612, low=0.5012, high=0.5112)
    systems = {"sft": replace(report.systems["sft"], metrics={"bleu": small})}
    assert score_table(replace(report, systems=systems)).rows[0] == ["bleu", "0.5061 [0.5012, 0.5112]"]
