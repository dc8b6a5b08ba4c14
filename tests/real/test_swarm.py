"""Nodes on shaped links pull one content together, while all is well and while it is not.

What is asserted is what left the origin and that pulls succeed, never a time: how close a run comes to the least time
its links allow is shown beside how idle the machine was, and means something only where it was idle.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig.cluster import Cluster
from rig.links import Links
from rig.scenarios import FAULTS, HEALTHY, Played, Scenario, cold_burst
from rig.swarm import KIB, MIB, Swarm

NODES = 4
SIZE = 16 * MIB
CHUNK_BYTES = 128 * KIB
LINKS = Links(up=100.0, down=100.0, origin_node=20.0)


@pytest.fixture(scope="module")
def swarm(cluster: Cluster) -> Swarm:
    return Swarm(cluster, NODES, LINKS, SIZE, CHUNK_BYTES)


@pytest.fixture
def played(swarm: Swarm, figure: Callable[[str, object], None]) -> Callable[[Scenario], Played]:
    def play(scenario: Scenario) -> Played:
        outcome = scenario(swarm, LINKS)
        shown = f"origin {outcome.run.origin_ratio():.4f}, last ÷ bound {outcome.over_bound():.3f}"
        figure(f"swarm: {outcome.name}", f"{shown}, idle {outcome.run.idle:.0%}")
        return outcome

    return play


@pytest.mark.parametrize("scenario", HEALTHY, ids=lambda scenario: scenario.__name__)
def test_each_byte_leaves_the_origin_once(played: Callable[[Scenario], Played], scenario: Scenario) -> None:
    outcome = played(scenario)
    assert outcome.failures() == []
    assert outcome.run.origin_ratio() == outcome.most, outcome.run.asked_twice()


@pytest.mark.parametrize("scenario", FAULTS, ids=lambda scenario: scenario.__name__)
def test_a_fault_fails_no_pull_and_costs_little(played: Callable[[Scenario], Played], scenario: Scenario) -> None:
    outcome = played(scenario)
    assert outcome.failures() == []
    assert outcome.run.origin_ratio() <= outcome.most, outcome.run.asked_twice()


def test_nothing_is_left_of_the_faults(played: Callable[[Scenario], Played]) -> None:
    outcome = played(cold_burst)
    assert outcome.failures() == []
    assert outcome.run.origin_ratio() == 1.0, outcome.run.asked_twice()
