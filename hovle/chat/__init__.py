"""Talk with a model about pictures, and see how it cuts them."""

from .conversation import Conversation

__all__ = ["Conversation"]
