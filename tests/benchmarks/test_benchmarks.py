"""The benchmarks still run: our side of each on a tiny model, and their arithmetic by hand."""

import json
from pathlib import Path

import decoding
import encoder_decoder
import gpu
import gpu_worker
import ppo_scaling
import ppo_vs_trl
import pytest
import reward_memory
import scaling
import torch
from relay_worker import run


@pytest.mark.parametrize("case", ["ends", "forced"])
def test_our_side_reports_every_phase(case, tmp_path, capsys, fresh_accelerate, monkeypatch):
    monkeypatch.setattr(ppo_vs_trl, "measure", lambda python, worker, spec: json.loads(run(spec)))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    options = f"--quick --case {case} --repetitions 1 --steps 1 --batch 8 --micro-batch 4 --response-length 6"
    medians = ppo_vs_trl.main([*options.split(), "--work", str(tmp_path), "--json", str(tmp_path / "runs.json")])
    assert medians["relay"]["wall"] > 0 and medians["relay"]["cpu"] > 0
    found = json.loads((tmp_path / "runs.json").read_text())["runs"]["relay"][0]
    assert len(found["wall"]) == 1 and all(found["phase_cpu"][name] > 0 for name in ("generate", "score", "update"))
    assert sum(found["share"].values()) == pytest.approx(1.0)
    assert found["length"] == 6.0 if case == "forced" else 1.0 <= found["length"] <= 6.0
    assert "episodes/s" in capsys.readouterr().out


def test_slopes_and_counts_by_hand():
    assert ppo_scaling.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)
    # One row of one prompt and one completion token, width 1, vocabulary 10: two tokens through 2 * 4 * 12 and
    # attention 4 * 4 * 1, one through a head of 20; a pass to write, two to score, four epochs of two.
    assert ppo_scaling.operations(1, 1, 10, 1, prompt=1) == (2 * (96 + 16) + 20) * 11


def test_the_memory_of_four_models_on_one_base(capsys):
    sizes = "--hidden 32 --layers 1 --vocabulary 300 --batch 2 --prompt 4 --response 4"
    found = reward_memory.main(sizes.split())
    base = 300 * 32 + 4 * 32 * 32 + 3 * 32 * 128 + 3 * 32
    assert found["four"]["parameters"] - found["full"]["parameters"] == 16 * (4 * 64 + 3 * 160)  # the policy's adapter
    assert found["full"]["parameters"] == 4 * base and found["full"]["trained"] == 2 * base
    # On one base: adapters of policy and reward, the value head and the reward head.
    assert found["shared"]["parameters"] == base + 2 * 16 * (4 * 64 + 3 * 160) + 33 + 32
    assert "shared / four" in capsys.readouterr().out


def test_an_encoder_decoder_beside_a_decoder(capsys, fresh_accelerate, monkeypatch):
    monkeypatch.setattr(encoder_decoder, "measure", lambda python, worker, spec: json.loads(run(spec)))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    found = encoder_decoder.main(["--quick"])
    assert list(found) == ["decoder-only", "encoder-decoder", "decoder trained"]
    assert all(measured["seconds"] > 0 for measured in found.values())
    assert "encoder for each token" in capsys.readouterr().out


def test_counts_of_an_encoder_decoder_by_hand(monkeypatch):
    monkeypatch.setattr(encoder_decoder, "WIDTH", 1)
    monkeypatch.setattr(encoder_decoder, "VOCABULARY", 10)
    monkeypatch.setattr(encoder_decoder, "T5_FEED", 1)
    monkeypatch.setattr(encoder_decoder, "T5_LAYERS", (1, 1))
    # The encoder's layer has 6 weights, the decoder's 2 at prompt tokens and 8 at its own, of which each has 10 more.
    count = encoder_decoder.operations
    assert count("encoder-decoder", 3, 2, epochs=1) == 2 * (3 * 6 + 3 * 2 + 2 * 18) * 5
    assert count("decoder trained", 3, 2, epochs=1) == 2 * (2 * 3 * 6 + (3 * 2 + 2 * 18) * 5)
    again = (3 * 6 + 3 * 2 + 8 + 10) + (3 * 6 + 3 * 2 + 16 + 10)
    assert count("encoder for each token", 3, 2, epochs=1) == 2 * ((18 + 6 + 36) + again * 4)


