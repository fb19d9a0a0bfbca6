"""Clusters: the local one on this machine, and those that run already."""

from infra.cluster_access import ClusterAccess
from infra.find_cluster import find_cluster
from infra.local_cluster import LocalCluster

__all__ = ["ClusterAccess", "LocalCluster", "find_cluster"]
