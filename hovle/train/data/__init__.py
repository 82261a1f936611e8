"""Samples, packing and the batch the objectives receive.

The sources of a recipe make one endless, seeded stream: sample `i` depends on the seed and on `i` alone, so resuming
a run needs little more than one number. Samples are packed whole into rows of fixed length; positions restart at each
sample, which keeps packed samples apart (attention_mask stays None). Conversations that start alike, such as several
questions about one picture, share that beginning: the picture is computed once, and a mask lets each see the
beginning and itself only.

Read in this order: `records.py`, `readers.py` and `huggingface.py` (files -> records), `grouping.py` (records about
the same pictures -> one), `mixture.py` (which record comes when), `samples.py` (records -> samples), `packing.py`
(samples -> rows), `batch.py` (rows -> packed batches), `skips.py` (what is left out and counted).
"""