def test_scaling_measures_both_kinds(capsys, fresh_accelerate, monkeypatch):
    """The workers in this process; what starts several of them is tested below."""
    monkeypatch.setattr(scaling, "measure", lambda spec, processes, groups: scaling.work(spec))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    found = scaling.main(["--repetitions", "1", "--steps", "1", "--batch", "8", "--width", "32"])
    assert list(found) == ["ppo", "sft"]
    assert all(set(ratios) == {"strong", "weak", "apart"} and min(ratios.values()) > 0 for ratios in found.values())
    assert capsys.readouterr().out.count("two apart") == 2


def test_scaling_by_hand():
    seconds = {"alone": 1.0, "alone, twice the batch": 2.1, "two": 1.25, "two apart": 1.1}
    assert scaling.ratios(seconds) == pytest.approx({"strong": 1.68, "weak": 0.8, "apart": 1 / 1.1})


def test_scaling_takes_the_slowest_of_all_processes(tmp_path, monkeypatch):
    """True processes, two of one group and two groups of one, with a stand-in for the work."""
    lines = [
        "import json, os, sys",
        "from pathlib import Path",
        "rank, file = int(os.environ.get('RANK', 0)), Path(sys.argv[-1])",
        "(file.parent / f'{rank}.json').write_text(json.dumps([1 + rank, 2 - rank]))",
    ]
    (tmp_path / "scaling.py").write_text("\n".join(lines))
    monkeypatch.setattr(scaling, "HERE", tmp_path)
    assert scaling.measure({}, 2, 1) == [2, 2]
    assert scaling.measure({}, 1, 2) == [1, 2]


def test_the_comparison_on_a_gpu_runs_on_a_cpu_too(tmp_path, capsys, fresh_accelerate, monkeypatch):
    """Our sides in this process; of TRL's, the one that has no environment here."""

    class Here(gpu.Side):
        def __init__(self, name: str, spec: dict, trl12: None, folder: Path) -> None:
            (self.worker, *arguments), _, own = gpu.SIDES[name][0].split(), *gpu.SIDES[name][1:]
            self.spec, self.process = spec | own, None
            self.side = gpu_worker.SIDES[arguments[0]] if arguments else lambda spec: json.loads(run(spec))

        def measure(self) -> dict:
            return super().measure() if self.worker == "trl_worker.py" else self.side(self.spec)

    monkeypatch.setattr(gpu, "Side", Here)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(gpu_worker.torch.cuda, "is_available", lambda: False)
    sides = [side for side in gpu.SIDES if "TRL" not in side or "1.12" in side]
    options = ["--device", "cpu", "--tiny", "--steps", "1", "--json", str(tmp_path / "gpu.json")]
    reports = gpu.main([*options, *(word for side in sides for word in ("--side", side))])
    assert list(reports) == sides and json.loads((tmp_path / "gpu.json").read_text())["reports"] == reports
    assert [side for side in sides if "error" in reports[side]] == ["TRL 1.12 PPOTrainer"]
    assert reports["Relay, PPO"]["length"] == 6.0 and reports["Relay, SFT"]["tokens_a_second"] > 0
    assert len(reports["Generation"]["tokens_a_second"]) == 4
    decodes, whole = reports["Relay, evaluation of three models"]["tokens_a_second"].values()
    assert decodes > whole > 0
    assert "Generation: static shapes |" in capsys.readouterr().out


def test_lines_of_the_gpu_table_by_hand():
    shares = {"generate": 0.5, "score": 0.2, "update": 0.3}
    report = {"batch": 64, "wall": [2.0, 6.0], "length": 10.0, "generate_seconds": 2.0, "memory": 1.5e9}
    row = gpu.rows("side", report | {"wall_share": shares})
    assert row == [["side", "16.0", "50%, 20%, 30%", "320", "1.5"]]
    assert gpu.rows("side", {"error": "no memory"})[0][:2] == ["side", "no memory"]
    assert gpu.rows("side", {"tokens_a_second": 1234.4, "memory": None}) == [["side", "", "", "1,234", ""]]


def test_what_a_token_costs_the_host(capsys):
    sizes = ["--rows", "2", "--prompt", "4", "--tokens", "10", "--repetitions", "1", "--rank", "4", "--texts", "32"]
    found, more = (decoding.main([*sizes, "--layers", layers]) for layers in ("2", "3"))
    for name in ("decode loop", "static shapes"):
        # A layer has seven linear ones, each of which is a product and two of the adapter, its scale and the sum.
        assert more[name]["operations of the pass"] - found[name]["operations of the pass"] > 7 * 5
        assert more[name]["operations outside it"] == pytest.approx(found[name]["operations outside it"], abs=4)
    batches, refill = found["32 texts in batches"], found["32 texts with refill"]
    assert batches["reads"] == 4 < refill["reads"] and refill["passes for tokens"] < batches["passes for tokens"]
