"""What `transformers` writes, greedily and in float32: the oracle of every test of token identity."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

#: Difference of the two largest logits under which float32 does not tell which is larger: against float64 both the oracle and
#: the engine are off by up to 3e-5 in a logit.
TIE = 1e-4

#: Returns the tokens after a prompt, or None if it meets a tie, where either token is right.
Oracle = Callable[[list[int], int], list[int] | None]


def oracle(path: Path, adapted: Callable[[Any], Any] = lambda model: model) -> Oracle:
    """Load a checkpoint into `transformers`; `adapted` returns what is to be asked instead."""
    torch.set_num_threads(1)
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    # An end is a token like any other here: left to itself, `generate` would pass it over to write as many as are asked for.
    model.generation_config.eos_token_id = None

    def generate(prompt: list[int], count: int) -> list[int] | None:
        ids = torch.tensor([prompt])
        wanted = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            output = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **wanted)
            best = torch.cat(output.logits).topk(2).values
        tied = bool((best[:, 0] - best[:, 1] < TIE).any())
        return None if tied else output.sequences[0, len(prompt) :].tolist()

    return generate


def first_decided(generate: Oracle, prompts: Iterable[list[int]], wanted: int, count: int) -> dict[tuple[int, ...], list[int]]:
    """Return the first `wanted` prompts that meet no tie, and the `count` tokens after each; few may be passed over."""
    found: dict[tuple[int, ...], list[int]] = {}
    passed = 0
    for prompt in prompts:
        tokens = generate(prompt, count)
        passed += tokens is None
        if tokens is not None:
            found[tuple(prompt)] = tokens
        if len(found) == wanted:
            break
    assert len(found) == wanted
    assert passed <= wanted // 5, f"{passed} of {passed + wanted} prompts meet a tie"
    return found
