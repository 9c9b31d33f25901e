"""Makes the tiny model directory that gateway measurements serve: a trained tokenizer, a template, and no weights."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8000
SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path) -> tuple[Path, list[str]]:
    """Write config, tokenizer and template of a small Llama; return the folder and words of about a token each."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(6000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((" ".join(chance.choices(words, k=60)) for _ in range(2000)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in _configuration(tokenizer.get_vocab_size()).items():
        (folder / name).write_text(json.dumps(content, indent=1))
    return folder, words


def _configuration(vocabulary: int) -> Mapping[str, Mapping[str, object]]:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    marks = {"bos_token_id": 0, "eos_token_id": 1}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    texts = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072, "clean_up_tokenization_spaces": False}
    return {
        "config.json": {**kind, **shape, **heads, **marks, "max_position_embeddings": 131072},
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1]},
        "tokenizer_config.json": {**tokenizer, **texts, "chat_template": TEMPLATE},
        "special_tokens_map.json": texts,
    }
