"""Images to shards to batches: sources, preparation, memory-mapped arrays, the resumable loader."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Batch": "loader",
        "DataSet": "dataset",
        "FeatureCache": "feature_cache",
        "Loader": "loader",
        "Manifest": "manifest",
        "PrepareConfig": "config",
        "ShardReader": "reader",
        "Source": "sources.contract",
        "add_features": "encode",
        "add_text": "encode",
        "check_bytes": "checking",
        "check_models": "checking",
        "make_plan": "planning",
        "open_data": "dataset",
        "open_source": "sources.opening",
        "prepare": "encode",
        "remove": "removing",
    },
)
