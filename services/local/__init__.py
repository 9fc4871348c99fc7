"""A whole run on this machine: parameter server, learner and actors as processes that talk over ipc.

``train`` is where reading starts: it prepares the directory (``run_dir``), decides what to start (``plan``)
and lets the ``launcher`` keep each process (``pod``) alive, while ``display`` shows how it goes. The pods are
known only from outside: command line, exit code, /metrics. In a cluster Kubernetes does all this.
"""
