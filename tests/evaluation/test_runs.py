"""Runs side by side and over seeds, from directories as the eval stage leaves them."""

import json

import pytest
from evaluation_toys import BAD, GOOD, MIXED, TEST, make_report

from pipeline.cli.compare_command import compare_command
from pipeline.evaluation.assemble import Details, all_examples
from pipeline.evaluation.closed_forms import holm
from pipeline.evaluation.pages.render import write_report
from pipeline.evaluation.pages.runs_pages import comparison_tables
from pipeline.evaluation.run_files import load_run
from pipeline.evaluation.runs import compare_runs

METRICS = [{"name": "bleu", "options": {}}]


@pytest.fixture
def evaluated(tmp_path):
    """Each call leaves a run directory whose PPO wrote the given texts."""

    def make(name: str, ppo: list[str], seed: int = 0, sft: list[str] = MIXED, others=None, **settings):
        kind = {"control_kind": "shuffled scores"} if others else {}
        report, outputs = make_report({"sft": sft, "ppo": ppo, **(others or {})}, seed=seed, **kind)
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


def record_inputs(path, **inputs):
    """Write what the evaluation of a run has read into its record."""
    file = path / "eval" / "stage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": inputs}))
    return path


def compared(*paths):
    return compare_runs([load_run(path) for path in paths])


def test_seeds_are_summed_up(evaluated):
    better = [GOOD, GOOD[:11] + BAD[11:], GOOD[:10] + BAD[10:]]
    found = compared(*(evaluated(f"a-seed-{n}", texts, seed=n) for n, texts in enumerate((*better[:2], BAD))))
    bleu = found.seeds[0]
    deltas = [gain.delta for gain in found.gains if gain.metric == "bleu"]
    assert bleu.mean == pytest.approx(sum(deltas) / 3) and (bleu.low, bleu.high) == (min(deltas), max(deltas))
    assert bleu.deviation == pytest.approx((sum((d - bleu.mean) ** 2 for d in deltas) / 2) ** 0.5)
    assert (bleu.ahead, bleu.seeds, bleu.deltas, bleu.over_both.delta) == (2 / 3, [0, 1, 2], deltas, bleu.mean)
    assert found.verdict.startswith("No difference") and "one-sided tests" in found.verdict
    assert "seeds disagree on bleu" in found.warnings[0] and "67%" in found.warnings[0]
    found = compared(*(evaluated(f"b-seed-{n}", texts, seed=n) for n, texts in enumerate(better)))
    assert found.verdict.startswith("PPO is better than SFT: bleu +") and found.duels == []


def test_seeds_may_each_name_their_control(evaluated):
    texts = [GOOD, GOOD[:11] + BAD[11:]]
    runs = [evaluated(f"run-{n}", texts[n], seed=n, **{"eval.control": f"runs/control_{n}"}) for n in range(2)]
    found = compared(*runs)
    assert found.seeds[0].seeds == [0, 1] and found.duels == []


def test_it_is_told_whether_sft_was_reseeded(evaluated):
    texts = [GOOD, GOOD[:11] + BAD[11:]]
    found = compared(*(evaluated(f"a-{n}", ppo, seed=n) for n, ppo in enumerate(texts)))
    assert any("one SFT model" in line for line in found.findings) and found.seeds[0].sft_models == 1
    anew = [(texts[0], MIXED), (texts[1], GOOD[:1] + MIXED[1:])]
    found = compared(*(evaluated(f"b-{n}", ppo, seed=n, sft=sft) for n, (ppo, sft) in enumerate(anew)))
    assert any("trained anew" in line for line in found.findings) and found.seeds[0].sft_models == 2


def test_records_tell_better_than_texts_whether_sft_was_reseeded(evaluated):
    texts = [GOOD, GOOD[:11] + BAD[11:]]
    runs = [record_inputs(evaluated(f"a-{n}", ppo, seed=n), sft=f"{n}") for n, ppo in enumerate(texts)]
    assert any("trained anew" in line for line in compared(*runs).findings)  # though they wrote the same
    place, other = {"ppo.sft_model_path": "runs/a/sft"}, GOOD[:1] + MIXED[1:]
    runs = [evaluated(f"b-{n}", ppo, seed=n, sft=[MIXED, other][n], **place) for n, ppo in enumerate(texts)]
    assert any("one SFT model" in line for line in compared(*runs).findings)
    for number, run in enumerate(runs):
        record_inputs(run, **{"runs/a/sft": f"{number}"})  # it was made again between them
    assert compared(*runs).seeds[0].sft_models == 2


