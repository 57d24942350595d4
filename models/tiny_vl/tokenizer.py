"""`tiny`'s tokenizer with more words and the tokens of pictures: `python -m trimkv_edge.models.tiny_vl.tokenizer`."""

import json
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trimkv_edge.models.tiny.tokenizer import WEIGHTS as TINY_WEIGHTS
from trimkv_edge.models.tiny_vl.scenes import ATTRIBUTES

WEIGHTS = Path(__file__).parent / "weights"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
VISION_TOKENS = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
NEW_WORDS = (*(" " + word for words in (*ATTRIBUTES.values(), ATTRIBUTES) for word in words), "Look")
_PICTURE = "{{ '" + VISION_START + "%s" + VISION_END + "' }}"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    + _PICTURE % IMAGE_PAD
    + "{% elif part['type'] == 'video' or 'video' in part %}"
    + _PICTURE % VIDEO_PAD
    + "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """Appends merges until each of `NEW_WORDS` is one token, then the tokens of pictures."""
    tokenizer = Tokenizer.from_file(str(TINY_WEIGHTS / "tokenizer.json"))
    for word in NEW_WORDS:
        while len(pieces := tokenizer.encode(word).tokens) > 1:
            fields = json.loads(tokenizer.to_str())
            vocabulary = fields["model"]["vocab"]
            vocabulary.setdefault(pieces[0] + pieces[1], len(vocabulary))
            fields["model"]["merges"].append(pieces[:2])
            tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.add_special_tokens(list(VISION_TOKENS))
    return tokenizer


def save_tokenizer(folder: Path = WEIGHTS) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja to `folder`."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *VISION_TOKENS],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


@lru_cache(maxsize=1)
def load_tokenizer() -> Tokenizer:
    """The shipped tokenizer, through plain `tokenizers`."""
    return Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))


if __name__ == "__main__":
    save_tokenizer()
