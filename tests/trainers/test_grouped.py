"""`group_by_length` in several processes."""

import json

import torch
from accelerate import PartialState
from transformers.trainer_pt_utils import LengthGroupedSampler
from two_processes import run_in_two

from pipeline.trainers.huggingface.samplers import GlobalLengthGroupedSampler

LENGTHS = [3, 9, 1, 7, 5, 2, 8, 4, 6, 10, 12, 11] * 8


def test_one_process_keeps_the_order_of_transformers(fresh_accelerate):
    torch.manual_seed(3)
    expected = list(LengthGroupedSampler(4, lengths=LENGTHS))
    torch.manual_seed(3)
    assert list(GlobalLengthGroupedSampler(LengthGroupedSampler(4, lengths=LENGTHS))) == expected


def test_two_processes_read_in_the_order_of_one(tmp_path):
    """Also where their random states have parted, as they do in an epoch with dropout."""

    def body():
        rank = PartialState(cpu=True).process_index
        torch.manual_seed(3 + rank)
        order = list(GlobalLengthGroupedSampler(LengthGroupedSampler(2, lengths=LENGTHS)))
        (tmp_path / f"{rank}.json").write_text(json.dumps(order))

    run_in_two(body, tmp_path)
    torch.manual_seed(3)
    expected = list(LengthGroupedSampler(4, lengths=LENGTHS))
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected, expected]
