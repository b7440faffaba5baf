"""The benchmarks that start Ray, at tiny sizes: nothing lost, nothing doubled, all sides equal. No times."""

from benchmarks import tree_actor, tree_actor_clients


def test_the_actor_makes_every_call_once(capsys):
    found = tree_actor.main(["--layers", "3", "--sketch", "4", "--tasks", "4", "30", "--rounds", "2", "--calls", "8"])
    for one, tasks in zip(found, (4, 30), strict=True):
        assert (one.tasks, one.calls) == (tasks, (18, 18))
        assert {name: len(taken) for name, taken in one.seconds.items()} == {
            **dict.fromkeys(tree_actor.SIDES, 16),
            "ahead": 2,
        }
        assert list(one.between) == ["opening", "a task's end", "the next one's begin"]
        assert 0 <= one.resident["shared"] < one.resident["resident"] <= one.resident["peak"]
    assert "memory alone" in capsys.readouterr().out


def test_clients_lose_and_double_nothing(capsys):
    options = ["--layers", "3", "--warm", "0.2", "--seconds", "1.5", "--twice", "5"]
    one, many = tree_actor_clients.main(["--clients", "1", "12", *options])
    for found, clients in ((one, 1), (many, 12)):
        assert (found.clients, found.lost, found.doubled, found.wrong) == (clients, 0, 0, 0)
        assert found.calls >= clients
        assert found.calls // 5 - clients <= found.sent_twice <= found.calls // 5 + clients
        assert 0 < found.p50 <= found.p99 <= found.longest
        assert 0 < found.jain <= 1
        assert found.served[0] <= found.rate * 1.5 / clients + 1e-9 <= found.served[1] + 1e-9
    assert one.sent_twice == one.calls // 5 > 0
    assert "Jain" in capsys.readouterr().out
