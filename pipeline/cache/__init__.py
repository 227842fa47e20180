"""The feature cache: one directory a silo, valid zarr v3, committed by its manifest.

    <silo>.zarr/
      manifest.json             written last: what made the cache, every file's size and SHA-256
      features/patch            (images, patches, d_vision); shards of `shard_images`, one image a chunk
      images/{sha256,status,id_offsets,id_bytes}
      texts/{offsets,bytes,image_index,kind,split}
      quant/{channel_mean,channel_step}   of int8 features only

Feature shards are written and read here directly, as `sharding_indexed` files with crc32c, because
one streaming write and one read are several times faster than zarr-python on the same bytes. An
unfinished cache lives in `<silo>.zarr.partial` with one record a finished shard in `_done/`, and
is renamed when it is whole.
"""

from fedcmp.pipeline.cache.format import (
    FORMAT,
    STATUS,
    CorruptCacheError,
    Identity,
    Row,
    differences,
    to_storage,
)
from fedcmp.pipeline.cache.int8 import Quantiser
from fedcmp.pipeline.cache.locks import finish_commit, partial_path, settling, started_key, writing
from fedcmp.pipeline.cache.reader import FeatureCache, open_cache, same_key
from fedcmp.pipeline.cache.writer import CacheWriter, open_writer

__all__ = [
    "FORMAT",
    "STATUS",
    "CacheWriter",
    "CorruptCacheError",
    "FeatureCache",
    "Identity",
    "Quantiser",
    "Row",
    "differences",
    "finish_commit",
    "open_cache",
    "open_writer",
    "partial_path",
    "same_key",
    "settling",
    "started_key",
    "to_storage",
    "writing",
]
