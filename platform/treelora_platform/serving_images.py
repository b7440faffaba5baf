"""`ImagePredictor`: what a run on images has learnt, ready to name the classes of image files in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from treelora.data.images.decode import ImageProblem, decode
from treelora.data.images.pixels import fitted
from treelora.data.task import Task
from treelora.engine import TorchEngine
from treelora.errors import DataError
from treelora.evaluation.image_reader import ImageReader, NearestMeanReader
from treelora.image_data import ImageCollator, StreamClasses, stored_side
from treelora.models.spec import DTYPES
from treelora.models.vision import image_format, processor_format
from treelora.training_data import TestSplit
from treelora_platform.assemble import evaluation_options
from treelora_platform.config import ExperimentConfig
from treelora_platform.predict_io import Prompt
from treelora_platform.serving import Learnt, Predictor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class ImagePredictor(Predictor):
    """Names the class of each image as the run's evaluator would; see `Predictor`. A prompt is the path of a file.

    Args:
        kept: What the run's reader has kept (`ImageReader.state_dict`).
    """

    def __init__(
        self,
        engine: TorchEngine,
        learnt: Learnt,
        config: ExperimentConfig,
        inference: str,
        task: int | None,
        kept: Mapping[str, Tensor],
    ):
        super().__init__(engine, learnt, config.evaluation, inference, task)
        form = processor_format(config.model.name, image_format(engine.module))
        self.side = stored_side(form)
        classes = StreamClasses(tuple(learnt.choices.values()), config.stream.classes.protocol)
        everything = np.ones((len(learnt.choices), len(classes.names)), np.bool_)
        collator = ImageCollator(form, DTYPES[config.model.dtype], everything)
        kind = NearestMeanReader if config.method == "ncm" else ImageReader
        self.reader = kind(engine, (), evaluation_options(config), classes, collator)
        self.reader.load_state_dict(kept)

    def _rows(self, prompts: Sequence[Prompt]) -> list[Any]:
        return [_pixels(prompt, self.side) for prompt in prompts]

    def _features(self, rows: Sequence[Any]) -> Tensor:
        return self.reader.features(_split(rows), range(len(rows)))

    def _turn(self, rows: Sequence[Any], tasks: Sequence[str | None]) -> list[str]:
        names = list(self.learnt.choices)
        self.reader.tests = [_split(rows)] * len(names)
        self.reader.forget()
        asked = [(0 if task is None else names.index(task), row) for row, task in enumerate(tasks)]
        return self.reader.answers("image", asked, range(len(self.learnt.bank) or len(names)))


class _Shown:
    """Images of a round, as a split has them."""

    def __init__(self, images: Sequence[npt.NDArray[np.uint8]]):
        self.images = images

    def item(self, i: int) -> tuple[npt.NDArray[np.uint8], int, int]:
        """Pixels; place and task aren't known."""
        return self.images[i], 0, 0


def _split(images: Sequence[npt.NDArray[np.uint8]]) -> TestSplit:
    return TestSplit(_Shown(images), np.arange(len(images)), Task("shown", "image", (), "accuracy", {}), ())


def image_prompts(source: str) -> list[Prompt]:
    """The image files that a path leads to: itself, or all below a folder, in order of their names.

    Raises:
        DataError: there is none.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"{source}: no image file is there; give a file, or a folder with {', '.join(sorted(SUFFIXES))}"
        )
    return [Prompt(str(file), number, str(file)) for number, file in enumerate(files)]


def _pixels(prompt: Prompt, side: int) -> npt.NDArray[np.uint8]:
    try:
        image = decode(Path(prompt.text).read_bytes() if prompt.image is None else prompt.image)
        # as a stream's images are stored: small ones as they are
        return np.asarray(image if max(image.size) <= side else fitted(image, side))
    except (OSError, ImageProblem) as error:
        raise DataError(f"{prompt.where}: {error}") from None
