"""What does the coordinator ask of the Ray cluster it lives in, and what does it tell it? Nothing of a run is here.

Who has no Ray puts something with the same answers in its place (`benchmarks/faults/bare.py`).
"""

from __future__ import annotations

import ray
from ray.autoscaler.sdk import request_resources

from concertina.elastic.placement import NodeCapacity
from infra.draining import draining_nodes
from infra.probe import Targets

__all__ = ["RayCluster"]


class RayCluster:
    """`address` is this node's, `home` its id: the coordinator's node, and that of Ray's head."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        self.address: str = ray.util.get_node_ip_address()
        self.home: str = context.get_node_id()
        self.name: str = context.gcs_address

    def nodes(self) -> list[NodeCapacity]:
        """What the living nodes have."""
        free = ray._private.state.available_resources_per_node()
        return [
            NodeCapacity(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                free_cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
                free_gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
                total_cpus=node["Resources"].get("CPU", 0.0),
                total_gpus=node["Resources"].get("GPU", 0.0),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def raylets(self) -> Targets:
        """Where something listens on every living node."""
        return {n["NodeID"]: (n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes() if n["Alive"]}

    def draining(self) -> dict[str, float | None]:
        """Nodes that are drained, with the seconds that are left; None where nobody said."""
        return draining_nodes()

    def request(self, bundles: list[dict[str, float]]) -> None:
        """Tell the autoscaler, if there is one, what shall be there in all, in place of what it was told before."""
        request_resources(bundles=bundles)
