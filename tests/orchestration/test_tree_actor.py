"""The tree actor is killed at the worst moments; the workers get the answers of a memory that never died."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.mortal_keeper import MortalKeeper, learn, plan_death, whole
from tests.support.tree_calls import plain, unit_sketch
from treelora.errors import DataError, LostError
from treelora.local_memory import LocalMemory
from treelora.memory import MemoryConfig, ProtocolError
from treelora_platform.sketch_transfer import hand_over
from treelora_platform.tree_actor import FOLDER, TreeClient, launch_tree_actor

CONFIG = MemoryConfig(layers=5, sketch_size=8, noise="pooled", max_arms=4)
TASKS, STEPS, KILLS = 5, 40, 6
SKETCH = unit_sketch(np.random.default_rng(0), CONFIG)
CALLS_A_TASK = STEPS + 3  # begin, one step more than are taken, end


@pytest.fixture(scope="module")
def uninterrupted() -> list[Any]:
    return learn(LocalMemory(CONFIG, "run"), CONFIG, TASKS, STEPS)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    from treelora_platform.cluster import connect
    from treelora_platform.config import ExperimentConfig

    connect(ExperimentConfig())
    yield
    import ray

    ray.shutdown()


class Site:
    """An actor with its folder, clients of it, and what they were told."""

    def __init__(self, base: Path) -> None:
        self.name, self.folder = base.name, base / FOLDER
        self.told: list[str] = []
        self.actor = launch_tree_actor(self.name, self.folder, MortalKeeper)

    def client(self, **settings: Any) -> TreeClient:
        return TreeClient(self.name, CONFIG, "run", notice=self.told.append, **settings)

    def strike(self, number: int = signal.SIGKILL) -> None:
        import ray

        os.kill(ray.get(self.actor.pid.remote()), number)

    def end(self) -> None:
        """For good; `ray.kill` returns before that is done."""
        import ray
        from ray.exceptions import RayActorError

        ray.kill(self.actor)
        with suppress(RayActorError):
            while True:
                ray.get(self.actor.pid.remote())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    import ray

    made = Site(tmp_path)
    yield made
    ray.kill(made.actor)


def test_kills_at_random_moments_change_no_answer(site: Site, uninterrupted: list[Any]) -> None:
    moments: list[str] = []
    learn(LocalMemory(CONFIG, "run"), CONFIG, TASKS, STEPS, moments.append)
    seed = random.randrange(10**6)
    rng, part = random.Random(seed), len(moments) // KILLS
    chosen = {rng.choice(moments[part * number : part * (number + 1) - 4]) for number in range(KILLS)}

    def strike(moment: str) -> None:
        if moment in chosen:
            site.strike()

    client = site.client()
    answers = learn(client, CONFIG, TASKS, STEPS, strike)
    assert answers == uninterrupted, f"seed {seed}, killed at {sorted(chosen)}"
    assert client.line.restarts == len(site.told) == KILLS
    print("\n".join(site.told))


# operations of a step: write, fsync; of `end_task` also: write and fsync twice, rename twice, fsync, unlink
@pytest.mark.parametrize(
    ("number", "operation", "part"),
    [
        pytest.param(CALLS_A_TASK + 9, 0, 0.6, id="a torn record"),
        pytest.param(CALLS_A_TASK + 9, 99, 0.0, id="before a step's reply"),
        pytest.param(2 * CALLS_A_TASK, 3, 0.0, id="in the middle of a snapshot"),
        pytest.param(2 * CALLS_A_TASK, 7, 0.0, id="between a snapshot's names"),
        pytest.param(2 * CALLS_A_TASK, 99, 0.0, id="before end_task's reply"),
    ],
)
def test_a_kill_at_a_chosen_moment_changes_no_answer(site: Site, number: int, operation: int, part: float) -> None:
    client = site.client()
    plan_death(site.folder, number, operation, part)
    assert learn(client, CONFIG, 3, STEPS) == learn(LocalMemory(CONFIG, "run"), CONFIG, 3, STEPS)
    (story,) = site.told
    assert ("of an unfinished record were dropped" in story) == (part > 0)
    assert "died around" in story


def test_a_call_that_always_kills_the_actor_is_given_up_and_named(site: Site) -> None:
    client = site.client()
    plan_death(site.folder, number=4, operation=0, always=True)
    with pytest.raises(LostError, match=r"^actor tree-.* died 3 times in a row during step 3 of 'task 0'$"):
        learn(client, CONFIG, 1, STEPS)


@pytest.mark.slow
def test_a_hung_actor_is_ended_and_comes_back(site: Site) -> None:
    client = site.client(timeout_s=30.0)
    site.strike(signal.SIGSTOP)
    began = time.monotonic()
    assert client.begin_task("t", 5).groups == ()
    assert time.monotonic() - began >= 10.0
    assert client.line.restarts == 1


def test_an_actor_that_is_gone_is_said_at_once(site: Site) -> None:
    client = site.client()
    client.begin_task("t", 5)
    site.end()
    client.submit(1, None)
    with pytest.raises(LostError, match=r"actor tree-.* is gone; it was wanted for step 1 of 't'"):
        client.collect()
    with pytest.raises(LostError, match="is gone; it was wanted for its first call"):
        site.client()


def test_its_own_errors_arrive_as_they_are(site: Site) -> None:
    client = site.client()
    with pytest.raises(ProtocolError, match=r"^end_task\('t'\): expected begin_task\('t'\)$"):
        client.end_task("t", SKETCH, 1.0)
    with pytest.raises(DataError, match=r"^task 't': mass = -1.0"):
        client.end_task("t", SKETCH, -1.0)


def test_a_new_group_of_workers_takes_over_from_its_commit(site: Site, uninterrupted: list[Any]) -> None:
    old, local = site.client(attempt=(1, 0)), LocalMemory(CONFIG, "run")
    for memory in (old, local):
        memory.begin_task("a", 9)
        memory.end_task("a", SKETCH, 1.0)
        memory.begin_task("b", 9)
        memory.submit(1, None)
        memory.collect()
    commit = old.state_dict()
    old.submit(2, np.ones(CONFIG.layers))
    newest = sorted(site.folder.glob("*.safetensors"))[-2:]
    for path in newest:  # the storage is of no use any more, but the commit is
        path.write_bytes(b"damaged")
    site.strike()
    with pytest.raises(LostError, match=r"memory is lost: .*differs from the checksum"):
        old.past()
    new = site.client(attempt=(1, 1))
    new.load_state_dict(commit)
    with pytest.raises(LostError, match="another group of workers"):
        old.past()
    with pytest.raises(LostError, match="later group of workers"):
        site.client(attempt=(1, 0))
    site.strike()
    for memory in (new, local):
        memory.begin_task("b", 9)
        memory.submit(2, np.full(CONFIG.layers, 0.5))
    assert new.collect()[1].tobytes() == local.collect()[1].tobytes()
    assert {k: v.tolist() for k, v in new.state_dict().items()} == {
        k: v.tolist() for k, v in local.state_dict().items()
    }


WIDE = MemoryConfig(layers=30, sketch_size=64)  # 7.5 KiB a task, so that a few tasks are more than one piece


def learnt(tasks: int) -> LocalMemory:
    local, rng = LocalMemory(WIDE, "run"), np.random.default_rng(0)
    for number in range(tasks):
        local.begin_task(f"task {number}", 2)
        local.end_task(f"task {number}", unit_sketch(rng, WIDE), 1.0)
    return local


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_commit_with_many_sketches_is_handed_over(site: Site, monkeypatch: pytest.MonkeyPatch, deaths: int) -> None:
    monkeypatch.setattr("treelora_platform.sketch_transfer.PIECES", 3)
    local, strikes = learnt(40), iter([site.strike] * deaths)
    client = TreeClient(site.name, WIDE, "run", notice=site.told.append)

    def then_die(sketches: np.ndarray, send: Any) -> bool:
        done = hand_over(sketches, send)
        next(strikes, lambda: None)()
        return done

    monkeypatch.setattr("treelora_platform.tree_actor.hand_over", then_die)
    client.load_state_dict(local.state_dict())
    assert len(site.told) == deaths
    assert whole(client) == whole(local)
    for memory in (client, local):
        memory.begin_task("next", 9)
        memory.submit(1, None)
    assert plain(client.past()) == plain(local.past())
    assert [answer.tobytes() for answer in client.collect()] == [answer.tobytes() for answer in local.collect()]


def test_a_memory_whose_every_opening_is_lost_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    local, client = learnt(10), TreeClient(site.name, WIDE, "run")
    monkeypatch.setattr("treelora_platform.tree_actor.hand_over", lambda sketches, send: False)
    with pytest.raises(LostError, match=r"^actor tree-.* died 3 times in a row during opening the memory$"):
        client.load_state_dict(local.state_dict())


LOSSY = """
import json, sys, tempfile
from pathlib import Path
from tests.orchestration import test_tree_actor as here
from treelora_platform.cluster import connect
from treelora_platform.config import ExperimentConfig

connect(ExperimentConfig())
site = here.Site(Path(tempfile.mkdtemp()))
client = site.client()
lost = here.learn(client, here.CONFIG, 3, here.STEPS)
same = lost == here.learn(here.LocalMemory(here.CONFIG, "run"), here.CONFIG, 3, here.STEPS)
print(json.dumps({"same": same, "restarts": client.line.restarts}))
"""


@pytest.mark.slow
def test_lost_requests_and_replies_change_no_answer() -> None:
    """Ray itself loses a fifth of the calls on their way, and a fifth of the replies; delays shuffle its events."""
    chances = {"num_failures": 20, "req_failure_prob": 20, "resp_failure_prob": 20}
    environment = os.environ | {
        "RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": chances}),
        "RAY_testing_asio_delay_us": "CoreWorkerService.grpc_server.PushTask=0:3000",
        "PYTHONPATH": os.pathsep.join([".", "platform"]),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOSSY], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"same": True, "restarts": 0}
