"""What other packages log at import that concerns nobody who uses hovle; to be imported before transformers is."""

import logging


def _concerns_users(record: logging.LogRecord) -> bool:
    """False for what torch 2.14 says of two enums of torchao 0.18 whenever transformers finds it installed."""
    return "register_constant()" not in record.getMessage()


logging.getLogger("torch.utils._pytree").addFilter(_concerns_users)
