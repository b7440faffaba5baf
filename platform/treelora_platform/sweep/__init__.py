"""Sweeps: Ray Tune over whole experiments. `spec` says what is searched, `driver` runs it."""
