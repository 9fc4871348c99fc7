"""The tests: unit/ mirrors services/, integration/ starts real processes and sockets."""