@pytest.mark.parametrize("wins", [True, False])
def test_the_words_of_the_control_need_a_win_over_all_seeds(evaluated, wins):
    texts = [GOOD, GOOD[:11] + BAD[11:], GOOD[:10] + BAD[10:]]
    controls = [{"control": BAD if wins else texts[n]} for n in range(3)]
    runs = [evaluated(f"a-{n}", texts[n], seed=n, sft=BAD, others=controls[n]) for n in range(3)]
    found = compared(*runs)
    pairs = [(summary.a, summary.b, summary.metric) for summary in found.seeds]
    of_ppo = [("sft", "ppo", "bleu"), ("sft", "ppo", "reward")]
    assert pairs == [*of_ppo, ("sft", "control", "bleu"), ("control", "ppo", "bleu")]
    assert [s.p_holm for s in found.seeds] == holm([s.deciding.p_value for s in found.seeds])
    (line,) = [line for line in found.findings if line.startswith("Over the 3 seeds: The control")]
    assert ("which the reward earned" in line) is wins is (found.seeds[3].p_holm < 0.05)
    assert ("even without a signal" in line) is ("no gain is shown to be the reward's" in line) is not wins
    table = comparison_tables([load_run(run) for run in runs], found)[0]
    assert [row[0] for row in table.rows] == ["ppo - sft", "ppo - sft", "control - sft", "ppo - control"]


def test_a_control_that_seeds_share_earns_no_words(evaluated):
    texts = [GOOD, GOOD[:11] + BAD[11:], GOOD[:10] + BAD[10:]]
    for shared in (True, False):
        controls = [{"control": ["no"] * (1 if shared else n + 1) + BAD[1 if shared else n + 1 :]} for n in range(3)]
        runs = [evaluated(f"{shared}-{n}", texts[n], seed=n, sft=BAD, others=controls[n]) for n in range(3)]
        (line,) = [line for line in compared(*runs).findings if line.startswith("Over the 3 seeds: The control")]
        assert ("seeds share a control" in line) is shared and ("which the reward earned" in line) is not shared
        for number, run in enumerate(runs):  # the records know better than the texts
            record_inputs(run, control="one" if not shared else f"{number}")
        (line,) = [line for line in compared(*runs).findings if line.startswith("Over the 3 seeds: The control")]
        assert ("seeds share a control" in line) is not shared


def test_a_control_with_a_signal_is_not_called_one_without(evaluated):
    texts = [GOOD, GOOD[:11] + BAD[11:], GOOD[:10] + BAD[10:]]
    runs = [evaluated(f"a-{n}", texts[n], seed=n, sft=BAD, others={"control": texts[n]}) for n in range(3)]
    for run in runs:
        file = run / "eval" / "report.json"
        report = json.loads(file.read_text())
        report["settings"]["control_kind"] = "another reward"
        file.write_text(json.dumps(report))
    (line,) = [line for line in compared(*runs).findings if line.startswith("Over the 3 seeds: The control")]
    assert "another reward" in line and "not shown to be better" in line
    assert "without a signal" not in line and "no gain is shown" not in line


def test_missing_texts_are_not_taken_for_another_test_set(evaluated):
    texts = [GOOD, GOOD[:10] + BAD[10:]]
    runs = [evaluated(f"a-{n}", ppo, seed=n) for n, ppo in enumerate(texts)]
    for file in (runs[1] / "eval" / "predictions").iterdir():
        file.unlink()
    found = compared(*runs)
    assert found.seeds[0].over_both is None and found.seeds[0].sft_models == 0
    assert any("or texts or scores of some are missing, so Student's t" in line for line in found.findings)
    assert not any("SFT model" in line for line in found.findings)
    note = comparison_tables([load_run(run) for run in runs], found)[0].note
    assert note.startswith("Interval and p: Student's t over the seeds where texts")


