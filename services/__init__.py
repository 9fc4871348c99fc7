"""IMPALA as services: a folder with a ``__main__.py`` is a pod, a folder without one is a library."""
