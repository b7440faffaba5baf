"""Images as the loop sees them: classes of a stream as places of one head, and batches of pixels on a device.

Shapes: B rows, H x W pixels as stored, C classes of the head, K tasks, d random numbers a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from treelora.data.batches import ImageBatch
from treelora.data.task import Task
from treelora.errors import ConfigError
from treelora.models.vision import ImageFormat

Mask = Literal["local", "seen"]
ASPECT = 4 / 3
"""Crops are up to so much wider or higher than square, as in most image pipelines since Szegedy et al. (2015)."""


@dataclass(frozen=True)
class StreamClasses:
    """The classes of a stream in order of arrival: class c has place c in the head, whichever task brings it."""

    tasks: tuple[tuple[str, ...], ...]
    """Class names of each task."""
    protocol: str
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(dict.fromkeys(name for task in self.tasks for name in task)))

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> StreamClasses:
        """Of image tasks.

        Raises:
            ConfigError: they follow different protocols.
        """
        protocols = dict.fromkeys(str(task.protocol) for task in tasks)
        if len(protocols) > 1:
            raise ConfigError(f"a stream follows one protocol; this one mixes {', '.join(protocols)}")
        return cls(tuple(task.choices for task in tasks), next(iter(protocols)))

    def places(self, task: int) -> npt.NDArray[np.int64]:
        """Places of a task's classes, in the order of its `choices`."""
        return np.array([self.names.index(name) for name in self.tasks[task]], np.int64)

    def candidates(self, tasks: Sequence[int]) -> npt.NDArray[np.bool_]:
        """bool [C]: the classes that these tasks bring."""
        mask = np.zeros(len(self.names), np.bool_)
        for task in tasks:
            mask[self.places(task)] = True
        return mask

    def answerable(self, task: int, seen: Sequence[int]) -> npt.NDArray[np.bool_]:
        """bool [C]: what a test row of a task may be taken for once the tasks `seen` were learnt.

        Its own task's classes where that is told (task-incremental), else all classes seen so far.
        """
        return self.candidates([task] if self.protocol == "task_incremental" else [*seen, task])


class _Pixels(Protocol):
    """See `treelora.data.images.pixels.ImageRows`."""

    labels: npt.NDArray[np.int32]
    answer_lengths: npt.NDArray[np.int64]
    truncated: int

    def __len__(self) -> int: ...
    def row_id(self, i: int) -> str: ...
    def item(self, i: int) -> npt.NDArray[np.uint8]: ...


class StreamImages:
    """A split's images with their places in the stream's head; `item` gives (pixels [H, W, 3], place, task).

    Args:
        rows: The images.
        places: Of the task's classes in the head.
        task: Place of the task in the stream.
        tokens: That a model makes of an image.
    """

    def __init__(self, rows: _Pixels, places: npt.NDArray[np.int64], task: int, tokens: int = 1):
        self._rows, self.task = rows, task
        self.labels, self.answer_lengths = rows.labels, rows.answer_lengths
        self.lengths: npt.NDArray[np.int64] = np.full(len(rows), tokens, np.int64)
        self.truncated = rows.truncated
        self.classes: npt.NDArray[np.int64] = places[rows.labels]

    def __len__(self) -> int:
        return len(self._rows)

    def row_id(self, i: int) -> str:
        """The image's id."""
        return self._rows.row_id(i)

    def item(self, i: int) -> tuple[npt.NDArray[np.uint8], int, int]:
        """What `ImageCollator` takes of a row."""
        return self._rows.item(i), int(self.classes[i]), self.task


