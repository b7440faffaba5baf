"""Readers of image layouts: each gives classes, places and lazily loaded bytes; none decodes."""
