"""Decoding with static shapes against the decode loop, row by row, and what a CUDA graph asks of a pass.

No test here needs CUDA: `Tape` records the operations of a pass and replays them, as a graph would, at the same
addresses. What Python decided while it was recorded stays as it was.
"""

import contextlib
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_decoding import ENCODER_DECODERS, MODELS, PROMPTS, WINDOWS, build, greedy
from test_sampling_options import SAMPLED, Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models import generation
from pipeline.models.generation import Decoding, generate
from pipeline.models.kernels import narrow_weights as narrow_module
from pipeline.models.kernels import static_decode as static
from pipeline.models.kernels import static_step
from pipeline.models.kernels.decode_loop import decode_batch
from pipeline.models.kernels.narrow_weights import narrow_weights
from pipeline.models.kernels.packing import enable_packing
from pipeline.models.kernels.static_decode import (
    bucket,
    decode_static,
    open_first,
    supports_refill,
    supports_static_decode,
)
from pipeline.models.kernels.static_step import StaticStep
from pipeline.models.text import encode_prompts
from pipeline.runtime.memory import in_smaller_batches

EXPERTS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
MIXTURES = {"mixtral": {**EXPERTS, "num_local_experts": 4}, "qwen3_moe": {**EXPERTS, "num_experts": 4}}
# Its positions are compared with the length of a table, by a number that only the device knows.
WAITING = {"m2m_100"}
REFILLED = [name for name in (*MODELS, *MIXTURES) if name not in ENCODER_DECODERS]
# Operations for which a host waits, or which read the host's memory: none of them can be in a CUDA graph.
HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::masked_select", "aten::_unique2"}


class Tape(TorchDispatchMode):
    """A stand-in for a CUDA graph: what a pass computes, to be computed again into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        if name in HOST:
            raise RuntimeError(f"{name} cannot be captured")
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.calls.append(
            (function, args, kwargs or {}, [x.untyped_storage().data_ptr() not in given for x in made], made)
        )
        return result

    def replay(self) -> None:
        for function, args, kwargs, new, made in self.calls:
            result = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for is_new, target, source in zip(new, made, result, strict=True):
                if is_new and target.numel():
                    target.copy_(source)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Look at the ends every third token, so that rows leave several times, and round caches to 16 columns."""
    monkeypatch.setattr(static, "LOOK", 3)
    monkeypatch.setattr(static, "COLUMNS", 16)
    static._MEMORIES.clear()


@pytest.fixture
def captures(monkeypatch) -> list[Tape]:
    """All tapes; every step is recorded when it is first needed, and replayed from then on."""
    tapes = []

    class Recorder:
        def warm_up(self, compute) -> torch.Tensor:
            return compute()

        def record(self, compute) -> tuple[Tape, torch.Tensor]:
            with Tape() as tape:
                logits = compute()
            tapes.append(tape)
            return tape, logits

    monkeypatch.setattr(static_step, "Recorder", Recorder)
    monkeypatch.setattr(static, "can_capture", lambda model: True)
    return tapes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", [*MODELS, *MIXTURES])
def test_tokens_are_those_of_the_decode_loop(architecture, attention):
    model = build(architecture, attn_implementation=attention, **MIXTURES.get(architecture, {}))
    assert supports_static_decode(model)
    plain = decode_batch(model, PROMPTS, 0, 40, [60], greedy)
    for ends in ([2], [plain[0][3], plain[2][20]], [plain[1][0]]):
        assert decode_static(model, PROMPTS, 0, 40, ends, greedy) == decode_batch(model, PROMPTS, 0, 40, ends, greedy)
    # The memory of a large batch serves smaller ones with shorter prompts.
    few = model, PROMPTS[1:3], 0, 7, [2], greedy
    assert decode_static(*few) == decode_batch(*few) and len(static._MEMORIES) == 1


