"""From text to token ids: the prompt's template, the boundary to the answer, and what ends an answer.

Prompt and answer are tokenised apart, so that the answer's tokens are the same whatever stands before it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treelora.errors import ConfigError, DataError

PLACEHOLDER = "{prompt}"
_PROBE = "ANSWERPROBE"

# transformers' tokenizer classes share no public type that covers both the fast and the Python ones.
Tokenizer = Any


@dataclass(frozen=True)
class PromptStyle:
    """How a prompt is shown to the model.

    ``template`` is "chat" (the tokenizer's own chat template, with ``system`` as system prompt where given),
    "plain" (the prompt as it is) or any text that contains "{prompt}" once. Raises ConfigError otherwise.
    """

    template: str = "plain"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.template not in ("chat", "plain") and self.template.count(PLACEHOLDER) != 1:
            raise ConfigError(
                f"prompt template {self.template!r}: use 'chat', 'plain' or a text with {PLACEHOLDER} once"
            )
        if self.system is not None and self.template != "chat":
            raise ConfigError(f"a system prompt needs the 'chat' template, not {self.template!r}")


@dataclass(frozen=True)
class Frame:
    """A style resolved for one tokenizer: the texts around a prompt and an answer, and the ids around both.

    head_ids: kept when a long prompt is cut (BOS, system prompt, role). end_ids: what ends an answer.
    answer_prefix None: a space, unless the prompt ends in white space.
    """

    before: str
    after: str
    head_ids: tuple[int, ...]
    bos_ids: tuple[int, ...]
    answer_prefix: str | None
    end_ids: tuple[int, ...]

    def prompt_text(self, prompt: str) -> str:
        """The prompt inside its template."""
        return f"{self.before}{prompt}{self.after}"

    def answer_text(self, prompt_text: str, answer: str) -> str:
        """The answer with what separates it from the prompt."""
        if self.answer_prefix is not None:
            return self.answer_prefix + answer
        return answer if prompt_text[-1:].isspace() else f" {answer}"


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens, padding or truncation."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False)
    return [list(ids) for ids in encoded["input_ids"]]


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on after another one.

    SentencePiece tokenizers put a space before whatever they are given; behind an anchor they don't.
    """
    anchor, whole, alone = encode(tokenizer, ["\n", f"\n{text}", text])
    return whole[len(anchor) :] if anchor and whole[: len(anchor)] == anchor else alone


def _chat(tokenizer: Tokenizer, messages: list[dict[str, str]], *, generate: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))


def _chat_frame(tokenizer: Tokenizer, style: PromptStyle) -> Frame:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template; set the prompt template to 'plain' or to a text")
    messages = [{"role": "user", "content": _PROBE}]
    if style.system is not None:
        messages.insert(0, {"role": "system", "content": style.system})
    opened = _chat(tokenizer, messages, generate=True)
    if opened.count(_PROBE) != 1:
        raise ConfigError("the tokenizer's chat template doesn't show the user's message once; use 'plain'")
    before, after = opened.split(_PROBE)
    closed = _chat(tokenizer, [*messages, {"role": "assistant", "content": _PROBE}], generate=False)
    prefix, end_ids = "", _eos(tokenizer)
    # A template that renders the finished turn unlike the open one tells nothing: then EOS ends the answer.
    if closed.startswith(opened) and _PROBE in (rest := closed[len(opened) :]):
        prefix, suffix = rest.split(_PROBE, 1)
        suffix_ids = encode(tokenizer, [suffix])[0]
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        end_ids = tuple(suffix_ids[:1]) if suffix_ids and suffix_ids[0] in special else end_ids
    head_ids = tuple(encode(tokenizer, [before])[0]) if before else ()
    return Frame(before, after, head_ids, (), prefix, end_ids)


def _eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token; set eos_token")
    return (int(tokenizer.eos_token_id),)


def resolve_frame(tokenizer: Tokenizer, style: PromptStyle) -> Frame:
    """The texts and ids that a style puts around every prompt and answer of one tokenizer."""
    if style.template == "chat":
        return _chat_frame(tokenizer, style)
    before, after = ("", "") if style.template == "plain" else style.template.split(PLACEHOLDER)
    bos = tokenizer.bos_token_id
    bos_ids = (int(bos),) if bos is not None and bos in tokenizer("")["input_ids"] else ()
    head_ids = (*bos_ids, *(encode(tokenizer, [before])[0] if before else ()))
    return Frame(before, after, head_ids, bos_ids, None, _eos(tokenizer))


def cut_left(ids: list[int], head_ids: Sequence[int], room: int) -> list[int]:
    """At most ``room`` ids: the head (where it leaves room for as much again) and the end of the rest."""
    if len(ids) <= room:
        return ids
    head = list(head_ids) if 2 * len(head_ids) <= room and ids[: len(head_ids)] == list(head_ids) else []
    return head + ids[len(ids) - (room - len(head)) :]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of everything in a tokenizer that decides the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = backend.to_str()
        # Truncation and padding come first; whoever called the tokenizer last left them, ``encode`` overrides
        # both. Parsing megabytes of JSON to drop them would cost more than all the rest.
        state = state[max(state.find('"added_tokens"'), 0) :]
    else:
        state = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256((json.dumps(special) + state).encode("utf-8", "surrogatepass")).hexdigest()


def answer_with_end(tokenizer: Tokenizer, frame: Frame, prompt_text: str, answer: str) -> list[int]:
    """Ids of an answer and of what ends it; DataError for an answer of no tokens."""
    ids = encode_continuation(tokenizer, frame.answer_text(prompt_text, answer))
    if not ids:
        raise DataError(f"answer {answer!r} has no tokens in this tokenizer")
    return [*ids, *frame.end_ids]
