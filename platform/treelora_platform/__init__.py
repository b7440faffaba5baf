"""Ray, DeepSpeed and MLflow around `treelora`."""