@pytest.mark.parametrize("architecture", [*MODELS, *MIXTURES])
def test_a_pass_can_be_recorded_once_for_each_bucket_and_replayed(architecture, captures, capsys):
    model = build(architecture, attn_implementation="sdpa", **MIXTURES.get(architecture, {}))
    plain = decode_batch(model, PROMPTS, 0, 20, [60], greedy)
    ends = [plain[0][3], plain[2][12]]
    expected = decode_batch(model, PROMPTS, 0, 20, ends, greedy)
    assert decode_static(model, PROMPTS, 0, 20, ends, greedy) == expected
    recorded, lines = len(captures), capsys.readouterr().err.splitlines()
    assert decode_static(model, PROMPTS, 0, 20, ends, greedy) == expected
    assert len(captures) == recorded  # nothing new
    if architecture in WAITING:
        [line] = lines  # once, and then never tried again
        assert recorded == 0 and architecture in line and "_local_scalar_dense cannot be captured" in line
    else:
        assert recorded >= 1 and not lines


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("decoding", SAMPLED.values(), ids=SAMPLED)
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_a_row_is_sampled_alike_in_any_company(architecture, decoding, replayed, monkeypatch, request):
    model, rows = build(architecture), []
    if replayed:
        request.getfixturevalue("captures")
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(generation, "STATIC_DEVICES", devices)
        for size in (1, 4, 6):
            torch.manual_seed(1)
            rows.append(generate(model, Tokenizer, PROMPTS, decoding, size))
    assert rows == rows[:1] * 6 and len(static._MEMORIES) == 1


def test_texts_end_where_they_should_between_two_looks(taught, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "STATIC_DEVICES", {"cpu"})
    model, prompts = taught().eval(), encode_prompts(tokenizer, ["say north", "say east south", "say west"])
    free = generate(model, tokenizer, prompts, Decoding(8), 8)
    word = tokenizer.decode(free[0], skip_special_tokens=True).split()[1][:3]
    stops = Decoding(8, stop_strings=(word, "w"))
    late = Decoding(8, 1.0, min_new_tokens=3, suppress_tokens=tuple(free[0][1:2]), begin_suppress_tokens=(free[0][0],))
    for decoding in (stops, Decoding(8, min_new_tokens=7), Decoding(1), Decoding(3), late):
        for asked, size in ((prompts, 8), (prompts * 3, 2), (prompts * 3, 4)):
            rows = []
            for devices in (set(), {"cpu"}):
                monkeypatch.setattr(generation, "STATIC_DEVICES", devices)
                torch.manual_seed(3)
                rows.append(generate(model, tokenizer, asked, decoding, size))
            assert rows[0] == rows[1]
    assert len(static._MEMORIES) == 1


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_adapter_is_read_as_it_is_now(precision, captures):
    """Under autocast, with packed attention, and again after each change that a graph could not see."""
    base = build("llama", attn_implementation="sdpa")
    enable_packing(base)
    network = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)).eval()
    forced = torch.randint(3, 60, (len(PROMPTS), 12), generator=torch.Generator().manual_seed(0))

    def logits(decode) -> torch.Tensor:
        """What is found likely before each of the same tokens."""
        steps = []

        def choose(found, step, rows):
            steps.append(found.clone())
            return forced[rows, step]

        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            assert decode(base, PROMPTS, 0, 12, [2], choose) == forced.tolist()
        return torch.stack(steps)

    def check() -> torch.Tensor:
        found, tolerance = logits(decode_static), {"rtol": 0, "atol": 1e-4 if precision == torch.float32 else 0.3}
        torch.testing.assert_close(found, logits(decode_batch), **tolerance)
        return found

    first, recorded = check(), len(captures)
    with torch.no_grad():  # in place, as an optimizer writes
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    second = check()
    assert (second - first).abs().max() > 1 and len(captures) == recorded
    with network.disable_adapter():
        assert (check() - second).abs().max() > 1
    assert len(captures) > recorded
    check()
    recorded = len(captures)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.data = parameter.data * 1.5  # elsewhere in memory
    check()
    assert len(captures) > recorded


