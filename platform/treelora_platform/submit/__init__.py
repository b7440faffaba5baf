"""`treelora submit` and `treelora jobs`: experiments, sweeps and comparisons as jobs of a Ray cluster."""
