"""The ICBHI score: `scores` is plain numpy, `icbhi_score` the same as a metric of the `evaluate` library."""
