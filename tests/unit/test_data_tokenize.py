"""Token caches: the boundary between prompt and answer, cutting on the left, and safe caching."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from treelora.data import Example, SplitMeta, Task, open_task, write_split
from treelora.data.prompting import PromptStyle, cut_left, resolve_frame, tokenizer_fingerprint
from treelora.data.tokenize import TokenizedRows, tokenize_split
from treelora.errors import ConfigError, DataError

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<eos>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]


def bytes_tokenizer(bos: bool = False) -> Any:
    """One token a byte, as GPT-2's kind without merges: ids are easy to read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<bos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        pad_token="<eos>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT,
    )


def metaspace_tokenizer() -> Any:
    """SentencePiece's kind: puts a space before whatever it is given."""
    words = ["<unk>", "<eos>", "▁", "▁red", "▁blue", "▁say", "<0x0A>", "r", "red"]
    core = Tokenizer(models.BPE(vocab=WORDPIECES, merges=MERGES, unk_token="<unk>"))
    assert set(words) - {"<0x0A>"} <= set(WORDPIECES)
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


_PIECES = [
    "<unk>",
    "<eos>",
    "\n",
    "▁",
    *"abdelrsuy",
    "re",
    "red",
    "▁red",
    "bl",
    "ue",
    "blue",
    "▁blue",
    "sa",
    "say",
    "▁say",
]
WORDPIECES = {piece: i for i, piece in enumerate(_PIECES)}
MERGES = [
    ("r", "e"),
    ("re", "d"),
    ("▁", "red"),
    ("b", "l"),
    ("u", "e"),
    ("bl", "ue"),
    ("▁", "blue"),
    ("s", "a"),
    ("sa", "y"),
    ("▁", "say"),
]


def make_task(folder: Path, rows: list[Example], choices: tuple[str, ...] = ("red", "blue")) -> Task:
    kind, metric = ("choice", "accuracy") if choices else ("generation", "rouge_l")
    for split in ("train", "test"):
        write_split(folder / f"{split}.parquet", rows, SplitMeta("t", kind, choices, metric, split, "test"))  # type: ignore[arg-type]
    return open_task(folder)


def decoded(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))


ROWS = [Example("a", "one", "red"), Example("b", "two two", "blue"), Example("c", "three\n", "red")]


class TestStyles:
    def shown(self, tmp_path: Path, style: PromptStyle, tokenizer: Any) -> list[tuple[str, str]]:
        rows = tokenize_split(make_task(tmp_path, ROWS), "train", tokenizer, style, 200, tmp_path / "cache")
        return [
            (decoded(tokenizer, rows.prompt_ids(i)), decoded(tokenizer, rows.answer_ids(i))) for i in range(len(rows))
        ]

    def test_plain(self, tmp_path: Path) -> None:
        assert self.shown(tmp_path, PromptStyle(), bytes_tokenizer()) == [
            ("one", " red<eos>"),
            ("two two", " blue<eos>"),
            ("three\n", "red<eos>"),
        ]

    def test_plain_with_bos(self, tmp_path: Path) -> None:
        assert self.shown(tmp_path, PromptStyle(), bytes_tokenizer(bos=True))[0] == ("<bos>one", " red<eos>")

    def test_custom(self, tmp_path: Path) -> None:
        style = PromptStyle("Q: {prompt} {braces}\nA: ")
        assert self.shown(tmp_path, style, bytes_tokenizer())[0] == ("Q: one {braces}\nA: ", "red<eos>")

    def test_chat_ends_the_turn(self, tmp_path: Path) -> None:
        assert self.shown(tmp_path, PromptStyle("chat"), bytes_tokenizer())[0] == (
            "<|user|>one<|end|><|assistant|>",
            "red<|end|>",
        )

    def test_chat_with_system_prompt(self, tmp_path: Path) -> None:
        shown = self.shown(tmp_path, PromptStyle("chat", system="Be brief."), bytes_tokenizer())
        assert shown[1] == ("<|system|>Be brief.<|end|><|user|>two two<|end|><|assistant|>", "blue<|end|>")

    def test_no_double_space_from_sentencepiece(self, tmp_path: Path) -> None:
        tokenizer = metaspace_tokenizer()
        task = make_task(tmp_path, [Example("a", "say", "red"), Example("b", "say blue", "blue")])
        rows = tokenize_split(task, "train", tokenizer, PromptStyle(), 20, tmp_path / "cache")
        pieces = [tokenizer.convert_ids_to_tokens(rows.answer_ids(i).tolist()) for i in (0, 1)]
        assert pieces == [["▁red", "<eos>"], ["▁blue", "<eos>"]]

    def test_refusals(self) -> None:
        for template in ("", "no place", "{prompt} {prompt}"):
            with pytest.raises(ConfigError, match=r"\{prompt\} once"):
                PromptStyle(template)
        with pytest.raises(ConfigError, match="system prompt needs"):
            PromptStyle("plain", system="x")
        bare = bytes_tokenizer()
        bare.chat_template = None
        with pytest.raises(ConfigError, match="no chat template"):
            resolve_frame(bare, PromptStyle("chat"))


