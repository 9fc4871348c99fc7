"""The learner pod: takes in rollouts, trains on them, publishes weights and keeps checkpoints."""
