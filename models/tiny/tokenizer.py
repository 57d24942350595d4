"""Byte-level BPE of the `tiny` model: `python -m trimkv_edge.models.tiny.tokenizer` writes it to `weights/`."""

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trimkv_edge.models.tiny.corpus import stdlib_texts
from trimkv_edge.models.tiny.words import KEYS, VALUES

WEIGHTS = Path(__file__).parent / "weights"
VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PHRASES = ["user", "assistant", "system", "Remember", "Update", "Read", "Noted", "What", "Hello", "Thanks", "The"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """Train the BPE on the standard library plus the dialogue words, often enough that each becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " " + " ".join(KEYS + VALUES) + " "
    drill = (words + "\n" + "\n".join(PHRASES) + "\n") * 3000
    tokenizer.train_from_iterator([*stdlib_texts(), drill], trainer=trainer)
    return tokenizer


def save_tokenizer(folder: Path = WEIGHTS) -> None:
    """Write tokenizer.json, tokenizer_config.json, special tokens and chat_template.jinja to `folder`."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
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