class TestRows:
    def test_choices_and_labels(self, tmp_path: Path) -> None:
        tokenizer = bytes_tokenizer()
        rows = tokenize_split(make_task(tmp_path, ROWS), "train", tokenizer, PromptStyle(), 50, tmp_path)
        assert [rows.label(i) for i in range(3)] == [0, 1, 0]
        for i in range(3):
            assert rows.choice_ids(i)[rows.label(i)].tolist() == rows.answer_ids(i).tolist()
        assert [decoded(tokenizer, c) for c in rows.choice_ids(1)] == [" red<eos>", " blue<eos>"]
        assert rows.lengths.tolist() == [3 + 5, 7 + 6, 6 + 4]
        assert (rows.row_id(2), len(rows), rows.truncated, rows.skipped) == ("c", 3, 0, {})
        prompt, answer = rows.pairs([1])[0]
        assert (prompt.dtype.name, answer.dtype.name, prompt.flags.writeable) == ("int32", "int32", False)
        with pytest.raises(IndexError, match="row 3 of 3"):
            rows.prompt_ids(3)

    def test_generation_has_none(self, tmp_path: Path) -> None:
        task = make_task(tmp_path, [Example("a", "one", "some words")], ())
        rows = tokenize_split(task, "train", bytes_tokenizer(), PromptStyle(), 50, tmp_path)
        assert (rows.choice_ids(0), rows.label(0)) == ([], -1)

    def test_equal_choices_are_refused(self, tmp_path: Path) -> None:
        tokenizer = metaspace_tokenizer()
        task = make_task(tmp_path, [Example("a", "say", "q")], ("q", "z"))  # both unknown, both "<unk>"
        with pytest.raises(DataError, match=r"row 'a': choices 'q' and 'z' have the same tokens"):
            tokenize_split(task, "train", tokenizer, PromptStyle(), 20, tmp_path)


class TestTruncation:
    def test_left_and_counted(self, tmp_path: Path) -> None:
        tokenizer = bytes_tokenizer()
        task = make_task(tmp_path, [Example("a", "0123456789", "red"), Example("b", "01", "red")])
        rows = tokenize_split(task, "train", tokenizer, PromptStyle(), 10, tmp_path)
        # " blue<eos>" is the longest choice with 6 tokens, so 4 are left for the prompt.
        assert [decoded(tokenizer, rows.prompt_ids(i)) for i in (0, 1)] == ["6789", "01"]
        assert decoded(tokenizer, rows.answer_ids(0)) == " red<eos>"
        assert rows.truncated == 1
        with pytest.raises(DataError, match="1 of 2 prompts don't fit into max_length 10"):
            tokenize_split(task, "train", tokenizer, PromptStyle(), 10, tmp_path, refuse_long=True)
        tokenize_split(task, "train", tokenizer, PromptStyle(), 16, tmp_path, refuse_long=True)

    def test_chat_keeps_its_head(self, tmp_path: Path) -> None:
        tokenizer = bytes_tokenizer()
        task = make_task(tmp_path, [Example("a", "0123456789", "red")])
        rows = tokenize_split(task, "train", tokenizer, PromptStyle("chat"), 11, tmp_path)
        assert decoded(tokenizer, rows.prompt_ids(0)) == "<|user|>789<|end|><|assistant|>"

    def test_answer_that_cannot_fit_names_its_row(self, tmp_path: Path) -> None:
        task = make_task(tmp_path, [Example("a", "one", "red")])
        with pytest.raises(DataError, match=r"row 'a': its answer \(or a choice\) has 6 tokens, max_length is 6"):
            tokenize_split(task, "train", bytes_tokenizer(), PromptStyle(), 6, tmp_path)
        with pytest.raises(ConfigError, match="max_length is 1"):
            tokenize_split(task, "train", bytes_tokenizer(), PromptStyle(), 1, tmp_path)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 10), st.integers(1, 40))
    def test_cut_left(self, ids: list[int], head_size: int, room: int) -> None:
        head = ids[:head_size]
        kept = cut_left(ids, head, room)
        assert len(kept) == min(len(ids), room)
        if len(ids) <= room:
            assert kept == ids
        elif 2 * len(head) <= room:
            assert kept == head + ids[len(ids) - (room - len(head)) :]
        else:
            assert kept == ids[-room:]


