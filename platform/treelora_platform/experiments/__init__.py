"""What MLflow remembers of many runs: compared, drawn, and turned into the next run. No MLflow in here."""
