"""`push_to_hub` and `from_pretrained` against a server on this machine that speaks the Hub's protocol."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from places import ROOT

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.model.remote_code import AUTO_MAP

REPOSITORY = "someone/tiny-hovle"
COMMIT = "a" * 40

PUSH = """
import sys
from hovle import HoVLEForConditionalGeneration, HoVLEProcessor

for kind in (HoVLEForConditionalGeneration, HoVLEProcessor):
    kind.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2], token="hf_" + "x" * 20)
"""

LOAD = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hovle":
            raise ImportError("hovle is not installed here")

sys.meta_path.insert(0, Absent())
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "What?"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(json.dumps(model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository: files come by commits and are given out."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - the server's, shared by its requests

    def log_message(self, *args):
        """Keep the test's output clean."""

    def do_POST(self):
        """Create the repository, decide how files travel, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            self.reply({"url": f"http://{self.headers['Host']}/{REPOSITORY}", "name": REPOSITORY})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(
                {"commitUrl": f"http://{self.headers['Host']}/{REPOSITORY}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self.reply({"errors": [], "warnings": []})  # the check of a model card's header

    def do_GET(self):
        """Give out a file, or say what there is."""
        path = self.path.partition("?")[0]
        prefix = f"/{REPOSITORY}/resolve/"
        if path.startswith(prefix):
            self.give(path.removeprefix(prefix).partition("/")[2])
        elif "/tree/" in path:
            self.list_folder(path.partition("/tree/")[2].partition("/")[2])
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            names = [{"rfilename": name} for name in self.files]
            self.reply({"id": REPOSITORY, "sha": COMMIT, "siblings": names, "tags": [], "private": False})
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def list_folder(self, folder: str) -> None:
        """Say what a folder holds; the Hub knows none that is empty."""
        names = [name for name in self.files if name.startswith(folder)]
        if names:
            self.reply(
                [{"type": "file", "path": name, "size": len(self.files[name]), "oid": COMMIT} for name in names]
            )
        else:
            self.give(folder)

    def give(self, name: str) -> None:
        """Send a file, as the Hub does for those that are not large."""
        data = self.files.get(name)
        self.send_response(404 if data is None else 200)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.finish_reply(data or b"")

    def reply(self, content) -> None:
        """Send JSON."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.finish_reply(json.dumps(content).encode())

    def finish_reply(self, data: bytes) -> None:
        """Send what is left of the head, and the body unless only the head was wanted."""
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of an empty hub."""
    Hub.files.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def run(program: str, *arguments: str, hub: str, home: Path) -> str:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_a_pushed_model_answers_the_same_where_hovle_is_not_installed(hub, tmp_path, make_tokenizer, tiny_config):
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config(image_token_id=processor.image_token_id)).eval()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    picture = tmp_path / "picture.png"
    Image.effect_noise((80, 60), 50).convert("RGB").save(picture)

    run(PUSH, str(tmp_path / "model"), REPOSITORY, hub=hub, home=tmp_path / "writer")
    # The last push was the processor's; config.json is the model's.
    assert json.loads(Hub.files["config.json"])["auto_map"] == AUTO_MAP
    assert {"modeling_hovle.py", "processing_hovle.py", "model.safetensors", "tokenizer.json"} <= Hub.files.keys()
    said = json.loads(run(LOAD, REPOSITORY, str(picture), hub=hub, home=tmp_path / "reader").splitlines()[-1])

    chat = [{"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert said == model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
