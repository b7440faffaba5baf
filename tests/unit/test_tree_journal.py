"""The journal's format: what was written is read back to the bit, what was damaged is seen."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support.tree_calls import RUN, digest, make_stream, plain
from treelora.errors import CheckpointError
from treelora.memory import StepCall, TaskMemory
from treelora_platform.tree_journal import (
    BeginTask,
    EndTask,
    Header,
    JournalWriter,
    Term,
    _framed,
    apply,
    decode,
    encode,
    read_journal,
)

HEADER = Header(3, Term((2, 1), "c", 4), 10, "ab" * 32, continues=True)
PAYLOADS = [encode(StepCall("r", "t", step, np.arange(4) / 7)) for step in range(1, 6)]


def journal(path, payloads=PAYLOADS):
    path.write_bytes(HEADER.encoded())
    writer = JournalWriter(path)
    for number, payload in enumerate(payloads, start=HEADER.number + 1):
        writer.append(number, payload)
    writer.close()
    return path


floats = hnp.arrays(st.sampled_from([np.float32, np.float64]), hnp.array_shapes(max_dims=2, max_side=4))
texts = st.text(st.characters(codec=None), max_size=8)


@given(texts, texts, st.integers(0, 2**40), st.none() | floats)
def test_a_step_comes_back_to_the_bit(run, task, step, observation):
    call = decode(encode(StepCall(run, task, step, observation)))
    assert (call.run, call.task, call.step) == (run, task, step)
    if observation is None:
        assert call.observation is None
    else:
        assert call.observation.dtype == observation.dtype
        assert call.observation.shape == observation.shape
        assert call.observation.tobytes() == observation.tobytes()


@given(texts, floats, st.floats(allow_nan=False), st.integers(1, 10**9))
def test_begin_and_end_come_back(task, sketch, mass, horizon):
    begin = decode(encode(BeginTask(task, horizon)))
    assert (begin.task, begin.horizon) == (task, horizon)
    end = decode(encode(EndTask(task, sketch, mass)))
    assert (end.task, end.mass) == (task, mass)
    assert end.sketch.tobytes() == sketch.astype(np.float32).tobytes()


@pytest.mark.parametrize("kind", [np.float16, np.int64, ">f8"])
def test_other_numbers_are_kept_as_doubles(kind):
    seen = np.array([0, 3, 7]).astype(kind)
    assert decode(encode(StepCall("r", "t", 2, seen))).observation.tolist() == [0.0, 3.0, 7.0]


@pytest.mark.parametrize("settings", [{}, {"search": "full"}, {"noise": "pooled"}, {"max_arms": 2, "search": "random"}])
def test_what_is_read_back_makes_the_same_memory(settings):
    stream = make_stream(seed=5, **settings)
    memory = TaskMemory(stream.config, RUN)
    for call, answer in zip(stream.calls, stream.answers, strict=True):
        assert plain(apply(memory, decode(encode(call)))) == answer
    assert digest(memory.state_dict()) == stream.states[-1]


def test_a_journal_comes_back(tmp_path):
    path = journal(tmp_path / "j")
    found = read_journal(path)
    assert found.header == HEADER
    assert found.payloads == tuple(PAYLOADS)
    assert (found.last, found.whole, found.dropped) == (15, path.stat().st_size, 0)


def test_every_cut_leaves_a_prefix_and_counts_what_is_dropped(tmp_path):
    data = journal(tmp_path / "j").read_bytes()
    ends = [len(HEADER.encoded())]
    for payload in PAYLOADS:
        ends.append(ends[-1] + 20 + len(payload))
    assert ends[-1] == len(data)
    path = tmp_path / "cut"
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        if cut < ends[0]:
            with pytest.raises(CheckpointError, match="no header"):
                read_journal(path)
            continue
        whole = max(end for end in ends if end <= cut)
        found = read_journal(path)
        assert (found.whole, found.dropped) == (whole, cut - whole)
        assert found.payloads == tuple(PAYLOADS[: ends.index(whole)])


def test_every_flipped_byte_is_damage_or_drops_the_last_record(tmp_path):
    data = journal(tmp_path / "j").read_bytes()
    last = len(data) - 20 - len(PAYLOADS[-1])
    path = tmp_path / "flipped"
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 + place % 255)]) + data[place + 1 :])
        if place < last:
            with pytest.raises(CheckpointError, match="whole records behind it"):
                read_journal(path)
        else:
            found = read_journal(path)
            assert found.payloads == tuple(PAYLOADS[:-1])
            assert found.dropped == len(data) - last


def test_a_record_taken_out_or_doubled_is_damage(tmp_path):
    data = journal(tmp_path / "j").read_bytes()
    begin, size = len(HEADER.encoded()), 20 + len(PAYLOADS[0])
    for altered in (data[:begin] + data[begin + size :], data[: begin + size] + data[begin:]):
        (tmp_path / "altered").write_bytes(altered)
        with pytest.raises(CheckpointError, match="aren't numbered 10, 11"):
            read_journal(tmp_path / "altered")


def test_a_missing_journal_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"00000001\.journal: No such file"):
        read_journal(tmp_path / "00000001.journal")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]\n",
        b"nonsense\n",
        b"[" * 100_000 + b"\n",
        b'{"call": "reset", "task": "t"}\n',
        b'{"call": "step", "run": "r", "task": "t", "step": true}\n',
        b'{"call": "step", "run": "r", "task": 7, "step": 1}\n',
        b'{"call": "begin_task", "task": "t", "horizon": 1.5}\n',
        b'{"call": "end_task", "task": "t", "mass": 1}\n',
        b'{"call": "step", "run": "r", "task": "t", "step": 1, "dtype": "O", "shape": [1]}\n12345678',
        b'{"call": "step", "run": "r", "task": "t", "step": 1, "dtype": "<f4", "shape": [3]}\n12345678',
        b'{"call": "step", "run": "r", "task": "t", "step": 1, "dtype": "<f4", "shape": "x"}\n12345678',
    ],
)
def test_what_no_call_looks_like_is_refused(payload):
    with pytest.raises(CheckpointError, match="can't be read"):
        decode(payload)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "call": st.sampled_from(["begin_task", "step", "end_task"]) | json_values,
        **dict.fromkeys(("task", "run", "step", "horizon", "mass", "shape"), json_values),
        "dtype": st.sampled_from(["<f4", "<f8", "O", "V8"]) | json_values,
    },
)


@given(st.binary(max_size=60) | st.tuples(fields, st.binary(max_size=16)))
def test_any_payload_gives_a_call_or_our_error(raw):
    payload = raw if isinstance(raw, bytes) else json.dumps(raw[0]).encode() + b"\n" + raw[1]
    try:
        call = decode(payload)
    except CheckpointError:
        return
    assert isinstance(call, BeginTask | StepCall | EndTask)


terms = st.fixed_dictionaries(
    {"attempt": st.lists(st.integers() | json_values, max_size=2), "client": json_values, "opening": json_values}
)
headers = st.fixed_dictionaries(
    {
        "format": st.just(1) | json_values,
        "term": terms | json_values,
        "generation": st.integers() | json_values,
        "number": st.integers(0, 9) | json_values,
        "snapshot": st.text(max_size=4) | json_values,
        "continues": st.booleans() | json_values,
    }
)


@given(st.binary(max_size=200), st.booleans(), headers | json_values)
def test_any_file_gives_a_journal_or_our_error(tmp_path_factory, tail, headed, header):
    path = tmp_path_factory.mktemp("fuzz") / "j"
    path.write_bytes((HEADER.encoded() if headed else _framed(0, json.dumps(header).encode())) + tail)
    try:
        found = read_journal(path)
    except CheckpointError:
        return
    assert found.whole + found.dropped == path.stat().st_size
