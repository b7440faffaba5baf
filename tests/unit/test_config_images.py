"""Configurations of image streams: what doesn't fit is refused, and what counts where."""

from __future__ import annotations

from typing import Any

import pytest

from treelora.errors import ConfigError
from treelora.methods import METHODS
from treelora.methods.prompting import Prompting
from treelora_platform.config import IMAGE_METHODS, PROMPTING, parse_config


def refusal(plain: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_config(plain)
    return str(refused.value)


IMAGES = {"stream": {"source": "digits"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "frozen"}, "method frozen is for streams of text, and source 'digits' isn't one; .* is ncm"),
        ({"method": "lwf"}, "method lwf is for streams of text"),
        ({"train": {"steps": 4, "weight_decay": 0.1}}, "train.weight_decay 0.1 would shrink the head's rows"),
        ({"extensions": [{"source": "builtin"}]}, "a stream is of text or of images, not of both"),
        ({"stream": {"source": "digits", "classes": {"tasks": 2, "per_task": 3}}}, "found both, 2 and 3"),
        (
            {"stream": {"source": "digits", "classes": {"per_task": 1}}},
            "stream.classes.per_task: .*greater than or equal",
        ),
        ({"stream": {"source": "cub200"}}, "source 'cub200' needs `path`"),
        ({"vision": {"crop_area": 0}}, "vision.crop_area: .*greater than 0"),
    ],
)
def test_faults_of_image_streams(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(IMAGES | changes)


def test_text_has_no_nearest_class_means() -> None:
    with pytest.raises(ConfigError, match=r"method ncm is for streams of images, and source 'builtin'.*frozen"):
        parse_config({"method": "ncm"})


def test_settings_of_images_count_where_there_are_images() -> None:
    """They are neither recorded nor told apart for text, whose digests stay what they were."""
    text, images = parse_config({}), parse_config(IMAGES)
    assert not text.images
    assert images.images
    assert parse_config({"vision": {"flip": True}}).digest() == text.digest()
    assert parse_config(IMAGES | {"vision": {"flip": True}}).digest() != images.digest()
    shuffled = parse_config({"stream": {"source": "digits", "classes": {"seed": 1}}})
    assert shuffled.digest() != images.digest()
    assert "vision" not in text.in_use()
    assert "classes" not in text.in_use()["stream"]
    assert images.in_use()["stream"]["classes"]["protocol"] == "class_incremental"


def test_the_methods_that_learn_prompts_are_those_of_the_library() -> None:
    assert {name for name, method in METHODS.items() if issubclass(method, Prompting)} == PROMPTING
    assert PROMPTING <= IMAGE_METHODS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "l2p", "evaluation": {"modes": ["last", "merged"]}},
            "mode merged of evaluation.modes averages tasks' adapters, which prompts, as of method l2p, don't allow",
        ),
        ({"method": "dualprompt", "evaluation": {"router_margin": 1}}, "evaluation.router_margin averages tasks'"),
        ({"method": "l2p", "evaluation": {"forward": True}}, "which method l2p has no prompts for; set it to false"),
        ({"method": "hidelora"}, "method hidelora aligns the head after each task; set vision.align to true"),
        (
            {"method": "hideprompt", "vision": {"align": True}, "evaluation": {"modes": ["last"]}},
            "which isn't among evaluation.modes ('last',); add it there",
        ),
        ({"method": "l2p", "l2p": {"top": 11}}, "top 11 is more than the 10 prompts of the pool; lower it"),
    ],
)
def test_prompts_and_hierarchies_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal({"stream": {"source": "digits"}} | changes)


def test_hidelora_learns_text_without_a_head() -> None:
    assert parse_config({"method": "hidelora"}).method == "hidelora"
    assert "inference routed" in refusal({"method": "hidelora", "evaluation": {"modes": ["last"]}})
    assert "method l2p is for streams of images" in refusal({"method": "l2p"})
