"""scikit-learn's digits: 1,797 real images of 8 x 8 pixels, packaged with it; nothing is downloaded.

Test set of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998
(https://archive.ics.uci.edu/dataset/80).
"""

import numpy as np
import numpy.typing as npt

from treelora.data.images.sources.common import (
    ImageRow,
    RawImages,
    RawSplit,
    array_png,
    loaders,
    split_by_share,
    test_share,
)
from treelora.data.importers.common import Options

_LEVELS = 16


def to_bytes(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Grey levels 0..16 as 0..255: 16 per level, clipped, so that 16 is white."""
    return np.clip(values * _LEVELS, 0, 255).astype(np.uint8)


def read(path: str, options: Options) -> RawImages:
    """Ten classes, "0" to "9"; the path means nothing. Options: test_share (0.3), split_seed (0)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = to_bytes(bunch.images)
    rows = [
        ImageRow(f"digits[{index}]", f"digit-{index:04}", str(int(label))) for index, label in enumerate(bunch.target)
    ]
    whole = RawSplit(rows, lambda wanted: loaders(wanted, lambda index: array_png(images[index])))
    return RawImages("digits", split_by_share(whole, *test_share(options, 0.3)), {"classes_per_task": 2})
