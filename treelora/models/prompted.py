"""Prompts in place of LoRA: a frozen vision transformer that reads learnt tokens, or learnt keys and values.

`Prompted` offers what the rest of the code asks of a peft model, so that "the adapter" of engines, banks and
checkpoints is the prompts' tensors. Which prompts a row gets is said by keys: the cosine of each with the row's query,
the class token that the model without prompts gives. Prompts before the tokens have no position of their own, and the
head then reads the mean of what comes out at their places; prompts of layers are keys and values, put before a layer's
own behind their projections, and the head reads the class token. A prompt whose key is zero hasn't come yet.

Shapes: B rows, M prompts, N prompts a row, L length of a prompt, D hidden size, T tokens, C classes, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora.adapters import ADAPTER, PROMPTS, fresh_head, seed_of
from treelora.errors import ConfigError

KINDS = ("vit", "deit")
ATTENTION = "treelora_prefix"


@dataclass(frozen=True)
class PromptSpec:
    """What prompts there are."""

    size: int
    """Prompts to choose from."""
    length: int
    layers: tuple[int, ...] = ()
    """Layers, from 0, where the chosen prompts stand as keys and values; none: before the tokens of the first."""
    top: int = 1
    """Prompts that a row gets."""
    keyed: bool = True
    """Whether keys choose; else a row gets the first."""
    staged: bool = False
    """Whether prompts come one by one, and training rows get the newest."""
    general_length: int = 0
    general_layers: tuple[int, ...] = ()
    """Layers where every row gets the same prompt, besides."""

    def save_pretrained(self, folder: Path) -> None:
        """Write it beside an adapter's tensors, as peft's configurations write themselves."""
        (folder / "prompt_config.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


class PromptedOutput(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor
    """[B, C]."""
    similarity: Tensor
    """[B, N]: cosine of each row's query with the keys of the prompts that it got; N = 0 where none was asked."""


class _Held(nn.Module):
    """One tensor of prompts or keys, in a module of its own: ZeRO-3 gathers what a module owns when it is called."""

    def __init__(self, name: str, shape: Sequence[int], seed: int, staged: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tuple(shape)) if staged else fresh_prompts(name, shape, seed))


class _Rows(_Held):
    def forward(self, rows_BN: Tensor) -> Tensor:
        """The prompts at these places, [B, N, ..]."""
        return self.weight[rows_BN]


