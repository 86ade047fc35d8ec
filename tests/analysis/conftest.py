"""The small models and data sets of the classification tests."""

from ..classification.conftest import model_path, own_datasets_cache, picture_folders, text_files  # noqa: F401
