"""Runs on clusters whose nodes share no folder: run folders kept in S3 or whatever else `pyarrow.fs` opens."""
