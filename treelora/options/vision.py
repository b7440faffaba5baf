"""Settings of streams of images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from treelora.options import Options


class VisionOptions(Options):
    """How image classifiers learn a stream."""

    mask: Literal["local", "seen"] = Field(
        "local",
        description="Classes that a training image is told apart from: its task's, which leaves the head's rows for "
        "earlier classes alone, or all seen so far.",
    )
    crop_area: float = Field(
        1.0, gt=0, le=1, description="Smallest share of a training image that a random crop keeps; 1: no crops."
    )
    flip: bool = Field(False, description="Mirror training images at random.")
    align: bool = Field(
        False,
        description="After each task, train the head for all seen classes on features drawn from a Gaussian a class; "
        "`joint` and `ncm` have nothing to align.",
    )
    align_epochs: int = Field(10, ge=1, description="Passes over the drawn features.")
    align_rows: int = Field(256, ge=1, description="Features drawn a class and epoch.")
    align_learning_rate: float = Field(1e-3, gt=0, description="Adam's, falling to 0 as a cosine.")
