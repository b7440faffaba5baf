"""Every recipe of jobs/configs is valid, complete and listed."""

import re
from pathlib import Path

import pytest
import yaml

from treelora.data.importers.trace import _KNOWN
from treelora_platform.config import load_config
from treelora_platform.prepare import joint_steps, steps_of
from treelora_platform.recipes import recipe_path

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
OLORA = [f"olora-order{i}-llama-3.2-1b" for i in range(1, 7)]
TRACE = [f"trace-{model}" for model in ("llama-3.2-1b", "gemma-2b", "llama-2-7b", "mistral-7b")]


def load(name):
    return load_config(CONFIGS / f"{name}.yaml")


def test_there_are_the_recipes_that_are_promised():
    assert set(NAMES) >= {"demo", "cl-benchmark-small", *OLORA, *TRACE}


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_is_named_after_its_file(name):
    config = load(name)
    assert config.name == name
    order = config.stream.order
    assert len(set(order)) == len(order)
    assert order or config.stream.source == "builtin" or config.images


@pytest.mark.parametrize("name", NAMES)
def test_its_name_alone_finds_the_packaged_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path(name).read_bytes() == (CONFIGS / f"{name}.yaml").read_bytes()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])
def test_it_begins_with_what_it_is_and_what_it_needs(name):
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith("# Needs ")
    assert not lines[2].startswith("#")


def test_the_readme_lists_each_recipe_once():
    rows = re.findall(r"^\| \[(.+?)\]\((.+?)\) \|", (CONFIGS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted((name, f"{name}.yaml") for name in NAMES)


@pytest.mark.parametrize("name", TRACE)
def test_trace_has_its_eight_tasks_and_the_papers_numbers(name):
    config = load(name)
    assert config.stream.order == tuple(_KNOWN)
    epochs = dict(zip(config.stream.order, config.train.epochs_by_task, strict=True))
    assert epochs["MeetingBank"] == epochs["20Minuten"] == 3
    assert epochs["FOMC"] == epochs["ScienceQA"] == 1
    # 500 rows a task, 32 a step: 2 epochs are 1000 rows, 31.25 steps
    assert steps_of(config, 0, 500) == {"max_steps": 32}
    assert joint_steps(config, [500] * 8) == 2 * 16 + 4 * 32 + 2 * 47
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 32, 0.1)
    assert (config.treelora.strength, config.train.learning_rate, config.train.global_batch) == (0.5, 1e-4, 32)
    assert config.engine.zero_stage == (3 if name.endswith("7b") else 2)


def test_the_models_differ_in_nothing_but_the_model_and_its_sharding():
    bare = []
    for name in TRACE:
        plain = load(name).as_dict()
        for section, key in ((plain, "name"), (plain["model"], "name"), (plain["engine"], "zero_stage")):
            del section[key]
        bare.append(plain)
    assert all(plain == bare[0] for plain in bare)


@pytest.mark.parametrize(("name", "epochs"), [("cifar100", 20), ("imagenet-r", 50), ("cub200", 50)])
def test_images_have_the_papers_numbers(name, epochs):
    config = load(f"{name}-vit-b16")
    assert (config.train.global_batch, config.train.epochs, config.train.learning_rate) == (192, epochs, 5e-3)
    assert (config.lora.rank, config.lora.layers, config.treelora.strength) == (10, (0, 1, 2, 3, 4), 0.1)
    assert (config.stream.classes.tasks, config.stream.classes.protocol) == (10, "class_incremental")
    assert (config.vision.mask, config.vision.align, config.treelora.inference) == ("local", True, "routed")


def test_the_orders_are_permutations_of_o_loras_tasks():
    short, long = (
        {"dbpedia", "amazon", "yahoo", "agnews"},
        {
            *("MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB", "yelp", "amazon", "SST-2", "dbpedia"),
            *("agnews", "MultiRC", "yahoo"),
        },
    )
    orders = [load(name).stream.order for name in OLORA]
    assert [set(order) for order in orders] == [short] * 3 + [long] * 3
    assert len(set(orders)) == 6
    assert [order[0] for order in orders] == ["dbpedia", "dbpedia", "yahoo", "MNLI", "MultiRC", "yelp"]
    assert [order[-1] for order in orders] == ["agnews", "yahoo", "dbpedia", "yahoo", "yahoo", "WiC"]


@pytest.mark.parametrize("name", [*TRACE, *OLORA, "cl-benchmark-small"])
def test_learning_rates_are_numbers_to_any_yaml_reader(name):
    # YAML 1.1 takes 1e-3 for text; pydantic mends that, other readers of the file would not
    rate = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["train"]["learning_rate"]
    assert isinstance(rate, float)
