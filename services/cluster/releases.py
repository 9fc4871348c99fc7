"""Which release is meant: the one that is named, or the only one."""

from __future__ import annotations

from services.cluster.objects import Cluster, ClusterError


def find_release(cluster: Cluster, name: str | None) -> str:
    """ClusterError names those there are."""
    releases = sorted({workload.release for workload in cluster.workloads() if workload.release})
    where = f"in namespace {cluster.namespace}"
    if not releases:
        raise ClusterError(f"no release {where}; `-n NAMESPACE` looks elsewhere, `helm ls -A` lists all")
    if name is None and len(releases) > 1:
        raise ClusterError(f"{len(releases)} releases {where}; name one of {', '.join(releases)}")
    if name is not None and name not in releases:
        raise ClusterError(f"no release {name!r} {where}; there is {', '.join(releases)}")
    return name or releases[0]
