"""Where images come from: embedded digits, .npz and Parquet files, image folders, torchvision."""

from lustral.sources.folder import FolderStream
from lustral.sources.loading import load_source, source_names, source_with_channels
from lustral.sources.record import DataSource, SourceError

__all__ = ["DataSource", "FolderStream", "SourceError", "load_source", "source_names", "source_with_channels"]
