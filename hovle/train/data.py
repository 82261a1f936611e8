"""Samples, packing and the batch the objectives receive.

A source is an endless, seeded stream: sample `i` depends on the seed and on `i` alone, so resuming a run needs one
number. Samples are packed whole into rows of fixed length; positions restart at each sample, which keeps packed
samples apart (attention_mask stays None). Conversations that start alike, such as several questions about one
picture, share that beginning: the picture is computed once, and a mask lets each see the beginning and itself only.

Read in this order: `sources.py` (files -> records), `samples.py` (records -> samples), `packing.py` (samples -> packed
batches). This module gathers their public names.
"""

from .packing import PackedBatches, StreamPosition, branch_mask, pack_rows
from .samples import RandomTextSamples, ReplySamples, Sample, load_tiles, share_beginning, special_ids
from .sources import Record, conversation, load_records, picture_paths

__all__ = [
    "PackedBatches",
    "RandomTextSamples",
    "Record",
    "ReplySamples",
    "Sample",
    "StreamPosition",
    "branch_mask",
    "conversation",
    "load_records",
    "load_tiles",
    "pack_rows",
    "picture_paths",
    "share_beginning",
    "special_ids",
]
