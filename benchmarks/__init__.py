"""What is measured: ``python -m benchmarks`` (``make bench``). No test is timed."""
