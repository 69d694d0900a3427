"""Work shared out over two processes and over one; directories that are not shared."""

import json
import math
import os
import socket
from pathlib import Path

import pytest
from accelerate import PartialState
from two_processes import run_in_two

from pipeline import sft as sft_stage
from pipeline.runtime import distributed as shares
from pipeline.runtime.distributed import on_main, part_files, unseen


def squares(directory: Path) -> list:
    """Something of each of seven rows, in blocks of two in another order; the ones a process had are kept."""
    seen: list[int] = []

    def work(rows: list[int]) -> list[dict]:
        seen.extend(rows)
        return [{"row": row, "text": "\ud800 ü\n", "square": row * row / 7, "none": math.nan} for row in rows]

    PartialState(cpu=True)
    with part_files(directory / "parts") as parts:
        found = parts.shared_out("some/squares", [[6, 0], [3, 2], [5, 4], [1]], work)
        assert bool(found) == parts.is_read_here
    (directory / f"seen-{PartialState().process_index}.json").write_text(json.dumps(seen))
    return found


def test_two_processes_make_what_one_makes(tmp_path, fresh_accelerate):
    """Floats to the bit, and halves of letters, which no file could hold as they are."""
    leftover = tmp_path / "parts" / "some" / "squares.1.jsonl"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("of a run that was killed")

    def body() -> None:
        found = squares(tmp_path)
        if found:
            (tmp_path / "two").write_text(json.dumps(found))

    run_in_two(body, tmp_path)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen == [[6, 0, 5, 4], [3, 2, 1]]
    one = squares(tmp_path)
    assert [line["row"] for line in one] == list(range(7)) and one[3]["square"] == 9 / 7
    assert (tmp_path / "two").read_text() == json.dumps(one)
    assert not (tmp_path / "parts").exists()


def test_equal_numbers_stay_as_they_were_written(tmp_path, fresh_accelerate):
    with part_files(tmp_path / "parts") as parts:
        parts.write("samples", [(1, "c"), (0, "b"), (0, "a")])
        assert parts.read("samples") == ["b", "a", "c"]


def test_a_part_that_is_not_to_be_seen_is_named(tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.setattr(shares, "PATIENCE", 0.1)
    with (
        part_files(tmp_path / "parts") as parts,
        pytest.raises(OSError, match=r"never\.0\.jsonl, which process 0 has written, is not to be seen: output_dir"),
    ):
        parts.read("never")


def test_what_the_main_process_says_reaches_all_and_so_does_why_it_failed(tmp_path):
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
        assert unseen(directory) is None

    run_in_two(body, tmp_path)
    assert directory.is_dir() == made and (not made or [p.name for p in directory.iterdir()] == ["file"])


@pytest.mark.parametrize("there", [True, False])
def test_a_stage_whose_directory_is_not_shared_is_refused(tmp_path, capfd, monkeypatch, there):
    """Two machines on which the same name is another directory: here one relative to other places."""
    monkeypatch.setattr(shares, "PATIENCE", 0.2)
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
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    host = socket.gethostname()
    assert errors == [
        f"error: sft: process 1 on {host}, whose own is {tmp_path}/1/runs/tiny, does not see what process 0 on {host} "
        f"writes to {tmp_path}/0/runs/tiny: output_dir must be on a file system that all machines share"
    ]
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob(".mark*"))
