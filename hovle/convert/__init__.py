"""Between other layouts and ours: released checkpoints, InternLM2, SentencePiece tokenizers."""
