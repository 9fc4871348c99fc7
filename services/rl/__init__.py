"""The mathematics of learning and the environments it learns in: numpy and torch, never zmq."""
