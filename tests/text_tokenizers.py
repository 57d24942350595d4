"""Small tokenizers of the two kinds that real models have, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<pad>", "<s>", "</s>")
_TEXT = "the cat sat on the mat and the dog sat on the log. die Katze saß auf der Matte, über 你好 你好 🙂🙂 "


def byte_level(vocab_size: int = 320) -> Tokenizer:
    """GPT-2's kind: every token is a run of bytes, some of them parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT * 20], trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: spaces are part of words, unknown characters are byte tokens, a text's first space is dropped."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,", "▁a", "▁b"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[("▁", "a"), ("▁", "b")],
            byte_fallback=True,
            unk_token="<pad>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
