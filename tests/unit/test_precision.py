"""In which numbers the frozen weights are kept: what fits the hardware, one for all workers and for a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.streams import tiny_config
from treelora.errors import DataError
from treelora.models.spec import fitting_dtype
from treelora_platform import precision
from treelora_platform.precision import settled, settled_together, slow_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def computing_in(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """CPUs with these capabilities and no others."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **dict.fromkeys(names, True)})


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("avx512_bf16", "avx512_f"), "bfloat16"),
        (("amx_bf16",), "bfloat16"),
        (("bf16", "neon"), "bfloat16"),
        (("avx512_f", "avx512_vnni"), "float32"),
        ((), "float32"),
    ],
)
def test_a_cpu_that_multiplies_in_bfloat16_is_given_it(
    names: tuple[str, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing_in(monkeypatch, *names)
    assert fitting_dtype(CPU) == dtype
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # nothing else makes use of it
    assert fitting_dtype(CPU) == "float32"


@pytest.mark.parametrize(("supported", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_that_emulates_bfloat16_is_not_given_it(
    supported: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def is_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert fitting_dtype(GPU) == dtype
    assert asked == [False]


def test_older_torch_is_asked_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert fitting_dtype(CPU) == dtype


def test_what_is_asked_for_is_kept_to_and_what_is_slow_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computing_in(monkeypatch)
    for dtype, given in (("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        config = tiny_config(tmp_path, model={"dtype": dtype})
        assert settled(config, CPU).model == config.model.model_copy(update={"dtype": given})
        assert settled_together(config, CPU, tmp_path, rank=0).model.dtype == given
        said = slow_precision(config, CPU)
        assert (said is not None and "model.dtype bfloat16: this CPU" in said) == (dtype == "bfloat16")
    computing_in(monkeypatch, "avx512_bf16")
    assert slow_precision(tiny_config(tmp_path, model={"dtype": "bfloat16"}), CPU) is None


def test_a_run_that_goes_on_elsewhere_computes_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, model={"dtype": "auto"})
    computing_in(monkeypatch, "avx512_bf16")
    assert settled_together(config, CPU, tmp_path, rank=0).model.dtype == "bfloat16"
    computing_in(monkeypatch)
    assert settled_together(config, CPU, tmp_path, rank=0).model.dtype == "bfloat16"
    assert json.loads((tmp_path / "precision.json").read_text()) == {"dtype": "bfloat16"}
    (tmp_path / "precision.json").write_text('{"dtype": "int4"}')
    with pytest.raises(DataError, match=r"precision\.json: dtype 'int4', expected float32 or bfloat16"):
        settled_together(config, CPU, tmp_path, rank=0)


@pytest.mark.parametrize(
    ("begun", "fits", "expected"),
    [
        (None, ("bfloat16", "bfloat16"), "bfloat16"),
        (None, ("bfloat16", "float32"), "float32"),
        (None, ("float32", "bfloat16"), "float32"),
        ("bfloat16", ("float32", "float32"), "bfloat16"),
    ],
)
def test_workers_agree(
    begun: str | None, fits: tuple[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if begun:
        (tmp_path / "precision.json").write_text(json.dumps({"dtype": begun}))
    config, said = tiny_config(tmp_path, model={"dtype": "auto"}), [(begun, fits[0]), (None, fits[1])]

    def gather(into: list[Any], mine: Any) -> None:
        assert mine == said[rank]
        into[:] = said

    monkeypatch.setattr(precision.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(precision.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(precision.dist, "all_gather_object", gather)
    for rank, dtype in enumerate(fits):
        computing_in(monkeypatch, *(("avx512_bf16",) if dtype == "bfloat16" else ()))
        assert settled_together(config, CPU, tmp_path, rank).model.dtype == expected