@pytest.mark.parametrize("trained", [True, False])
def test_narrow_weights_change_no_bit_and_go_again(trained):
    base = build("llama", attn_implementation="sdpa").requires_grad_(trained)
    network = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)).eval()
    before = {name: (parameter, parameter.clone()) for name, parameter in network.named_parameters()}
    ids, outputs, counts = torch.tensor(PROMPTS[4:5]), [], []

    def count(module, args) -> None:
        counts.append(sum(p.dtype == torch.bfloat16 for p in base.parameters()))

    base.register_forward_pre_hook(count)
    for kept in (contextlib.nullcontext(), narrow_weights(base)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), kept:
            outputs.append(base(ids).logits)
    with narrow_weights(base), torch.no_grad():
        base(ids)
    linear = 2 * 7 * 3 + 1  # A, B and what they are added to, of seven layers twice, and the LM head
    assert torch.equal(*outputs) and counts == [0, linear, 0]  # none without autocast
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), narrow_weights(base):
        raise KeyError
    for name, parameter in network.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_weights_are_cast_once_for_all_tokens(tokenizer, taught):
    """Autocast remembers no casts of weights that do not train: it would cast them again for each token."""
    model, casts = taught().eval().requires_grad_(False), []
    shapes = {tuple(m.weight.shape) for m in model.modules() if type(m) is torch.nn.Linear}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and tuple(args[0].shape) in shapes:
                casts.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Casts():
        generate(model, tokenizer, [[5, 6, 7]], Decoding(2, min_new_tokens=2), 1)
        few = len(casts)
        generate(model, tokenizer, [[5, 6, 7]], Decoding(9, min_new_tokens=9), 1)
    assert len(casts) - few <= few


def test_without_memory_for_narrow_weights_they_are_cast_by_autocast(monkeypatch):
    model = build("llama")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("pipeline.models.kernels.narrow_weights.nn.Parameter", full)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), narrow_weights(model):
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert not torch.is_autocast_cache_enabled()  # whose casts would be as large
        model(torch.tensor(PROMPTS[4:5]))


def test_what_is_kept_for_the_next_texts_goes_where_memory_runs_out(captures, monkeypatch):
    monkeypatch.setattr(generation, "STATIC_DEVICES", {"cpu"})
    model, tokenizer = build("llama"), Tokenizer()

    def write() -> list[list[int]]:
        with torch.autocast("cpu", torch.bfloat16):
            return generate(model, tokenizer, PROMPTS[:4], Decoding(6), 2)

    first, calls = write(), []

    def fail_once(size: int) -> int:
        calls.append(size)
        if len(calls) == 1:
            assert model in static._MEMORIES and len(narrow_module._NARROW) > 0
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return size

    assert in_smaller_batches(fail_once, 4) == (2, 2)
    assert not static._MEMORIES and not narrow_module._NARROW
    assert write() == first


@pytest.mark.parametrize("told", [False, True])
def test_the_allocator_learns_that_a_capture_has_failed(monkeypatch, told):
    """Of torch's calls alone, without a GPU: it raises where it has been told already."""
    calls, recorder = [], object.__new__(static_step.Recorder)
    recorder._stream, recorder._pool = "stream", (0, 1)

    def end(device: int, pool: tuple) -> None:
        calls.append((device, pool))
        if told:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    class Graph(contextlib.nullcontext):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__()

    for name, value in (("CUDAGraph", object), ("graph", Graph), ("current_device", lambda: 3)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)

    def compute() -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(compute)
    assert calls == [(3, (0, 1)), "before"]
    assert recorder.record(lambda: "logits")[1] == "logits" and calls[2:] == ["before"]


