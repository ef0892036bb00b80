"""Images to shards to batches: sources, preparation, memory-mapped arrays, the resumable loader."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Batch": "loader",
        "DataSet": "loader",
        "Loader": "loader",
        "Manifest": "manifest",
        "PrepareConfig": "config",
        "ShardReader": "shards",
        "Source": "sources",
        "add_features": "encode",
        "open_data": "loader",
        "open_source": "sources",
        "prepare": "encode",
    },
)
