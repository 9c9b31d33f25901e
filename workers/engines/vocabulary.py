"""Makes the tokenizer of a random checkpoint: byte-level BPE over a small built-in text, and a ChatML template with tools.

The template is append-only: how a message is rendered never depends on the messages after it, so that a conversation's tokens
are a prefix of its next turn's tokens.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: The 256 bytes and the special tokens.
VOCABULARY_MIN = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = """\
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content %}
        {%- for part in content %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- text(messages[0].content) + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + text(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = text(message.content) %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if content or not loop.first %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

#: What the merges are learnt from: prose, code and JSON as agents write them.
CORPUS = """\
You are a helpful assistant that can read files, run commands and edit code. Think about what the user wants, then use the
tools that you have been given. When a tool returns an error, read it, find the cause and try again with a better command.
The user asks a question and the assistant gives an answer. The answer should be short, correct and complete. If something is
not known, say that it is not known. There are many ways to do this, but some of them are better than others in practice.
First look at the directory and list what is in it. Then open the file that has the function, read the lines around it, and
change only what is needed. After that run the tests again and report which of them passed and which of them failed.
def read_file(path: str, start: int = 0, count: int = 200) -> list[str]:
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    return lines[start : start + count]
class Request:
    def __init__(self, name: str, arguments: dict[str, object]) -> None:
        self.name = name
        self.arguments = arguments
    def result(self) -> str | None:
        if self.name is None:
            raise ValueError("the name of a request must not be None")
        for key, value in self.arguments.items():
            print(key, value)
        return None
<tools>
{"type": "function", "function": {"name": "get_weather", "description": "Get the weather", "parameters": {"type": "object",
"properties": {"city": {"type": "string", "description": "The name of the city"}}, "required": ["city"]}}}
</tools>
<tool_call>
{"name": "get_weather", "arguments": {"city": "London"}}
</tool_call>
<tool_response>
{"temperature": 12, "unit": "celsius", "status": "ok", "error": null, "results": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}
</tool_response>
The quick brown fox jumps over the lazy dog, while the cache keeps every block of the context that will be used again. One
model writes the plan and another model checks it; each of them sends a message when its work is done, and waits for the next.
import json, os, sys, time
for index in range(100): total = total + index * 2
The capital of France is Paris. Water boils at 100 degrees. A year has 365 days, a week has seven, and an hour 3600 seconds.
"""

_SYLLABLES = tuple(first + last for first in "bcdfghlmnprstv" for last in "aeo")
#: Made-up words for each token asked for: enough for their merges to fill any vocabulary.
_WORDS_PER_TOKEN = 4


def build_tokenizer(vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of exactly `vocabulary` tokens; special tokens have the highest ids.

    Raises:
        ValueError: if `vocabulary` is too small for the bytes and the special tokens, or more than the texts can fill.
    """
    if vocabulary < VOCABULARY_MIN:
        raise ValueError(f"vocabulary must be at least {VOCABULARY_MIN} tokens, is {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS, _generated_words(vocabulary)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"vocabulary can be {tokenizer.get_vocab_size()} tokens at most, is {vocabulary}")
    return tokenizer


def _generated_words(vocabulary: int) -> str:
    """Return made-up words, enough of them for as many merges as asked for; none while the corpus suffices."""
    if vocabulary <= 768:
        return ""
    source = random.Random(vocabulary)
    words = ("".join(source.choices(_SYLLABLES, k=source.randint(2, 4))) for _ in range(vocabulary * _WORDS_PER_TOKEN))
    return " ".join(words)


def write_tokenizer(directory: Path, vocabulary: int, context_tokens_max: int) -> Tokenizer:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json; return the tokenizer."""
    tokenizer = build_tokenizer(vocabulary)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_tokens_max,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **roles,
    }
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "special_tokens_map.json", roles)
    return tokenizer


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as people read it, the same bytes every time."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
