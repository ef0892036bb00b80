"""Images to shards to batches: sources, preparation, reading by position, the resumable loader."""

from typing import TYPE_CHECKING

from repa.base.imports import exports

if TYPE_CHECKING:
    from repa.data.checking import check_bytes as check_bytes
    from repa.data.checking import check_models as check_models
    from repa.data.checking import count_duplicates as count_duplicates
    from repa.data.config import PrepareConfig as PrepareConfig
    from repa.data.dataset import DataSet as DataSet
    from repa.data.dataset import open_checked as open_checked
    from repa.data.dataset import open_data as open_data
    from repa.data.feature_cache import FeatureCache as FeatureCache
    from repa.data.finishing import remove as remove
    from repa.data.loader import Batch as Batch
    from repa.data.loader import Loader as Loader
    from repa.data.manifest import Manifest as Manifest
    from repa.data.preparing import add as add
    from repa.data.preparing import make_plan as make_plan
    from repa.data.preparing import prepare as prepare
    from repa.data.reader import ShardReader as ShardReader
    from repa.data.sources.contract import Source as Source
    from repa.data.sources.opening import open_source as open_source
else:
    __getattr__, __dir__, __all__ = exports(__name__)
