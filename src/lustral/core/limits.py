"""How much a file may make us hold, where its own size does not say: stated once, so that every reader refuses the same."""

from __future__ import annotations

import math
from typing import TypeGuard

LARGEST_IMAGE = 2**24  # numbers in one image, C x H x W: 64 MiB as float32; 3 x 2,364 x 2,364
MOST_CLASSES = 100_000  # counts, masks and tables are made for each; ImageNet-21k has 21,841
LARGEST_NETWORK = 2**29  # parameters of a network that is built before any file holds them: 2 GiB as float32
LARGEST_EXTRA = 2**28  # bytes of a network's tensors that no file holds: constants that are computed at birth
LARGEST_RECORD = 2**22  # bytes of a victim's record
LARGEST_TRIGGER = 2**28  # bytes of a learnt trigger's tensors
LARGEST_VERDICT = 2**26  # bytes of a verdict: six figures for each of 50,000 classes
LARGEST_TRIGGERS = 2**32  # bytes of recovered triggers: 384 samples of 224 x 224 pixels for each of 13 labels

# of a data set
GIB = 2**30
MEMORY_VARIABLE = "LUSTRAL_MEMORY"  # environment variable with the GiB that the images of a data set may take
DEFAULT_MEMORY = 4.0  # GiB; 27,000 pictures of 224 x 224 pixels
LARGEST_TABLE = 2**28  # bytes of a table of files and labels: 134 for each of two million pictures
MOST_IMAGES = 2_000_000  # of a data set; ImageNet has 1.3 million
MOST_PIXELS = 64_000_000  # of one picture, as stored or resized; cameras reach 60 million
MOST_EXPANSION = 200  # packed arrays and tables may hold this many times their size; zeros reach 230 to 1,030 (deflate)
MOST_PICTURE_EXPANSION = 500  # the same for pictures, as RGB: photographs reach 30, drawings of one bit per pixel 200
FREE_EXPANSION = 2**28  # bytes that need no such proof
MOST_NAME_LENGTH = 1000  # characters of a class name

# of captioned molecules
MOST_PAIRS = 1_000_000  # rows of a table; PubChem has captions for about 300,000 molecules
LONGEST_CAPTION = 20_000  # characters; the longest of ChEBI-20, PCdes and PubChem324k has 8,363


def is_image_shape(shape: object) -> TypeGuard[tuple[int, int, int]]:
    """Tell whether this is (C, H, W) of images that are not absurdly large.

    >>> is_image_shape([3, 32, 32]), is_image_shape([3, 0, 32]), is_image_shape((3, 10**6, 10**6)), is_image_shape([3, 32])
    (True, False, False, False)
    """
    return (
        isinstance(shape, list | tuple)
        and len(shape) == 3
        and all(type(side) is int and side >= 1 for side in shape)
        and math.prod(shape) <= LARGEST_IMAGE
    )


def is_class_count(count: object) -> bool:
    """Tell whether this is a number of classes, 2 to ``MOST_CLASSES``.

    >>> is_class_count(10), is_class_count(True), is_class_count(10**9)
    (True, False, False)
    """
    return type(count) is int and 2 <= count <= MOST_CLASSES
