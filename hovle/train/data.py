"""Samples, packing and the batch the objectives receive.

The sources of a recipe make one endless, seeded stream: sample `i` depends on the seed and on `i` alone, so resuming
a run needs little more than one number. Samples are packed whole into rows of fixed length; positions restart at each
sample, which keeps packed samples apart (attention_mask stays None). Conversations that start alike, such as several
questions about one picture, share that beginning: the picture is computed once, and a mask lets each see the
beginning and itself only.

Read in this order: `sources.py` and `hf_datasets.py` (files -> records), `mixture.py` (which record comes when),
`samples.py` (records -> samples), `packing.py` (samples -> packed batches), `skips.py` (what is left out and counted).
This module gathers their public names.
"""

from .mixture import Mixture, open_mixture
from .packing import LanePosition, PackedBatches, StreamPosition, branch_mask, load_batches, pack_rows
from .samples import RandomTextSamples, ReplySamples, Sample, SampleMaker, load_tiles, share_beginning, special_ids
from .skips import SkipLedger, SkipSampleError
from .sources import Record, conversation, fingerprint_records, load_records, picture_sources

__all__ = [
    "LanePosition",
    "Mixture",
    "PackedBatches",
    "RandomTextSamples",
    "Record",
    "ReplySamples",
    "Sample",
    "SampleMaker",
    "SkipLedger",
    "SkipSampleError",
    "StreamPosition",
    "branch_mask",
    "conversation",
    "fingerprint_records",
    "load_batches",
    "load_records",
    "load_tiles",
    "open_mixture",
    "pack_rows",
    "picture_sources",
    "share_beginning",
    "special_ids",
]
