"""Runs side by side and over seeds, from directories as the eval stage leaves them."""

import json

import pytest
from evaluation_toys import BAD, GOOD, MIXED, TEST, make_report

from pipeline.evaluation.assemble import Details, all_examples
from pipeline.evaluation.pages.render import write_report
from pipeline.evaluation.pages.runs_pages import compare_command, comparison_tables
from pipeline.evaluation.runs import SeedSummary, compare_runs, load_run, seeds_verdict

METRICS = [{"name": "bleu", "options": {}}]


@pytest.fixture
def evaluated(tmp_path):
    """Each call leaves a run directory whose PPO wrote the given texts."""

    def make(name: str, ppo: list[str], seed: int = 0, **settings):
        report, outputs = make_report({"sft": MIXED, "ppo": ppo}, seed=seed)
        report.settings.update(metrics=METRICS, language=None)
        directory = tmp_path / name / "eval"
        write_report(report, Details(all_examples(TEST, outputs, "bleu")), directory)
        (directory / "predictions").mkdir()
        for system, found in outputs.items():
            rows = zip(TEST.prompts, TEST.references, found.texts, strict=True)
            lines = [json.dumps({"prompt": p, "references": r, "completion": c}) for p, r, c in rows]
            (directory / "predictions" / f"{system}.jsonl").write_text("\n".join(lines) + "\n")
        record = {"settings": {"seed": seed, "ppo.kl_coef": 0.05, **settings}}
        (directory / "stage.json").write_text(json.dumps(record))
        return tmp_path / name

    return make


def test_seeds_are_summed_up(evaluated, tmp_path):
    paths = [evaluated(f"a-seed-{n}", texts, seed=n) for n, texts in enumerate((GOOD, GOOD, BAD))]
    found = compare_runs([load_run(path) for path in paths])
    bleu = found.seeds[0]
    deltas = [gain.delta for gain in found.gains if gain.metric == "bleu"]
    assert bleu.mean == pytest.approx(sum(deltas) / 3) and (bleu.low, bleu.high) == (min(deltas), max(deltas))
    assert bleu.deviation == pytest.approx((sum((d - bleu.mean) ** 2 for d in deltas) / 2) ** 0.5)
    assert (bleu.ahead, bleu.improved, bleu.worsened) == pytest.approx((2 / 3, 2 / 3, 1 / 3))
    assert bleu.seeds == [0, 1, 2]
    assert "better in 2, worse in 1; bleu +" in found.verdict
    assert "seeds disagree on bleu" in found.warnings[0] and "67%" in found.warnings[0]


@pytest.mark.parametrize(
    ("improved", "worsened", "sentence"),
    [(1.0, 0.0, "better than SFT in all 3 seeds"), (0.0, 1.0, "worse than SFT in all 3 seeds")],
)
def test_the_verdict_over_seeds(improved, worsened, sentence):
    summary = SeedSummary("bleu", [0, 1, 2], 1.5, 0.5, 1.0, 2.0, improved, improved, worsened)
    found = seeds_verdict(summary)
    assert sentence in found and "bleu +1.50" in found and "0.50, from +1.00" in found


def test_runs_of_other_settings_are_no_seeds_but_are_tested_against_each_other(evaluated):
    paths = [evaluated("a", MIXED), evaluated("b", GOOD, seed=1, **{"ppo.kl_coef": 0.1})]
    runs = [load_run(path) for path in paths]
    found = compare_runs(runs)
    assert found.seeds == []
    (duel,) = found.duels
    gain = next(gain for gain in found.gains if (gain.run, gain.metric) == ("b", "bleu"))
    assert (duel.a, duel.b, duel.system) == ("a", "b", "ppo")
    assert duel.delta == pytest.approx(gain.delta) and duel.p_value < 0.05  # a's PPO wrote what SFT wrote
    assert found.verdict.startswith("b differs from a (ppo, bleu +")
    tables = {table.title: table.rows for table in comparison_tables(runs, found)}
    assert tables["Settings that differ"] == [["seed", "0", "1"], ["ppo.kl_coef", "0.05", "0.1"]]
    assert len(tables["Scores"]) == 4


def test_another_test_set_is_not_tested(evaluated):
    first, second = evaluated("a", MIXED), evaluated("b", GOOD)
    file = second / "eval" / "predictions" / "ppo.jsonl"
    file.write_text(file.read_text().replace("prompt 0", "another prompt"))
    found = compare_runs([load_run(first), load_run(second)])
    assert found.duels == [] and "without a test" in found.verdict


def test_the_command_writes_three_files(evaluated, tmp_path, capsys):
    paths = [str(evaluated("a", MIXED)), str(evaluated("b", GOOD, seed=1))]
    assert compare_command(paths) == 0
    output = tmp_path / "comparison"
    found = json.loads((output / "report.json").read_text())
    assert found["runs"] == ["a", "b"] and len(found["seeds"]) == 2
    assert found["verdict"] in (output / "report.md").read_text()
    assert "Comparison of a, b" in (output / "report.html").read_text()
    assert "PPO - SFT of each run" in capsys.readouterr().err


def test_what_cannot_be_compared_is_one_sentence(evaluated, tmp_path, capsys):
    path = str(evaluated("a", MIXED))
    assert compare_command([path]) == 2
    assert "error: compare: give two or more different run directories" in capsys.readouterr().err
    assert compare_command([path, str(tmp_path / "nothing")]) == 2
    assert "holds no finished evaluation" in capsys.readouterr().err
