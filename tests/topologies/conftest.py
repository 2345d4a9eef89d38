"""Two nodes that all tests here share; each module brings its pods and takes them away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.cluster import Cluster


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    made = Cluster.start("nodes")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Without pods; without policies and pods again afterwards."""
    yield shared_cluster
    shared_cluster.clear_policies()
    for pod in list(shared_cluster.pods):
        shared_cluster.remove_pod(pod)
    shared_cluster.settled()
