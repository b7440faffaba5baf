"""Readers of foreign data sets, one file a layout; ``treelora.data.sources`` lists them."""
