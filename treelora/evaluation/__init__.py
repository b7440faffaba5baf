"""Scores of a model on tasks, and what they amount to over a stream."""
