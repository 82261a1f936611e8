"""The page itself: what stands where, and which of the desk's work an event asks for."""

import html
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = (
    "False"  # read where gradio is imported; it would tell its makers of each start
)
import gradio as gr
from gradio.processing_utils import save_pil_to_cache

from ..files.model_folder import short_name
from ..version import __version__
from .chats import Chat
from .desk import Desk

MAX_WAITING = 32
"""Questions that wait for those before them; beyond, the page says that it is busy."""

MAX_FILE_SIZE = "64mb"
"""Of one uploaded file."""

SECONDS_KEPT = 3600
"""How long files of the page, uploaded or drawn, are kept at most."""

THUMBNAIL_SIDE = 320
"""Longest side of a picture in the chat, in pixels."""

CSS = """
#notice p { margin: 0; padding: 8px 12px; border-radius: 8px; }
#notice .fault { background: #ffebe9; color: #82071e; border: 1px solid #ff818266; }
#notice .news { background: #ddf4ff; color: #0a3069; border: 1px solid #54aeff66; }
#tiles .grid-wrap, #heat .grid-wrap { padding-top: 32px; }
#tokens .container { max-height: 220px; overflow-y: auto; }
#tiles .thumbnail-item, #heat .thumbnail-item { aspect-ratio: auto; background: #ffffff; }
#talk [aria-label="Share"], #talk .download-link, footer { display: none !important; }
"""
"""Pictures keep their shape; what is hidden would send pictures elsewhere, or is about gradio."""


def build_page(desk: Desk) -> gr.Blocks:
    """Lay the page out and bind its events; `desk` does the work."""
    labels = [(f"{short_name(name)} ({name})", name) for name in desk.models.names]
    with gr.Blocks(title="hovle", analytics_enabled=False, delete_cache=(60, SECONDS_KEPT), fill_width=True) as page:
        gr.Markdown(f"## hovle {__version__}")
        with gr.Row():
            with gr.Column(scale=5):
                model = gr.Dropdown(labels, value=desk.models.names[0], label="Model", elem_id="model")
                talk = gr.Chatbot(
                    label="Chat",
                    height=420,
                    render_markdown=False,  # what the model says, not what a browser makes of it
                    buttons=["copy"],
                    elem_id="talk",
                    placeholder="Drop pictures below, and ask about them.",
                )
                notice = gr.HTML(elem_id="notice")
                files = gr.File(
                    label="Drop pictures here, or click", file_count="multiple", height=120, elem_id="files"
                )
                with gr.Row():
                    question = gr.Textbox(
                        placeholder="What is in the picture?", container=False, scale=8, elem_id="question"
                    )
                    send = gr.Button("Ask", variant="primary", min_width=90, elem_id="ask")
                with gr.Row():
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                    new = gr.Button("New chat", size="sm", elem_id="new")
            with gr.Column(scale=4):
                drawn: dict[str, Any] = {"columns": 2, "height": 360, "object_fit": "contain", "format": "png"}
                tiles = gr.Gallery(label="Pictures as the model sees them", elem_id="tiles", **drawn)
                look = gr.Button("Where does it look?", elem_id="look")
                # Updated otherwise than by a value, a component becomes another, whose files gradio never deletes.
                with gr.Column(visible=False) as looked:
                    section = gr.Radio([], label="Layers", elem_id="section")
                    tokens = gr.HighlightedText(
                        label="The answer's tokens, the redder the more of their attention is on pictures: click one",
                        elem_id="tokens",
                    )
                    heat = gr.Gallery(label="Where it looks", elem_id="heat", **drawn)
        looks = [looked, section, tokens, heat]

        def add(paths: list[str], request: gr.Request):
            try:
                faults = desk.add_pictures(_visitor(request), paths)
            except ValueError as error:
                faults = [str(error)]
            return None, desk.draw_tiles(_visitor(request)), _fault(" ".join(faults)) if faults else ""

        def ask(words: str, shown: list[dict], request: gr.Request) -> Iterator[tuple]:
            visitor = _visitor(request)
            try:
                chat = desk.chats.of(visitor)
                asked = [*shown, *_shown_question(words, chat, talk.GRADIO_CACHE)]
                waits = "" if desk.models.is_loaded(chat.model) else _news(f"{chat.model} is loaded ...")
                yield asked, "", waits, *_no_looks()
                answer = ""
                for answer in desk.ask(visitor, words):
                    yield [*asked, {"role": "assistant", "content": answer}], "", "", *_no_looks()
                cut = f"The answer was cut: it reached {chat.stopped_by}." if chat.stopped_by else ""
                yield [*asked, {"role": "assistant", "content": answer}], "", _news(cut) if cut else "", *_no_looks()
            except ValueError as error:
                yield shown, words, _fault(str(error)), *_no_looks()

        def begin(request: gr.Request):
            desk.begin(_visitor(request))
            return [], desk.draw_tiles(_visitor(request)), "", *_no_looks()

        def choose(name: str, request: gr.Request):
            try:
                desk.choose(_visitor(request), name)
            except ValueError as error:
                return gr.skip(), gr.skip(), _fault(str(error)), *[gr.skip()] * len(looks)
            return [], desk.draw_tiles(_visitor(request)), "", *_no_looks()

        def read(request: gr.Request):
            visitor = _visitor(request)
            try:
                names, masses = desk.look(visitor)
                return (
                    "",
                    gr.update(visible=True),
                    gr.update(choices=names, value=names[-1], visible=len(names) > 1),
                    masses,
                    desk.draw_look(visitor, names[-1], 0),
                )
            except ValueError as error:
                return _fault(str(error)), *_no_looks()

        def show(name: str, request: gr.Request, token: int = 0):
            visitor = _visitor(request)
            try:
                return "", desk.masses(visitor, name), desk.draw_look(visitor, name, token)
            except ValueError as error:
                return _fault(str(error)), gr.skip(), gr.skip()

        def pick(name: str, event: gr.SelectData, request: gr.Request):
            return show(name, request, event.index)[::2]

        # Whatever runs the model stands in one line; the rest does not wait for it.
        on_model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        beside: dict[str, Any] = {"concurrency_limit": 1, "api_visibility": "private", "show_progress": "minimal"}
        files.upload(add, files, [files, tiles, notice], **beside)
        gr.on(
            [send.click, question.submit],
            ask,
            [question, talk],
            [talk, question, notice, *looks],
            show_progress="minimal",
            show_progress_on=[notice],
            **on_model,
        )
        stop.click(_of_visitor(desk.chats.stop), None, None, queue=False, api_visibility="private")
        gr.on([new.click, talk.clear], begin, None, [talk, tiles, notice, *looks], **beside)
        model.input(choose, model, [talk, tiles, notice, *looks], **beside)
        look.click(read, None, [notice, *looks], show_progress_on=[notice], **on_model)
        section.input(show, section, [notice, tokens, heat], **beside)
        tokens.select(pick, section, [notice, heat], **beside)
        page.unload(_of_visitor(desk.chats.forget))
    return page


