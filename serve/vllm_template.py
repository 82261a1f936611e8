"""Write a chat template in which vLLM's server finds the places of pictures.

  python serve/vllm_template.py MODEL > template.jinja
  vllm serve MODEL --trust-remote-code --chat-template template.jinja

Most language models' templates join strings. vLLM gives such a template no pictures; to one that goes through items
of a message it gives all. So the model's own template stays, and before it messages become strings: a picture its
token, words themselves, as hovle's processor has it.
"""

import argparse
import sys

FLATTEN = """
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or not message['content'] -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set said = namespace(text='', owed='') -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'text' -%}
{%- set said.text = said.text + ('' if item['text'].startswith(said.owed) else said.owed) + item['text'] -%}
{%- set said.owed = '' -%}
{%- else -%}
{%- set said.text = said.text + said.owed + IMAGE -%}
{%- set said.owed = AFTER -%}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=said.text + said.owed)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
""".lstrip()


def flattening(template: str, image_token: str, text_after_image: str) -> str:
    """A template of strings that also takes lists of items, `{"type": "text", "text": ...}` or pictures."""
    return FLATTEN.replace("IMAGE", repr(image_token)).replace("AFTER", repr(text_after_image)) + template


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    args = parser.parse_args()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    if not isinstance(processor.chat_template, str):
        sys.exit(f"{args.model} has no chat template, or several: name one of them to vLLM yourself.")
    sys.stdout.write(flattening(processor.chat_template, processor.image_token, processor.text_after_image))
    return 0


if __name__ == "__main__":
    sys.exit(main())
