"""`ncm`: nearest class mean on the features of the frozen model (see `evaluation.image_reader.NearestMeanReader`)."""

from treelora.methods.base import Method


class NearestClassMean(Method):
    """No weights change; a class is the mean of its images' features, and no class is ever forgotten."""

    name = "ncm"
    trains = False
