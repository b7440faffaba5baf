"""What is said of a key that doesn't exist names the section's own keys, however deep the section lies."""

import pytest
from pydantic import Field

from treelora.errors import ConfigError
from treelora.options import Options
from treelora_platform.settings_file import read_mapping, validated


class Leaf(Options):
    depth: int = Field(0, ge=0)
    width: int = 0


class Other(Options):
    colour: str = ""


class Root(Options):
    leaf: Leaf = Leaf()
    maybe: Leaf | None = None
    many: tuple[Leaf, ...] = ()
    named: dict[str, Leaf] = Field({})
    either: dict[str, list[int] | Other] = Field({})


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"leav": 1}, "leav: no such key; did you mean 'leaf'?"),
        ({"leaf": {"dept": 1}}, "leaf.dept: no such key; did you mean 'depth'?"),
        ({"maybe": {"widht": 1}}, "maybe.widht: no such key; did you mean 'width'?"),
        ({"many": [{}, {"x": 1}]}, "many.1.x: no such key; known here: depth, width"),
        ({"named": {"a.b": {"wide": 1}}}, "named.a.b.wide: no such key; did you mean 'width'?"),
        ({"leaf": {"depth": -1}}, "leaf.depth: Input should be greater than or equal to 0 (found -1)"),
    ],
)
def test_a_fault_in_a_section(plain, said):
    with pytest.raises(ConfigError) as refused:
        validated(Root, plain, "here")
    assert str(refused.value) == f"here: {said}"


def test_a_choice_of_a_union_is_found():
    with pytest.raises(ConfigError, match=r"either\.x\.Other\.color: no such key; did you mean 'colour'\?"):
        validated(Root, {"either": {"x": {"color": 1}}}, "here")


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError) as refused:
        validated(Root, {"leaf": {"depth": -1}, "x": 1}, "here")
    assert [line.split(":")[0].strip() for line in str(refused.value).splitlines()] == ["here", "leaf.depth", "x"]


def test_an_empty_file_has_no_keys_and_a_list_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# nothing\n")
    assert read_mapping(path, "a thing", "look there") == {}
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list; a thing is a mapping"):
        read_mapping(path, "a thing", "look there")
    with pytest.raises(ConfigError, match="there is no such file; look there"):
        read_mapping(tmp_path / "b.yaml", "a thing", "look there")
