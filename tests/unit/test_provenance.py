"""Workers that don't run the same software are named."""

from treelora_platform.provenance import differing, versions


def test_nothing_is_said_of_equals():
    assert differing([versions(), versions()]) == []


def test_what_differs_is_said_with_the_ranks():
    found = [{"torch": "2.13.0", "ray": "2.60.0"}, {"torch": "2.12.0", "ray": "2.60.0"}, {"torch": "2.13.0"}]
    assert differing(found) == [
        "torch differs between workers: 2.13.0 on rank 0, 2; 2.12.0 on rank 1",
        "ray differs between workers: 2.60.0 on rank 0, 1; unknown on rank 2",
    ]
