"""Talk with a model about pictures, and see how it cuts them."""

from .conversation import Conversation
from .streaming import stream_answer

__all__ = ["Conversation", "stream_answer"]