def test_seeds_that_changed_nothing_do_not_disagree(evaluated):
    found = compared(*(evaluated(f"a-{n}", texts, seed=n) for n, texts in enumerate((MIXED, MIXED, GOOD))))
    assert found.seeds[0].ahead == 1 / 3 and not any("disagree" in warning for warning in found.warnings)


def test_a_run_that_cannot_be_tested_is_named(evaluated):
    first, second = evaluated("a", MIXED), evaluated("b", GOOD, **{"ppo.kl_coef": 0.1})
    third = evaluated("c", GOOD, **{"ppo.kl_coef": 0.2})
    for file in (third / "eval" / "predictions").iterdir():
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    found = compared(first, second, third)
    assert any(line == "Not tested: c, which shares no test set, system and metric with a." for line in found.findings)
    assert not any("Not tested" in line for line in compared(first, second).findings)


def test_the_correction_is_named_where_it_changes_a_p(evaluated):
    """One question between two groups of seeds, beside the summaries of each group."""
    texts = [GOOD, GOOD[:11] + BAD[11:]]
    runs = [evaluated(f"a-{n}", ppo, seed=n, sft=BAD) for n, ppo in enumerate(texts)]
    others = [[*MIXED[:-1], "x"], MIXED]
    runs += [evaluated(f"b-{n}", others[n], seed=n, sft=BAD, **{"ppo.kl_coef": 0.1}) for n in range(2)]
    found = compared(*runs)
    assert len(found.duels) == 1 and found.duels[0].p_holm > found.duels[0].p_value
    assert "p-values are corrected by Holm" in found.findings[0]


def test_a_seed_counts_once(evaluated):
    """A copy of a run, under its own seed or under another, adds nothing."""
    first, second = evaluated("a", GOOD), evaluated("b", GOOD[:10] + BAD[10:], seed=1)
    honest = compared(first, second).seeds[0]
    same_seed = compared(first, second, evaluated("copy", GOOD[:9] + BAD[9:], seed=1))
    same_texts = compared(first, second, evaluated("relabelled", GOOD, seed=2))
    for found, place in ((same_seed, "copy has the seed of b"), (same_texts, "relabelled wrote the same texts")):
        assert found.seeds[0].deciding == honest.deciding and found.seeds[0].seeds == [0, 1]
        assert place in found.warnings[0] and "counted once" in found.warnings[0]


def test_seeds_whose_ppo_ended_as_sft_all_count(evaluated):
    found = compared(*(evaluated(f"a-{n}", texts, seed=n) for n, texts in enumerate((MIXED, MIXED, GOOD))))
    assert found.seeds[0].seeds == [0, 1, 2] and not any("counted once" in text for text in found.warnings)


def test_seeds_with_other_test_sets_are_tested_over_seeds_alone(evaluated):
    first, second = evaluated("a", GOOD), evaluated("b", GOOD[:10] + BAD[10:], seed=1)
    for file in (second / "eval" / "predictions").iterdir():
        file.write_text(file.read_text().replace("prompt 0", "another prompt"))
    bleu = compared(first, second).seeds[0]
    assert bleu.over_both is None and bleu.deciding == bleu.over_seeds


def test_groups_of_seeds_are_compared_over_seeds(evaluated):
    rate = {"ppo.kl_coef": 0.1}
    first = [evaluated(f"a-{n}", GOOD[:n] + BAD[n:], seed=n) for n in range(3)]
    other = [evaluated(f"b-{n}", GOOD[: 12 - n] + BAD[12 - n :], seed=n, **rate) for n in range(3)]
    (duel,) = compared(*first, *other).duels
    assert (duel.a, duel.b, duel.seeds_a, duel.seeds_b) == ("a-0 (3 seeds)", "b-0 (3 seeds)", 3, 3)
    assert duel.delta > 0 and duel.p_value < 0.05
    assert "b-0 (3 seeds) differs from a-0 (3 seeds)" in compared(*first, *other).verdict
    found = compared(first[0], *other)  # one seed on one side: checkpoints
    assert len(found.duels) == 3 and found.verdict.count("these two checkpoints") == 3