def open_page(desk: Desk, host: str, port: int) -> gr.Blocks:
    """Show the page until it is closed; its files lie in the folder that `GRADIO_TEMP_DIR` names now.

    Raises:
        ValueError: When nobody can listen there.
    """
    page = build_page(desk)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            max_file_size=MAX_FILE_SIZE,
            footer_links=[],
            css=CSS,
            quiet=True,
        )
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened at; is something else there? Give another --port."
        ) from error
    return page


def serve(desk: Desk, host: str, port: int) -> None:
    """Show the page until interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was uploaded is deleted then, too
    with tempfile.TemporaryDirectory(prefix="hovle-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = open_page(desk, host, port)
        sys.stdout.write(f"The page is at {page.local_url}; Ctrl+C ends it.\n")
        sys.stdout.flush()
        page.block_thread()


def _visitor(request: gr.Request) -> str:
    """Who an event is from: a page that is open in a browser."""
    return str(request.session_hash)


def _of_visitor(work: Callable[[str], None]) -> Callable[[gr.Request], None]:
    """Work that needs to know who asks for it, and nothing else."""

    def handler(request: gr.Request) -> None:
        work(_visitor(request))

    return handler


def _shown_question(question: str, chat: Chat, folder: str) -> list[dict]:
    """What the chat shows of a question: small copies of its pictures, and the words."""
    shown = []
    for item in chat.waiting:
        copy = item["image"].copy()
        copy.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        path = save_pil_to_cache(copy, cache_dir=folder, format="png")
        shown.append({"role": "user", "content": {"path": path, "alt_text": "picture"}})
    return [*shown, {"role": "user", "content": question}]


def _no_looks() -> list:
    """Hide where the last answer looked, and forget its tokens and drawings."""
    return [gr.update(visible=False), gr.skip(), None, None]


def _fault(text: str) -> str:
    return f'<p class="fault" role="alert">{html.escape(text)}</p>'


def _news(text: str) -> str:
    return f'<p class="news" role="status">{html.escape(text)}</p>'