class TestCache:
    def test_second_call_reads_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        task, tokenizer = make_task(tmp_path, ROWS), bytes_tokenizer()
        first = tokenize_split(task, "train", tokenizer, PromptStyle(), 50, tmp_path / "c")
        monkeypatch.setattr(Task, "read", lambda *_: pytest.fail("tokenised again"))
        second = tokenize_split(task, "train", tokenizer, PromptStyle(), 50, tmp_path / "c")
        assert second.path == first.path
        assert second.prompt_ids(1).tolist() == first.prompt_ids(1).tolist()

    def test_key_follows_everything_that_matters(self, tmp_path: Path) -> None:
        task, other = make_task(tmp_path / "1", ROWS), make_task(tmp_path / "2", ROWS[:2])
        tokenizer, bos = bytes_tokenizer(), bytes_tokenizer(bos=True)
        calls = [
            (task, tokenizer, PromptStyle(), 50),
            (other, tokenizer, PromptStyle(), 50),
            (task, bos, PromptStyle(), 50),
            (task, tokenizer, PromptStyle("chat"), 50),
            (task, tokenizer, PromptStyle("chat", "Hi."), 50),
            (task, tokenizer, PromptStyle(), 49),
        ]
        keys = {tokenize_split(t, "train", tok, style, n, tmp_path).key for t, tok, style, n in calls}
        assert len(keys) == len(calls)
        tokenizer(["a", "long text"], padding=True, truncation=True, max_length=3)
        assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(bytes_tokenizer())

    def test_damage_is_found_and_mended(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        task, tokenizer = make_task(tmp_path, ROWS), bytes_tokenizer()
        rows = tokenize_split(task, "train", tokenizer, PromptStyle(), 50, tmp_path / "c")
        expected, path = rows.prompt_ids(1).tolist(), rows.path
        payload = path.read_bytes()
        for damaged in (payload[:-1], payload[:100], b"", payload[:500] + b"\x00" + payload[501:] + b"!"):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="checksum differs"):
                TokenizedRows.open(path)
            again = tokenize_split(task, "train", tokenizer, PromptStyle(), 50, tmp_path / "c")
            assert again.prompt_ids(1).tolist() == expected
        assert caplog.text.count("tokenising again") == 4
        assert path.read_bytes() == payload

    def test_any_arrow_reader_reads_it(self, tmp_path: Path) -> None:
        rows = tokenize_split(make_task(tmp_path, ROWS), "train", bytes_tokenizer(), PromptStyle(), 50, tmp_path)
        table = pa.ipc.open_stream(rows.path.read_bytes()).read_all()
        assert table["id"].to_pylist() == ["a", "b", "c"]
        assert table["answer_ids"].to_pylist()[1] == rows.answer_ids(1).tolist()

    def test_concurrent_writers(self, tmp_path: Path) -> None:
        task = make_task(tmp_path, ROWS * 1)
        cache = tmp_path / "c"
        with ThreadPoolExecutor(8) as pool:
            jobs = [
                pool.submit(tokenize_split, task, "train", bytes_tokenizer(), PromptStyle(), 50, cache)
                for _ in range(16)
            ]
            assert {tuple(job.result().prompt_ids(1).tolist()) for job in jobs} == {
                tuple(jobs[0].result().prompt_ids(1).tolist())
            }
        assert [path.suffix for path in cache.iterdir()] == [".arrow"]