def test_pairs_of_runs_are_corrected_for_their_number(evaluated):
    paths = [evaluated(f"run-{n}", BAD[:n] + MIXED[n:], **{"ppo.kl_coef": n}) for n in (0, 4, 8, 12)]
    found = compared(*paths)
    p_values = [duel.p_value for duel in found.duels]
    assert [duel.p_holm for duel in found.duels] == holm(p_values)
    assert any(duel.p_value < 0.05 <= duel.p_holm for duel in found.duels)
    assert found.verdict.count("two checkpoints differ") == sum(duel.p_holm < 0.05 for duel in found.duels)


def test_runs_of_other_settings_are_no_seeds_but_are_tested_against_each_other(evaluated):
    paths = [evaluated("a", MIXED), evaluated("b", GOOD, seed=1, **{"ppo.kl_coef": 0.1})]
    runs = [load_run(path) for path in paths]
    found = compare_runs(runs)
    assert found.seeds == []
    (duel,) = found.duels
    gain = next(gain for gain in found.gains if (gain.run, gain.metric) == ("b", "bleu"))
    assert (duel.a, duel.b, duel.system) == ("a", "b", "ppo")
    assert duel.delta == pytest.approx(gain.delta) and duel.p_value < 0.05  # a's PPO wrote what SFT wrote
    assert found.verdict.startswith("b and a: these two checkpoints differ (ppo, bleu +")
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


def test_runs_of_one_name_are_told_apart(evaluated, tmp_path):
    paths = [str(evaluated(f"{folder}/run", texts)) for folder, texts in (("old", MIXED), ("new", GOOD))]
    assert compare_command([*paths, "--output", str(tmp_path / "comparison")]) == 0
    report = json.loads((tmp_path / "comparison" / "report.json").read_text())
    assert report["runs"] == paths
    deltas = {gain["run"]: gain["delta"] for gain in report["gains"] if gain["metric"] == "bleu"}
    assert deltas[paths[0]] == 0 < deltas[paths[1]]


def test_a_metric_of_the_user_is_found_beside_the_runs(evaluated, tmp_path, monkeypatch):
    (tmp_path / "my_own_measure.py").write_text(
        "from pipeline.metrics import load_metric\n\n\ndef own(**options):\n    return load_metric('bleu')\n"
    )
    monkeypatch.setitem(METRICS[0], "name", "my_own_measure.own")
    paths = [str(evaluated(f"runs/{name}", texts)) for name, texts in (("a", MIXED), ("b", GOOD))]
    assert compare_command([*paths, "--output", str(tmp_path / "comparison")]) == 0


def test_what_cannot_be_compared_is_one_sentence(evaluated, tmp_path, capsys):
    path = str(evaluated("a", MIXED))
    assert compare_command([path]) == 2
    assert "error: compare: give two or more different run directories" in capsys.readouterr().err
    assert compare_command([path, str(tmp_path / "nothing")]) == 2
    assert "holds no finished evaluation" in capsys.readouterr().err


def test_clusters_of_the_predictions_are_drawn_as_a_whole(evaluated):
    """Twelve examples in two clusters decide nothing: neither a pair of checkpoints nor three seeds."""

    def clustered(path):
        for file in (path / "eval" / "predictions").iterdir():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            lines = [json.dumps({**row, "cluster": number // 6}) for number, row in enumerate(rows)]
            file.write_text("\n".join(lines) + "\n")
        return path

    pair = [evaluated("a", MIXED), evaluated("b", GOOD, **{"ppo.kl_coef": 1})]
    assert compared(*pair).duels[0].p_value < 0.05
    duel = compared(*map(clustered, pair)).duels[0]
    assert duel.p_value >= 0.5 and duel.degrees == 1
    texts = [GOOD, GOOD[:11] + BAD[11:], GOOD[:10] + BAD[10:]]
    seeds = [evaluated(f"c-{n}", ppo, seed=n) for n, ppo in enumerate(texts)]
    assert compared(*seeds).seeds[0].over_both.p_value < 0.05
    assert compared(*map(clustered, seeds)).seeds[0].over_both.p_value >= 0.5
