"""The configuration: what it refuses and how it says so, overrides, round trips, and its digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from treelora.errors import ConfigError
from treelora.methods import METHODS
from treelora.options.tree import PRESETS, Preset
from treelora_platform.config import (
    ACCUMULATING,
    ExperimentConfig,
    MethodName,
    json_schema,
    load_config,
    parse_config,
)
from treelora_platform.recipes import FOLDER, recipe_path

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml"))


def refusal(plain: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(plain, origin="my.yaml")
    return str(caught.value)


def from_text(folder: Path, text: str, overrides: list[str] | None = None) -> ExperimentConfig:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"lorra": {}}, "my.yaml: lorra: no such key; did you mean 'lora'?"),
        ({"lora": {"rnak": 4}}, "my.yaml: lora.rnak: no such key; did you mean 'rank'?"),
        ({"extensions": [{"pth": "x"}]}, "my.yaml: extensions.0.pth: no such key; did you mean 'path'?"),
        (
            {"checkpoint": {"zzz": 1}},
            "my.yaml: checkpoint.zzz: no such key; known here: every_steps, keep",
        ),
        ({"lora": {"rank": "big"}}, "my.yaml: lora.rank: Input should be a valid integer, unable to parse "),
        ({"lora": {"rank": 2.5}}, "(found 2.5)"),
        ({"lora": 3}, "my.yaml: lora: Input should be a valid dictionary or instance of LoraSettings (found 3)"),
        ({"lora": {"rank": 0}}, "my.yaml: lora.rank: Input should be greater than or equal to 1 (found 0)"),
        ({"method": "magic"}, "'hidelora', 'hideprompt', 'l2p' or 'dualprompt' (found 'magic')"),
        (
            {"train": {"steps": 1, "learning_rate": float("inf")}},
            "train.learning_rate: Input should be a finite number",
        ),
        ({"train": {"steps": 1, "learning_rate": float("nan")}}, "train.learning_rate: Input should be "),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (found -1)"),
        ({"name": ""}, "name: String should have at least 1 character"),
        ({"stream": {"options": {"day": {1, 2}}}}, "stream.options.day"),
    ],
)
def test_a_fault_is_named_with_key_value_and_remedy(plain: dict[str, Any], message: str) -> None:
    text = refusal(plain)
    assert message in text
    assert "\n" not in text


def test_all_faults_are_told_at_once() -> None:
    lines = refusal({"lora": {"rank": 0, "alpha": -1}, "sed": 3}).splitlines()
    assert lines[0] == "my.yaml:"
    assert [line.split(":")[0] for line in lines[1:]] == ["  lora.rank", "  lora.alpha", "  sed"]


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"stream": {"order": ["a", "b", "a"]}}, "stream.order: names 'a' more than once"),
        ({"stream": {"source": "trace"}}, "stream: source 'trace' needs `path`"),
        ({"model": {"template": "fancy"}}, "model.template: is neither `chat` nor `plain`"),
        ({"treelora": {"penalty": "soft"}}, "treelora: penalty 'soft' compares gradients in training"),
        ({"treelora": {"penalty": "sign", "signature": "adapter_value"}}, "set signature to gradient"),
        ({"train": {}}, "train: give exactly one of `epochs`, `steps`, `epochs_by_task`; found none"),
        ({"train": {"steps": 3, "epochs": 1}}, "found epochs and steps"),
        ({"engine": {"offload_weights": True}}, "engine: offload_weights needs zero_stage 3, not 2"),
        ({"engine": {"offload_optimizer": True, "zero_stage": 0}}, "offload_optimizer needs zero_stage 1, 2 or 3"),
        ({"train": {"steps": 1, "global_batch": 6}, "cluster": {"workers": 4}}, "make it a multiple of 4"),
        (
            {"train": {"steps": 1, "global_batch": 6, "accumulation": 2}, "cluster": {"workers": 2}},
            "make it a multiple of 4",
        ),
        ({"engine": {"kind": "torch"}, "cluster": {"workers": 2}}, "set cluster.workers to 1, not 2"),
        ({"cluster": {"workers": 2, "gpus_per_worker": 0.5}}, "set workers to 1, or gpus_per_worker to 1"),
        ({"cluster": {"workers": 2, "min_workers": 3}}, "min_workers 3 is more than workers 2; lower it"),
        ({"cluster": {"gpus_per_worker": 2}}, "less than or equal to 1"),
        (
            {"train": {"epochs_by_task": [1, 2]}, "stream": {"order": ["a"]}},
            "train.epochs_by_task has 2 numbers for 1 tasks",
        ),
        ({"evaluation": {"in_context_examples": 2}}, "in_context_examples is for method frozen, not treelora"),
        ({"evaluation": {"modes": []}}, "evaluation.modes"),
    ],
)
def test_impossible_combinations_are_refused(plain: dict[str, Any], message: str) -> None:
    assert message in refusal(plain)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.learning_rate=1e-4", lambda c: c.train.learning_rate, 1e-4),
        ("train.learning_rate=5E-3", lambda c: c.train.learning_rate, 5e-3),
        ("lora.rank=16", lambda c: c.lora.rank, 16),
        ("lora.layers=[0, 2]", lambda c: c.lora.layers, (0, 2)),
        ("stream.order=[b,a]", lambda c: c.stream.order, ("b", "a")),
        ("stream.train_rows=", lambda c: c.stream.train_rows, None),
        ("tracking.tags.team=blue", lambda c: c.tracking.tags, {"team": "blue"}),
        ("name=x=y", lambda c: c.name, "x=y"),
        ("treelora={search: full}", lambda c: c.treelora.search, "full"),
    ],
)
def test_overrides(override: str, read: Any, value: Any, tmp_path: Path) -> None:
    assert read(from_text(tmp_path, "stream: {train_rows: 3}\ntrain: {steps: 1}\n", [override])) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank", "override 'lora.rank': write key=value"),
        ("=3", "write key=value"),
        ("name.first=x", "'name' holds 'run', not a section"),
        ("lora.rank=[1", "the value is not YAML"),
        ("lora.rank=!!int x", "the value is not YAML"),
        ("lora.rank=2001-99-99", "the value is not YAML"),
        ("lora..rank=1", "no such key"),
    ],
)
def test_wrong_overrides(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(tmp_path, "name: run", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("a: 2001-99-99", "is not YAML"),
        ("a: !!bool maybe", "is not YAML"),
        ("a: !!timestamp soon", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("- 1\n- 2", "holds a list"),
        ("just words", "holds a str"),
        ("1: 2", "Keys should be strings"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml") as caught:
        from_text(tmp_path, text)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "latin.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert from_text(tmp_path, "") == ExperimentConfig()


def test_frozen() -> None:
    config = ExperimentConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.lora.rank = 3  # type: ignore[misc]


FULL = {
    "name": "ein Lauf – 試験",
    "seed": 7,
    "stream": {
        "source": "csv",
        "path": "~/x y.csv",
        "order": ["a", "1e5"],
        "options": {"answer": "1e5", "n": [1, None]},
    },
    "extensions": [{"source": "jsonl", "path": "b", "order": ["yes"]}],
    "train": {"epochs_by_task": [0.5, 3], "learning_rate": 1e-5},
    "tracking": {"tags": {"on": "no", "x": "1e5"}},
    "lora": {"layers": [1, 2]},
}


@pytest.mark.parametrize("plain", [{}, FULL])
def test_yaml_round_trip(plain: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(plain)
    again = from_text(tmp_path, config.as_yaml())
    assert again == config
    assert again.digest() == config.digest()
    assert parse_config(json.loads(json.dumps(config.as_dict()))) == config


def test_digest_is_of_what_determines_the_result() -> None:
    base = ExperimentConfig()
    for free in (
        {"output_dir": "/else"},
        {"tracking": {"experiment": "x"}},
        {"name": "n"},
        {"checkpoint": {"keep": 9}},
        {"cluster": {"max_failures": 9, "min_workers": 1, "wait_seconds": 0, "stall_seconds": None}},
    ):
        assert parse_config(free).digest() == base.digest()
    binding = [{"seed": 1}, {"train": {"steps": 16, "learning_rate": 1e-9}}, {"method": "joint"}, {"lora": {"rank": 9}}]
    assert len({base.digest(), *(parse_config(plain).digest() for plain in binding)}) == 5


def test_the_lasting_digest_is_of_what_differs_from_the_defaults() -> None:
    plain: dict[str, Any] = {"stream": {"source": "olora", "path": "/here"}, "lora": {"rank": 9}}
    base = parse_config(plain | {"treelora": {"guard": None}})
    for same in (
        {"stream": {"source": "olora", "path": "/there"}},
        {"lora": {"rank": 9, "alpha": 32.0}},  # the default
        {"name": "n", "output_dir": "/else", "cluster": {"max_failures": 9}},
        {"ewc": {"strength": 9.0}},  # of another method
        {"model": {"dtype": "bfloat16"}},  # the default before `auto`
    ):
        assert parse_config(base.as_dict() | same).lasting_digest() == base.lasting_digest()
    others: list[dict[str, Any]] = [{"lora": {"rank": 8}}, {"lora": {"rank": 9, "alpha": 31.0}}, {"seed": 1}]
    others += [{"method": "joint"}, {"model": {"dtype": "float32"}}]
    assert len({base.lasting_digest(), *(parse_config(base.as_dict() | o).lasting_digest() for o in others)}) == 6
    # what is kept on disk is found by it: it must not change
    assert base.lasting_digest()[:12] == "fab48f05c66a"
    # what a preset fills in counts as if it had been given
    guarded = parse_config(plain).lasting_digest()
    assert guarded == parse_config(plain | {"treelora": {"guard": 1e5}}).lasting_digest() != base.lasting_digest()


def test_flat_keys() -> None:
    flat = parse_config(FULL).flat()
    assert flat["train.learning_rate"] == 1e-5
    assert flat["stream.order"] == ["a", "1e5"]
    assert flat["tracking.tags.on"] == "no"
    assert parse_config({}).flat()["tracking.tags"] == {}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_schema_and_can_be_run(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), json_schema())
    assert load_config(path).name
    assert recipe_path(path.stem) == FOLDER / path.name


def test_the_schema_refuses_what_we_refuse() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    for wrong in ({"lorra": 1}, {"lora": {"rank": 0}}, {"method": "magic"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, json_schema())


KEYS = st.sampled_from(
    ["lora", "rank", "stream", "order", "extensions", "train", "steps", "name", "options", "zz", "0"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4)
)


@given(text=st.text() | TREES.map(lambda tree: yaml.safe_dump(tree)), overrides=st.lists(st.text(), max_size=2))
def test_garbage_is_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, overrides: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(path, overrides)
    except ConfigError:
        return
    assert parse_config(config.as_dict()) == config


@given(tree=st.dictionaries(KEYS, TREES, max_size=4))
def test_garbage_in_known_places(tree: dict[str, Any]) -> None:
    try:
        config = parse_config(tree)
    except ConfigError:
        return
    assert parse_config(config.as_dict()) == config
    assert len(config.digest()) == 64


def test_the_methods_are_those_of_the_library() -> None:
    assert set(get_args(MethodName)) == METHODS.keys()
    assert {name for name, method in METHODS.items() if method.accumulates} == ACCUMULATING
    sections = ExperimentConfig.model_fields
    without = {"sequential", "frozen", "joint", "slao", "ncm"}
    assert {name for name in METHODS if name not in sections} == without


@pytest.mark.parametrize("name", sorted(ACCUMULATING))
def test_weight_decay_would_shrink_what_accumulating_methods_have_learnt(name: str) -> None:
    text = refusal({"method": name, "train": {"steps": 1, "weight_decay": 0.1}})
    assert f"train.weight_decay 0.1 would shrink what method {name} has learnt before; set it to 0" in text


@pytest.mark.parametrize("preset", get_args(Preset))
def test_presets_fill_in_what_is_not_given_and_survive_a_round_trip(preset: str) -> None:
    section = {"preset": preset, "sketch_size": 32}
    config = parse_config({"treelora": section})
    given = config.treelora.model_dump()
    assert {key: given[key] for key in PRESETS[preset]} == PRESETS[preset]  # type: ignore[index]
    assert given["sketch_size"] == 32
    assert parse_config(yaml.safe_load(config.as_yaml())) == config
    changed = parse_config({"treelora": section | {"strength": 0.77}}).treelora
    assert changed.strength == 0.77


def test_a_preset_of_the_wrong_kind_is_refused() -> None:
    assert "treelora.preset" in refusal({"treelora": {"preset": ["plus"]}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"penalty": "exact"}, "set signature to gradient or query, not probe_b"),
        ({"start": "tree_node", "signature": "gradient"}, "set signature to probe_b, not gradient"),
        ({"search": "official"}, "they go together; set preset to official"),
        ({"preset": "official", "signature": "query"}, "they go together; set preset to official"),
        ({"preset": "official", "budget_mib": 1}, "merges nothing"),
        ({"inference": "merged"}, "treelora.inference merged isn't among evaluation.modes ('last', 'routed')"),
    ],
)
def test_axes_that_do_not_fit_are_refused(section: dict[str, Any], message: str) -> None:
    assert message in refusal({"treelora": section})


def test_other_methods_settings_do_not_change_a_runs_identity() -> None:
    plain, other = parse_config({"method": "ewc"}), parse_config({"method": "ewc", "treelora": {"strength": 9}})
    assert plain.digest() == other.digest()
    assert plain.digest() != parse_config({"method": "ewc", "ewc": {"strength": 9}}).digest()


@pytest.mark.parametrize(
    "changes", [{"method": "gem"}, {"treelora": {"signature": "gradient", "penalty": "soft"}}], ids=["gem", "soft"]
)
def test_methods_that_change_gradients_do_not_offload_the_optimizer(changes: dict[str, Any]) -> None:
    assert "clips by the norm that gradients had before" in refusal(changes | {"engine": {"offload_optimizer": True}})
    parse_config({"engine": {"offload_optimizer": True}})  # the default's pull acts on the adapter


@pytest.mark.parametrize("uri", ["http://ada:hunter2@mlflow:5000", "postgresql://ada@db/mlflow"])
def test_credentials_are_refused_where_they_would_be_recorded(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: has a user or password in it.*MLFLOW_TRACKING_URI") as error:
        parse_config({"tracking": {"uri": uri}})
    assert "ada" not in str(error.value)


def test_secrets_among_the_importers_options_are_refused() -> None:
    stream = {"source": "hf", "path": "x", "options": {"storage": {"secret": "hunter2"}, "columns": {"prompt": "text"}}}
    with pytest.raises(ConfigError, match=r"stream\.options: 'secret' looks like a secret") as error:
        parse_config({"stream": stream})
    assert "hunter2" not in str(error.value)
    parse_config({"stream": {"source": "csv", "path": "x", "options": {"max_tokens": 3, "columns": {"prompt": "a"}}}})
