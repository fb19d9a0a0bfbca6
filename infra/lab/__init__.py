"""Several hosts on one Linux machine: network namespaces, links that can be cut and slowed, Ray nodes inside."""

from infra.lab.lab import Host, Lab
from infra.lab.network import LabError, Network

__all__ = ["Host", "Lab", "LabError", "Network"]
