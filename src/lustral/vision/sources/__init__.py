"""Where images come from: embedded digits, .npz and Parquet files, image folders, torchvision."""

from lustral.vision.sources.class_order import (
    ClassNamesError,
    check_class_names,
    in_class_order,
    names_nothing,
    read_class_names,
)
from lustral.vision.sources.folder_stream import FolderStream
from lustral.vision.sources.loading import load_source, source_names, source_with_channels
from lustral.vision.sources.record import DataSource, SourceError, UnreadablePicture

__all__ = [
    "ClassNamesError",
    "DataSource",
    "FolderStream",
    "SourceError",
    "UnreadablePicture",
    "check_class_names",
    "in_class_order",
    "load_source",
    "names_nothing",
    "read_class_names",
    "source_names",
    "source_with_channels",
]