class _Keys(_Held):
    def forward(self, query_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines [B, M], and which keys [M] aren't zero."""
        with torch.autocast(query_BD.device.type, enabled=False):  # in bfloat16 close keys would be taken for equal
            cosines_BM = F.normalize(query_BD, dim=1) @ F.normalize(self.weight, dim=1).T
        return cosines_BM, self.weight.detach().any(dim=1)


class Prompted(nn.Module):
    """A frozen classifier of transformers with prompts, and a head beside them; both float32.

    Raises:
        ConfigError: the model isn't a ViT or DeiT of transformers, or lacks a layer.
    """

    def __init__(self, base: Any, spec: PromptSpec, seed: int, method: str = "prompts"):
        super().__init__()
        kind = getattr(base.config, "model_type", type(base).__name__)
        if kind not in KINDS:
            raise ConfigError(
                f"method {method} puts prompts into transformers' ViT and DeiT, and this model is of kind {kind!r}; "
                "choose such a model, or a method that trains LoRA"
            )
        depth, width = base.config.num_hidden_layers, base.config.hidden_size
        if wrong := [layer for layer in (*spec.layers, *spec.general_layers) if layer >= depth]:
            raise ConfigError(f"section {method}: there is no layer {wrong[0]}; the model's are 0 to {depth - 1}")
        self.base, self.spec, self._off = base, spec, False
        self.peft_config = {ADAPTER: spec}
        """What is saved beside the tensors, found where peft has it."""
        self.prompts = nn.ModuleDict()
        if spec.keyed:
            self.prompts["key"] = _Keys(f"{PROMPTS}key", (spec.size, width), seed, spec.staged)
        if not spec.layers:
            self.prompts["tokens"] = _Rows(f"{PROMPTS}tokens", (spec.size, spec.length, width), seed, spec.staged)
        for layer in spec.layers:
            name = f"layer{layer}"
            self.prompts[name] = _Rows(PROMPTS + name, (spec.size, 2, spec.length, width), seed, spec.staged)
        for layer in spec.general_layers:
            name = f"general{layer}"
            self.prompts[name] = _Rows(PROMPTS + name, (1, 2, spec.general_length, width), seed, False)
        self.head = nn.Linear(width, base.config.num_labels)
        for name, parameter in self.head.named_parameters():
            parameter.data = fresh_head(f"head.{name}", parameter.shape, seed)
        if spec.layers or spec.general_layers:
            _attend_to_prefixes(base)

    @property
    def passed_through(self) -> nn.Module:
        """What runs once a pass, the query's included."""
        encoder: nn.Module = getattr(self.base, self.base.base_model_prefix)
        return encoder

    def get_base_model(self) -> Any:
        """The frozen classifier."""
        return self.base

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Without prompts; the head stays."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def forward(self, pixel_values: Tensor) -> PromptedOutput:
        """Classify images."""
        if self._off:
            first_BD = self._encode(pixel_values)[:, 0]
            return PromptedOutput(self.head(first_BD.float()), first_BD.new_zeros(len(first_BD), 0))
        rows_BN, similarity_BN = self._choose(pixel_values)
        attentions = [layer.attention for layer in self.passed_through.layers]  # type: ignore[union-attr]
        prefixes = {
            attentions[layer]: self.prompts[f"layer{layer}"](rows_BN).transpose(1, 2).flatten(2, 3)
            for layer in self.spec.layers
        }
        for layer in self.spec.general_layers:
            general_B12LD = self.prompts[f"general{layer}"](torch.zeros_like(rows_BN[:, :1]))
            prefixes[attentions[layer]] = general_B12LD.transpose(1, 2).flatten(2, 3)
        if self.spec.layers:
            features_BD = self._encode(pixel_values, prefixes)[:, 0]
        else:
            tokens_BLD = self.prompts["tokens"](rows_BN).flatten(1, 2)
            features_BD = self._encode(pixel_values, prefixes, tokens_BLD)[:, : tokens_BLD.shape[1]].mean(dim=1)
        # engines want a gradient for every weight that is trained, also where the loss has no use for the keys
        logits_BC = self.head(features_BD.float()) + 0.0 * similarity_BN.sum()
        return PromptedOutput(logits_BC, similarity_BN)

    def _choose(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Places [B, N] of each row's prompts, the likeliest first, and the cosines with their keys."""
        if not self.spec.keyed:
            rows_BN = torch.zeros(len(pixel_values), 1, dtype=torch.int64, device=pixel_values.device)
            return rows_BN, torch.zeros(rows_BN.shape, device=rows_BN.device)
        training = self.base.training
        self.base.eval()
        with torch.no_grad():
            query_BD = self._encode(pixel_values)[:, 0].float()
        self.base.train(training)
        similarity_BM, known_M = self.prompts["key"](query_BD)
        if self.spec.staged and self.training:
            places_M = torch.arange(len(known_M), device=known_M.device)
            newest = torch.where(known_M, places_M, 0).amax()
            rows_BN = newest.expand(len(similarity_BM), 1)
        else:
            ranked_BM = similarity_BM.detach().masked_fill(~known_M, -2.0)
            rows_BN = ranked_BM.sort(dim=1, descending=True, stable=True).indices[:, : self.spec.top]
        return rows_BN, similarity_BM.gather(1, rows_BN)

    def _encode(
        self, pixel_values: Tensor, prefixes: Mapping[nn.Module, Tensor] | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """Last hidden state [B, tokens, D], the prompts' first."""
        encoder: Any = self.passed_through
        given = {"prefixes": prefixes} if prefixes else {}
        if tokens is None:
            return encoder(pixel_values, **given).last_hidden_state
        handle = encoder.embeddings.register_forward_hook(
            lambda _, __, embedded_BTD: torch.cat([tokens.to(embedded_BTD.dtype), embedded_BTD], dim=1)
        )
        try:
            return encoder(pixel_values, **given).last_hidden_state
        finally:
            handle.remove()


def fresh_prompts(name: str, shape: Sequence[int], seed: int, first: int = 0) -> Tensor:
    """Where prompts and keys start: uniform within 1/sqrt(D); each from a seed of its own, however many there are.

    Args:
        name: Of the tensor.
        shape: [prompts, .., D].
        seed: Of the run.
        first: Place of the first of these prompts.
    """
    bound = shape[-1] ** -0.5
    generators = (torch.Generator().manual_seed(seed_of(f"{name}/{first + row}", seed)) for row in range(shape[0]))
    return torch.stack([torch.empty(tuple(shape[1:])).uniform_(-bound, bound, generator=g) for g in generators])


def _attend_to_prefixes(base: Any) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    base.set_attn_implementation(ATTENTION)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefixes: Mapping[nn.Module, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers, all [B, H, T, D / H]; prefixes: keys and values [B, 2, L, D] a module."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if prefixes and module in prefixes:
        b, h, _, d = key.shape
        prefix = prefixes[module].to(key.dtype).view(b, 2, -1, h, d).transpose(2, 3)
        key, value = torch.cat([prefix[:, 0], key], dim=2), torch.cat([prefix[:, 1], value], dim=2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
