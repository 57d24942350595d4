"""A whole artefact folder of a small random model that reads pictures, with a tokenizer, in ONNX; shared by tests."""

from __future__ import annotations

import atexit
import io
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from factories import IMAGE_TOKEN, gated_vision_model
from onnx_artefact import spread_gates
from PIL import Image
from text_artefact import save_manifest
from text_tokenizers import byte_level
from tokenizers import AddedToken
from vision_artefact import SIZES, vision_manifest

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.onnx import export_onnx
from trimkv_edge.manifest import ByteInfo, TokenizerInfo

PADS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
IMAGE_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO_PLACE = "<|vision_start|><|video_pad|><|vision_end|>"
# Qwen3-VL's in short.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}" + IMAGE_PLACE + "{% elif part.type == 'video' %}" + VIDEO_PLACE + "{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONFIG = CacheConfig(budget=24, buffer=8, prefill_chunk=8)


@cache
def vision_text_artefact() -> Path:
    """The artefact, exported once per test run: copy it before changing it."""
    folder = Path(mkdtemp(prefix="vision-text-artefact-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = spread_gates(gated_vision_model())
    target = export_onnx(model, CONFIG, folder, sizes=SIZES)
    manifest = vision_manifest(model, CONFIG, target)
    tokenizer = byte_level(IMAGE_TOKEN)
    tokenizer.add_tokens([f"filler{n}" for n in range(IMAGE_TOKEN - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens([AddedToken(pad, special=True) for pad in PADS])
    assert [tokenizer.token_to_id(pad) for pad in PADS] == [316, 317, 318, 319]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    info = TokenizerInfo(tokenizer.get_vocab_size(), [2], 1)
    save_manifest(folder, manifest, tokenizer=info, bytes=ByteInfo(1000, 100_000, 1_000_000))
    return folder


def noise(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """A picture that no other seed has."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    """What its file holds."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
