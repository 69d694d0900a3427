"""Work that two processes share and one process does alone; directories that are not shared."""

import json
import math
import os
from pathlib import Path

import pytest
from accelerate import PartialState
from two_processes import run_in_two

from pipeline import sft as sft_stage
from pipeline.runtime import distributed
from pipeline.runtime.distributed import gather_rows, on_main, shared_directory_problem


def squares(directory: Path) -> list:
    """Something of each of seven rows, in blocks of two in another order; the rows a process had are noted."""
    seen: list[int] = []

    def compute(rows: list[int]) -> list[dict]:
        seen.extend(rows)
        return [{"row": row, "text": "\ud800 ü\n", "square": row * row / 7, "none": math.nan} for row in rows]

    PartialState(cpu=True)
    items = gather_rows([[6, 0], [3, 2], [5, 4], [1]], compute)
    (directory / f"seen-{PartialState().process_index}.json").write_text(json.dumps(seen))
    return items


def test_two_processes_gather_what_one_computes(tmp_path, fresh_accelerate):
    """Floats to the bit, and halves of letters, which no file could hold as they are."""

    def body() -> None:
        items = squares(tmp_path)
        (tmp_path / f"two-{PartialState().process_index}").write_text(json.dumps(items))

    run_in_two(body, tmp_path)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen == [[6, 0, 5, 4], [3, 2, 1]]
    one = squares(tmp_path)
    assert [item["row"] for item in one] == list(range(7)) and one[3]["square"] == 9 / 7
    assert (tmp_path / "two-0").read_text() == (tmp_path / "two-1").read_text() == json.dumps(one)


def test_no_rows_give_no_items(fresh_accelerate):
    assert gather_rows([], lambda rows: rows) == []


def test_a_result_for_each_row_is_needed(fresh_accelerate):
    with pytest.raises(ValueError, match="shorter"):
        gather_rows([[0, 1]], lambda rows: [1])


def test_the_result_of_the_main_process_reaches_all_and_so_does_its_error(tmp_path):
    def body() -> None:
        rank = PartialState(cpu=True).process_index
        assert on_main(lambda: {"rank": rank}) == {"rank": 0}

        def fail() -> None:
            raise OSError("the disk is full")

        with pytest.raises(OSError if rank == 0 else ValueError, match=r"^the disk is full$"):
            on_main(fail)
        (tmp_path / f"done-{rank}").touch()

    run_in_two(body, tmp_path)
    assert (tmp_path / "done-0").is_file() and (tmp_path / "done-1").is_file()


@pytest.mark.parametrize("made", [True, False])
def test_a_directory_that_is_shared_is_left_as_it_was(tmp_path, made):
    directory = tmp_path / "runs" / "tiny"
    if made:
        directory.mkdir(parents=True)
        (directory / "file").touch()

    def body() -> None:
        assert PartialState(cpu=True).num_processes == 2
        assert shared_directory_problem(directory) is None

    run_in_two(body, tmp_path)
    assert directory.is_dir() == made and (not made or [p.name for p in directory.iterdir()] == ["file"])


@pytest.mark.parametrize("there", [True, False])
def test_a_stage_whose_directory_is_not_shared_is_refused(tmp_path, capfd, monkeypatch, there):
    """Two machines on which the same name is another directory: here one relative to other places."""
    monkeypatch.setattr(distributed, "PATIENCE", 0.2)
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.en").write_text("a\nb\n")
        (tmp_path / f"{split}.de").write_text("x\ny\n")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"name: tiny\noutput_dir: runs\n"
        f"model: {{from_scratch: {{hidden_size: 16, num_hidden_layers: 1, vocab_size: 270}}}}\n"
        f"task: {{name: parallel, data_dir: {tmp_path}, source: '{{split}}.en', target: '{{split}}.de'}}\n"
        f"sft: {{num_train_epochs: 1}}\n"
    )
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    if there:  # what one of them sees must not decide for both
        (tmp_path / "1" / "runs" / "tiny" / "sft").mkdir(parents=True)

    def body() -> None:
        rank = os.environ["RANK"]
        os.chdir(tmp_path / rank)
        (tmp_path / f"code-{rank}").write_text(str(sft_stage.main([str(recipe)])))

    run_in_two(body, tmp_path)
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    for words in ("sft: process 1", f"{tmp_path}/1/runs/tiny", "process 0", f"{tmp_path}/0/runs/tiny", "output_dir"):
        assert words in error
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob(".mark*"))