def test_rows_leave_by_buckets(captures):
    model, widths = build("llama"), []
    prompts = [[token, token + 1] for token in range(5, 18)]
    model.register_forward_pre_hook(lambda _, args, kw: widths.append(len(kw["input_ids"])), with_kwargs=True)
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 12, 12])
    decode_static(model, prompts, 0, 12, [], greedy, lambda rows, ids: ids.shape[1] >= lengths[rows])
    # All are read; 16 hold 13; after 3, 6 and 9 tokens 10, 7 and 4 are open. Each bucket warms up and is recorded.
    assert widths == [13, 16, 16, 12, 12, 8, 8, 4, 4] and len(captures) == 4
    assert decode_static(model, prompts, 0, 12, [], greedy, lambda rows, ids: ids.shape[1] >= lengths[rows]) == [
        row[:length]
        for row, length in zip(decode_batch(model, prompts, 0, 12, [], greedy), lengths.tolist(), strict=True)
    ]


def lengths_of(lengths: list[int]):
    """Make what ends each text after so many tokens."""
    limits = torch.tensor(lengths)
    return lambda rows, ids: ids.shape[1] >= limits[rows]


def count_rows(model) -> list[int]:
    """Rows of every pass from now on."""
    widths = []
    model.register_forward_pre_hook(lambda _, args, kw: widths.append(len(kw["input_ids"])), with_kwargs=True)
    return widths


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("architecture", REFILLED)
def test_waiting_prompts_take_the_rows_of_finished_texts(architecture, replayed, request):
    """Later prompts need a longer cache than the first ones, and a row writes more tokens than there are positions."""
    positions = {"gpt2": {"n_positions": 33}}  # fewer than the 48 columns of the longest cache
    model = build(architecture, attn_implementation="sdpa", **(MIXTURES | positions).get(architecture, {}))
    tapes = request.getfixturevalue("captures") if replayed else None
    prompts, limits = sorted(PROMPTS * 2, key=len) + [[30 + row] * row for row in range(1, 8)], [20, 1, 3, 16, 2, 7]
    limits = lengths_of([*limits, 26, 6, 4, 11, 9, 26, 5, 1, 13, 8, 26, 10, 2])
    plain, expected = (decode_batch(model, prompts, 0, 26, [], greedy, stop) for stop in (None, limits))
    ends = [plain[0][3], plain[4][9]]
    by_ends, widths = decode_batch(model, prompts, 0, 26, ends, greedy), count_rows(model)
    for at_once in (4,) if replayed else (1, 5):
        widths.clear()
        assert decode_static(model, prompts, 0, 26, [], greedy, limits, at_once) == expected
        assert decode_static(model, prompts, 0, 26, ends, greedy, None, at_once) == by_ends
        assert max(widths) == bucket(at_once)
    assert not replayed or 2 <= len(tapes) <= 8  # of 1 to 4 rows, in 32 and in 48 columns
    assert decode_static(model, prompts, 0, 1, [], greedy, None, 4) == [row[:1] for row in plain]


def test_passes_of_a_refill_by_hand():
    model = build("llama")
    prompts, limits = [[token, token + 1] for token in range(5, 13)], [2, 12, 3, 12, 2, 3, 5, 4]
    widths = count_rows(model)
    first, rest = (
        decode_static(model, prompts[chosen], 0, 12, [], greedy, lengths_of(limits[chosen]))
        for chosen in (slice(4), slice(4, 8))
    )
    # Four are read. After three tokens two are open, to the end. Of the others two are open after three tokens.
    assert widths == [4, 4, 4, *[2] * 9, 4, 4, 4, *[2] * 3]
    widths.clear()
    assert decode_static(model, prompts, 0, 12, [], greedy, lengths_of(limits), 4) == first + rest
    # After three and after six tokens two rows are free, and two prompts are read after the pass of the others.
    assert widths == [4, 4, 4, 4, 2, 4, 4, 4, 2, *[4] * 5]


