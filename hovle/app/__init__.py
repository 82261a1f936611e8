"""A page to try models in: chats with pictures, their tiles, and where each answer token looks.

`desk` does what the page asks for and knows nothing of gradio; `page` lays it out and draws it.
"""
