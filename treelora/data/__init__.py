"""Tasks, streams, their Parquet schema, readers and generators."""
