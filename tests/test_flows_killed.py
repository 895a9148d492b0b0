"""Flow runs of a board hit at random moments: the stage, its DVC, the flow run, the worker or the board is killed.

`TOUCHLINE_KILLS` is how often each of them is, by each signal; test_flows.py and test_board.py do it once for each.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import boards
import psutil
import pytest
from losses import champion, lost, torn, unmake
from projects import STAGES, Project, built, copy

from touchline.core.paths import Paths
from touchline.core.stage import costs

KILLS = int(os.environ.get("TOUCHLINE_KILLS", "0"))
VICTIMS = ("stage", "DVC", "flow run", "worker", "board")
SECONDS_OF_FLOW = 2.0  # from a stage's end to what DVC and Prefect do about it

pytestmark = pytest.mark.skipif(not KILLS, reason="takes minutes: `make faults` runs it")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return built(tmp_path_factory).project


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, undisturbed: Project) -> Iterator[boards.Board]:
    project = copy(undisturbed, tmp_path_factory.mktemp("flows under fire") / "the project")
    board = boards.Board(project)
    yield board
    board.down()


@pytest.fixture
def board(shared: boards.Board) -> boards.Board:
    shared.up()
    return shared


def victim_of(board: boards.Board, name: str, dvc: psutil.Process, flow: psutil.Process) -> psutil.Process:
    match name:
        case "stage":
            stages = [process for command, process in board.at_work().items() if "/touchline " in command]
            return next(iter(stages), dvc)
        case "DVC":
            return dvc
        case "flow run":
            return flow
        case "worker":
            return board.process_of("worker start")
    return psutil.Process(board.process.pid)


def kill_at_random(board: boards.Board, victim: str, number: signal.Signals, chance: random.Random) -> str | None:
    """Have a flow run make one stage anew and hit the victim meanwhile: what happened, None if all was over before."""
    stage = chance.choice(STAGES)
    unmake(board.project, stage)
    flow_run = board.start_run("pipeline", {"push": False})

    def dvcs() -> list[psutil.Process]:
        return [process for command, process in board.at_work().items() if "/dvc " in command and stage in command]

    boards.wait_for(dvcs, 180)
    dvc = dvcs()[0]
    flow = dvc.parent()
    paths = Paths(board.project.root, board.project.root)
    time.sleep(chance.uniform(0, costs(paths)[stage]["seconds"] + SECONDS_OF_FLOW))
    hit = False
    with suppress(psutil.NoSuchProcess):
        process = victim_of(board, victim, dvc, flow)
        hit = process.is_running() and board.state(flow_run)["type"] == "RUNNING"
        if hit:
            process.send_signal(number)
    if hit and victim == "board":
        board.process.wait(120)
        board.up()
    ended = board.finished(flow_run)["type"]
    return f"{number.name} to the {victim} in {stage}, which ended {ended}" if hit else None


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", VICTIMS)
def test_whatever_of_a_flow_run_is_killed_the_next_one_makes_it_good(
    board: boards.Board, undisturbed: Project, victim: str, record_property: Callable[[str, Any], None]
) -> None:
    for name in ("SIGKILL", "SIGTERM"):
        chance, losses, recovered = random.Random(f"{victim} {name}"), [], []
        kills = 0
        for _ in range(3 * KILLS):
            if kills == KILLS:
                break
            told = kill_at_random(board, victim, signal.Signals[name], chance)
            if told is None:
                continue
            kills += 1
            boards.wait_for(lambda: not board.at_work(), 60)
            losses += [f"{told}: {file} is torn" for file in torn(board.project)]
            if (found := champion(board.project)) is None or not found[1]:
                losses.append(f"{told}: no champion before the next run")
            began = time.monotonic()
            flow_run = board.start_run("pipeline", {"push": False})
            after = board.finished(flow_run)
            recovered.append(round(time.monotonic() - began, 1))
            if after["type"] != "COMPLETED":
                losses.append(f"{told}: {after['message']}")
            losses += [f"{told}: {each}" for each in lost(board.project, undisturbed)]
        record_property("kills", json.dumps({
            "stage": f"under Prefect: {victim}", "signal": name, "kills": kills, "losses": len(losses),
            "recovered": recovered,
        }))  # fmt: skip
        assert not losses
        assert kills == KILLS
