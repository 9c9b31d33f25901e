"""Small tokenizers of every kind of decoder that open models use."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from orchestrator.live.text.detokenise import Vocabulary

TEXT = "naïve 日本語 👩‍👩‍👧 plain words, and\nmore words; e\u0301 ﬁ \u00a0 end"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LETTERS = "abcdefghijklmnopqrstuvwxyz,;.'\n日本"


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<s>", "<|python_tag|>"])
    tokenizer.add_tokens([AddedToken("two words"), AddedToken("日")])
    return tokenizer


def llama() -> Tokenizer:
    """Llama 2, Mistral: a space in front of every text, which decoding takes away again."""
    tokenizer = _pieces()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def gemma() -> Tokenizer:
    """Gemma: no space in front."""
    tokenizer = _pieces()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace() -> Tokenizer:
    """T5, Llama 2 as newer converters write it, without bytes."""
    tokenizer = _pieces()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT: a space in front of every token that does not say it continues a word, punctuation tidied."""
    words = ["<unk>", "<s>", *_LETTERS, *(f"##{letter}" for letter in _LETTERS), "word", "##word", "n't"]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def suffixed() -> Tokenizer:
    """GPT, CLIP: the end of a word is marked, and is a space if something follows."""
    words = ["<unk>", "<s>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "words</w>"]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def _pieces() -> Tokenizer:
    words = ["<unk>", "<s>", "▁", "▁▁", *_LETTERS, "▁words", "▁w", "▁日", "\ufffd", *_BYTES]
    vocabulary = {piece: place for place, piece in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


KINDS = [byte_level, llama, gemma, metaspace, word_piece, suffixed]


def vocabulary_of(tokenizer: Tokenizer, marks: tuple[str, ...] = ()) -> Vocabulary:
    """Return the vocabulary of a tokenizer that no other file says anything about."""
    return Vocabulary(tokenizer, json.loads(tokenizer.to_str()), marks=marks)