def test_an_encoder_decoder_is_not_refilled(monkeypatch):
    monkeypatch.setattr(generation, "STATIC_DEVICES", {"cpu"})
    sizes = []

    def decode(model, prompts, *args, at_once):
        sizes.append((len(prompts), at_once))
        return decode_static(model, prompts, *args, at_once=at_once)

    monkeypatch.setattr(generation, "decode_static", decode)
    for architecture, expected in (("llama", [(6, 2)]), ("t5", [(2, 2)] * 3), ("bart", [(2, 2)] * 3)):
        model = build(architecture)
        generate(model, Tokenizer, PROMPTS, Decoding(4), 2)
        assert sizes == expected and supports_refill(model) == (architecture == "llama")
        sizes.clear()
    monkeypatch.setattr(generation, "WAITING_BATCHES", 2)  # what waits is bounded
    generate(build("llama"), Tokenizer, PROMPTS, Decoding(4), 2)
    assert sizes == [(4, 2), (2, 2)]


def test_a_replay_that_differs_is_not_used(captures, monkeypatch, capsys):
    def replay(tape: Tape) -> None:
        for *_, new, made in tape.calls:
            for tensor in made:
                if tensor.is_floating_point() and all(new):
                    tensor.add_(1)

    monkeypatch.setattr(Tape, "replay", replay)
    model = build("llama")
    assert decode_static(model, PROMPTS, 0, 9, [2], greedy) == decode_batch(model, PROMPTS, 0, 9, [2], greedy)
    [line] = capsys.readouterr().err.splitlines()
    assert "a replay gives other logits" in line


def test_buckets_and_order_by_hand():
    sizes = [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [bucket(rows) for rows in range(1, 14)] == sizes and bucket(64) == 64 and bucket(65) == 96
    assert open_first([False, True, False, True, False]) == [0, 4, 2]
    assert open_first([True, True]) == [] and open_first([True, False]) == [1] and open_first([False] * 2) == [0, 1]


@pytest.mark.parametrize("architecture", ["bloom", "mamba"])
def test_other_states_are_left_to_transformers(architecture):
    assert not supports_static_decode(build(architecture))


@pytest.mark.parametrize("architecture", WINDOWS)
def test_texts_within_the_window_are_decoded_with_static_shapes(architecture, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "STATIC_DEVICES", {"cpu"})
    monkeypatch.setattr(generation, "eos_token_ids", lambda *_: [2])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model, used = build(architecture, sliding_window=16), []
    monkeypatch.setattr(
        generation, "decode_static", lambda *given, **more: used.append(1) or decode_static(*given, **more)
    )
    longest = max(map(len, PROMPTS))
    for limit, is_static in ((16 - longest, True), (17 - longest, False)):
        used.clear()
        written = generate(model, tokenizer, PROMPTS, Decoding(limit), 4)
        assert bool(used) == is_static
        assert written == decode_batch(model, PROMPTS, 0, limit, [2], greedy)


def test_other_attention_is_left_to_the_decode_loop():
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    assert not supports_static_decode(model)


def test_nothing_is_kept_of_a_model_that_is_gone_or_of_a_batch_too_large(monkeypatch):
    model = build("llama")
    decode_static(model, PROMPTS, 0, 4, [2], greedy)

    def fail(*inputs):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(StaticStep, "compute", fail)
        decode_static(model, PROMPTS, 0, 4, [2], greedy)
    assert not static._MEMORIES
    with monkeypatch.context() as patch:
        patch.setattr(static, "_is_small", lambda memory: memory.num_bytes != 2 * 2 * 6 * 2 * 16 * 8 * 4)
        decode_static(model, PROMPTS, 0, 4, [2], greedy)
    assert not static._MEMORIES  # two layers, keys and values of 6 rows, 2 heads, 16 columns, 8 numbers of 4 bytes
    decode_static(model, PROMPTS, 0, 4, [2], greedy)
    assert len(static._MEMORIES) == 1
    del model
    gc.collect()
    assert not static._MEMORIES
