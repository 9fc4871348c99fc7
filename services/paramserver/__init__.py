"""The parameter server: hands out versioned weights and seats. Never torch; weights are opaque bytes."""
