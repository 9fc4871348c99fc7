"""The evaluator pod: plays whole episodes with the newest weights and reports what they are worth."""
