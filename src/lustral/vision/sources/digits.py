"""The 1,797 handwritten digits that come with scikit-learn: a data set that needs no file."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lustral.core.randomness import child
from lustral.vision.images import as_uint8, stratified_indices
from lustral.vision.records import ImageSet
from lustral.vision.sources.checks import check_memory
from lustral.vision.sources.pixels import RGB, Framing, frame_tensor
from lustral.vision.sources.record import DataSource

_NUM_TEST = 360
_DEFAULT_SIZE = 32
_BRIGHTEST = 16  # the set counts ink in 0 .. 16


def open_digits(frame: Framing | None = None) -> DataSource:
    """Return the digits, 1,437 for training and 360 for testing, as (3, H, W) pictures with three equal channels.

    Args:
        frame: the size that the 8x8 originals are enlarged to, bilinear; None means 32 x 32.
    """
    from sklearn.datasets import load_digits  # imported here: slow, and only this source needs it

    bunch = load_digits()
    frame = frame or Framing(size=(_DEFAULT_SIZE, _DEFAULT_SIZE))
    height, width = frame.scaled(*bunch.images.shape[1:])
    check_memory(len(bunch.images) * RGB * height * width, "digits")
    ink = torch.from_numpy(bunch.images).float()[:, None] / _BRIGHTEST
    large = as_uint8(F.interpolate(ink, size=(height, width), mode="bilinear"))
    images = frame_tensor(large, frame).repeat(1, RGB, 1, 1)
    labels = torch.from_numpy(bunch.target).long()
    digits = ImageSet(images=images, labels=labels, num_classes=10, class_names=tuple("0123456789"))
    test, train = stratified_indices(labels, 10, _NUM_TEST, generator=child(0, "test", "digits"))
    return DataSource(
        name="digits",
        train=digits.subset(train.sort().values),
        test=digits.subset(test.sort().values),
        flip=False,
        reserve_fraction=0.2,
    )
