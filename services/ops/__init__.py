"""How every pod is observed and stopped: metrics, logs, health, life cycle."""
