"""A release on Kubernetes, looked at from outside: `impala status`, `impala wait`, `impala metrics`.

``commands`` is where reading starts. ``api`` asks the cluster and answers in ``objects``; ``observer`` reads
the metrics of pods again and again; ``overview`` works out what there is to know; ``picture`` shows it.
"""
