"""The actor pod: plays environments with the newest policy and pushes rollouts to the learners."""