@dataclass(frozen=True, eq=False)
class ImageCollator:
    """Makes batches of (pixels, place, task) in a model's format, on the device.

    Images that aren't of the model's size yet are resized: enlarged as they are, or cut to the centre square behind a
    shorter side of 8/7 of it, as their file was prepared (`treelora.data.images.pixels`).
    """

    format: ImageFormat
    dtype: torch.dtype
    candidates: npt.NDArray[np.bool_]
    """[K, C]: for a row of each task the classes that it is told apart from in training."""
    crop_area: float = 1.0
    """Smallest share of an image that a random crop keeps; 1: no crops."""
    flip: bool = False
    prefetched = True

    @property
    def draws(self) -> int:
        """See `Collator`."""
        return 5 if self.flip or self.crop_area < 1 else 0

    def __call__(
        self, items: Sequence[Any], device: torch.device, draws_Bd: npt.NDArray[np.float64] | None
    ) -> ImageBatch:
        """See `Collator`."""
        pixels = self.pixels([image for image, _, _ in items], device, draws_Bd)
        candidates = torch.from_numpy(self.candidates[[task for _, _, task in items]])
        labels = torch.tensor([[place] for _, place, _ in items])
        return ImageBatch(
            pixel_values=pixels,
            candidates=candidates.to(device, non_blocking=True),
            labels=labels.to(device, non_blocking=True),
        )

    def pixels(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        device: torch.device,
        draws_Bd: npt.NDArray[np.float64] | None = None,
    ) -> Tensor:
        """Images [H, W, 3] as the model wants them, [B, channels, height, width]; they may differ in H and W."""
        size = (len(images), self.format.channels, self.format.height, self.format.width)
        result = torch.empty(size, dtype=self.dtype, device=device)
        shapes = [image.shape for image in images]
        for shape in dict.fromkeys(shapes):
            where = [i for i, other in enumerate(shapes) if other == shape]
            stored = torch.from_numpy(np.stack([images[i] for i in where])).to(device, non_blocking=True)
            x = stored.permute(0, 3, 1, 2).float() / 255
            x = x.mean(dim=1, keepdim=True) if self.format.channels == 1 else x
            x = self._cut(x, draws_Bd[where]) if draws_Bd is not None else self._centre(x)
            result[where] = self._normalise(x).to(self.dtype)
        return result

    def _centre(self, x: Tensor) -> Tensor:
        height, width = self.format.height, self.format.width
        if x.shape[2] > height and x.shape[3] > width:
            top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
            return x[:, :, top : top + height, left : left + width]
        if x.shape[2:] == (height, width):
            return x
        return F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)

    def _cut(self, x: Tensor, draws_Bd: npt.NDArray[np.float64]) -> Tensor:
        """A random crop, resized, and flipped or not: one bilinear resampling on the device."""
        theta = torch.from_numpy(self.windows(draws_Bd, x.shape[2], x.shape[3])).to(x)
        grid = F.affine_grid(theta, [len(x), x.shape[1], self.format.height, self.format.width], align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def windows(self, draws_Bd: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.float32]:
        """Affine maps [B, 2, 3] from the output's to the image's coordinates, both -1 to 1."""
        share_B = self.crop_area + (1 - self.crop_area) * draws_Bd[:, 0]
        aspect_B = ASPECT ** (2 * draws_Bd[:, 1] - 1) if self.crop_area < 1 else np.ones(len(draws_Bd))
        across_B = np.minimum(1.0, np.sqrt(share_B * aspect_B * height / width))
        down_B = np.minimum(1.0, np.sqrt(share_B / aspect_B * width / height))
        mirror_B = np.where(draws_Bd[:, 4] < 0.5, -1.0, 1.0) if self.flip else np.ones(len(draws_Bd))
        theta = np.zeros((len(draws_Bd), 2, 3))
        theta[:, 0, 0], theta[:, 0, 2] = across_B * mirror_B, (1 - across_B) * (2 * draws_Bd[:, 2] - 1)
        theta[:, 1, 1], theta[:, 1, 2] = down_B, (1 - down_B) * (2 * draws_Bd[:, 3] - 1)
        return theta.astype(np.float32)

    def _normalise(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.format.mean, self.format.std))
        return (x - mean) / std


def stored_side(form: ImageFormat) -> int:
    """Shorter side in pixels of prepared images: 8/7 of the model's, of which the centre is shown in evaluation."""
    return math.ceil(max(form.height, form.width) * 8 / 7)


def training_candidates(classes: StreamClasses, unit: int, mask: Mask, joint: bool) -> npt.NDArray[np.bool_]:
    """bool [K, C]: what rows of each task are told apart from while a unit is learnt.

    `local`: the classes of their own task, so that the rows of the head for earlier classes stay as they are; `seen`:
    those of all tasks so far. All tasks at once (`joint`): all classes.
    """
    tasks = range(len(classes.tasks))
    if joint:
        return np.ones((len(tasks), len(classes.names)), np.bool_)
    if mask == "local" or classes.protocol == "task_incremental":
        return np.stack([classes.candidates([task]) for task in tasks])
    return np.stack([classes.candidates([*range(unit + 1), task]) for task in tasks])
