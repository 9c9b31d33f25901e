"""What every way in does with a request, and its generations, without any way in: no HTTP, no API's words."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.config import AdapterConfig
from orchestrator.core.types import DEFAULT_TENANT, GatewayId, Sampling, ServiceClass, SessionId, TenantId
from orchestrator.live.asked import Asked, Conversation, Effort, Hints, Limits, Texts, Thinking
from orchestrator.live.choices import Choices, Usage
from orchestrator.live.intake import Intake, Prepared
from orchestrator.live.metrics import Metrics
from orchestrator.live.refusals import Invalid, KeyUnknown, ModelUnknown
from orchestrator.live.text.generation import AnswerEnd
from orchestrator.live.text.models import ModelText
from orchestrator.live.text.templates import ChatTemplate
from tests.live.scripted import MODEL, TENANTS, Script, ScriptedDriver, make_config, make_model

CONTEXT_TOKENS = 256
TALK = Conversation([{"role": "user", "content": "Hi there"}])
ACME = TenantId("acme")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return make_model(tmp_path_factory.mktemp("model"), CONTEXT_TOKENS)


def make_intake(text: ModelText, **gateway: object) -> Intake:
    return Intake(make_config(TENANTS, **gateway), {MODEL: text}, b"secret")


def prepare(intake: Intake, asked: Asked, tenant: TenantId = ACME) -> Prepared:
    return asyncio.run(intake.prepare(asked, intake.model_named(asked.model), tenant, None))


def test_keys_stand_for_tenants(text: ModelText) -> None:
    intake = make_intake(text)
    assert [intake.tenant_of(key) for key in (b"sk-good", b"sk-other")] == ["acme", "globex"]
    for key in (b"", b"sk-", b"sk-good "):
        with pytest.raises(KeyUnknown):
            intake.tenant_of(key)
    anyones = Intake(make_config(), {MODEL: text}, b"secret")
    assert anyones.tenant_of(b"whatever") == DEFAULT_TENANT


def test_metrics_have_a_key_of_their_own_or_any_tenants(text: ModelText) -> None:
    make_intake(text).check_metrics_key(b"sk-good")
    intake = make_intake(text, metrics_key="page")
    intake.check_metrics_key(b"page")
    with pytest.raises(KeyUnknown, match="metrics"):
        intake.check_metrics_key(b"sk-good")


def test_adapters_are_found_by_name_and_alias_and_share_no_block_with_their_model(text: ModelText) -> None:
    config = make_config(TENANTS)
    adapters = {"sql": AdapterConfig("/sql", ("queries", "sql-*")), "prose": AdapterConfig("/prose")}
    config = replace(config, models={MODEL: replace(config.models[MODEL], adapters=adapters)})
    intake = Intake(config, {MODEL: text}, b"secret", {"sql": "a fingerprint", "prose": "another"})
    assert intake.model_names() == [MODEL, "sql", "prose", "gpt-4o", "queries"]
    found = [intake.model_named(name) for name in ("sql", "queries", "sql-2", "prose", "claude-opus", MODEL)]
    assert [one.label for one in found] == ["sql", "sql", "sql", "prose", MODEL, MODEL]
    assert {one.name for one in found} == {MODEL}
    prepared = {one.label: prepare(intake, Asked(one.label, TALK)) for one in found}
    assert {label: one.sampling.adapter for label, one in prepared.items()} == {"sql": "sql", "prose": "prose", MODEL: None}
    assert len({one.prompts[0].hash_root for one in prepared.values()}) == 3
    assert len({one.prompts[0].tokens for one in prepared.values()}) == 1


def test_models_are_found_by_name_and_alias(text: ModelText) -> None:
    intake = make_intake(text)
    assert {intake.model_named(name).name for name in (MODEL, "gpt-4o", "claude-opus")} == {MODEL}
    assert intake.model_names() == [MODEL, "gpt-4o"]
    with pytest.raises(ModelUnknown) as caught:
        intake.model_named("gpt-4")
    assert (caught.value.code, caught.value.field) == ("model_not_found", "model")


def test_names_of_sessions_are_bounded(text: ModelText) -> None:
    intake = make_intake(text)
    assert [intake.session_named(name) for name in (None, "", "one", "x" * 256)] == [None, None, "one", "x" * 256]
    long = {intake.session_named("x" * 10_000), intake.session_named("x" * 10_001)}
    assert {len(name or "") for name in long} == {64}
    assert len(long) == 2


def test_the_same_text_has_blocks_of_its_own_for_each_tenant_and_salt(text: ModelText) -> None:
    intake = make_intake(text)
    texts = Texts(["so many words " * 20])
    salted = Asked(MODEL, texts, hints=Hints(cache_salt="salt"))
    found = [
        prepare(intake, Asked(MODEL, texts)),
        prepare(intake, Asked(MODEL, texts), TenantId("globex")),
        prepare(intake, salted),
    ]
    assert len({one.prompts[0].tokens for one in found}) == 1
    assert len({one.prompts[0].hash_root for one in found}) == 3
    hashes = [block for one in found for block in one.prompts[0].hashes]
    assert len(set(hashes)) == len(hashes) > 0


def test_tokens_are_as_good_as_the_text_they_stand_for(text: ModelText) -> None:
    tokens = text.tokenizer.encode("Hi there", add_special_tokens=False).ids
    both = prepare(make_intake(text), Asked(MODEL, Texts(["Hi there", tokens]))).prompts
    assert both[0] == both[1]


def test_a_model_ends_its_answers_itself_unless_that_is_to_be_ignored(text: ModelText) -> None:
    intake = make_intake(text)
    ends = tuple(sorted(text.chat_eos_token_ids))
    asked = Asked(MODEL, TALK, Sampling(stop_token_ids=(5,)))
    assert prepare(intake, asked).sampling.stop_token_ids == (5, *ends)
    ignoring = Asked(MODEL, TALK, Sampling(stop_token_ids=(5,)), Limits(ignores_ends=True))
    assert prepare(intake, ignoring).sampling.stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("asked", "code", "field"),
    [
        (Asked(MODEL, Texts(["x"] * 5), limits=Limits(choices=2)), "too_many_generations", "n"),
        (Asked(MODEL, TALK, limits=Limits(choices=9)), "too_many_generations", "n"),
        (Asked(MODEL, Texts([[1] * CONTEXT_TOKENS])), "context_length_exceeded", "messages"),
        (Asked(MODEL, Texts([[1 << 20]])), "invalid_value", "prompt"),
        (Asked(MODEL, Texts([[-1]])), "invalid_value", "prompt"),
        (Asked(MODEL, TALK, Sampling(stop_token_ids=(1 << 20,))), "invalid_value", "stop_token_ids"),
        (Asked(MODEL, TALK, Sampling(stop_token_ids=(-1,))), "invalid_value", "stop_token_ids"),
        (Asked(MODEL, TALK, Sampling(logit_bias={1 << 20: 1.0})), "invalid_value", "logit_bias"),
        (Asked(MODEL, Conversation([{"role": "user", "content": None}], continues=True)), "invalid_messages", "messages"),
    ],
)
def test_what_the_model_cannot_do_is_refused(text: ModelText, asked: Asked, code: str, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        prepare(make_intake(text, generations_max=8), asked)
    assert (caught.value.code, caught.value.field) == (code, field)


@pytest.mark.parametrize("thinking", [Thinking(False, field="thinking.type"), Thinking(effort=Effort.NONE)])
def test_a_model_that_always_thinks_is_not_asked_not_to(text: ModelText, thinking: Thinking) -> None:
    opens = "{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}"
    always = replace(text, template=ChatTemplate({"default": opens}, {}))
    with pytest.raises(Invalid, match="begins thoughts all the same") as caught:
        prepare(make_intake(always), Asked(MODEL, replace(TALK, thinking=thinking)))
    assert caught.value.field == thinking.field
    switched = opens.replace("add_generation_prompt", "enable_thinking is not false")
    for template in (switched, "{{ messages[0].content }}"):
        quiet = replace(text, template=ChatTemplate({"default": template}, {}))
        assert prepare(make_intake(quiet), Asked(MODEL, replace(TALK, thinking=thinking))).prompts[0].count > 0


def told_late(text: str) -> str:
    """Return what the system says later than at the beginning, as the user's."""
    return f"<system-reminder>\n{text}\n</system-reminder>"


@pytest.mark.parametrize(
    ("roles", "shown"),
    [
        ("s0 u1", "s:0|u:1|"),
        ("s0 s1 u2", "s:0\n\n1|u:2|"),
        ("s0 s1 u2 a3 s4 u5", f"s:0\n\n1|u:2|a:3|u:{told_late('4')}\n5|"),
        ("u0 s1 u2", f"u:0\n{told_late('1')}\n2|"),
    ],
)
def test_a_template_that_takes_one_system_message_first_gets_it_so(text: ModelText, roles: str, shown: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    talk = Conversation([{"role": names[word[0]], "content": word[1:]} for word in roles.split()])
    each = "{% for message in messages %}%s{{ message.role[0] + ':' + message.content + '|' }}{% endfor %}"
    strict = "{% if message.role == 'system' and not loop.first %}{{ raise_exception('first') }}{% endif %}"
    assert worded(text, each.replace("%s", strict), talk) == shown
    as_it_is = "".join(f"{word[0]}:{word[1:]}|" for word in roles.split())
    assert worded(text, each.replace("%s", ""), talk) == as_it_is


def worded(text: ModelText, template: str, talk: Conversation) -> str:
    """Return a conversation's prompt as a template makes it."""
    model = replace(text, template=ChatTemplate({"default": template}, {}))
    prompt = prepare(make_intake(model), Asked(MODEL, talk)).prompts[0]
    return text.tokenizer.decode(list(memoryview(prompt.tokens).cast("I")))


# --- generations --------------------------------------------------------------------------------------------------------


def play(text: ModelText, asked: Asked, script: Script, talk: Callable[[Choices, ScriptedDriver], Awaitable[None]]) -> None:
    async def run() -> None:
        intake, driver = make_intake(text), ScriptedDriver(text, lambda turn: script)
        prepared = await intake.prepare(asked, intake.model_named(asked.model), ACME, SessionId("one"))
        choices = Choices(prepared, "name", 0.0)
        choices.start(driver, Metrics(GatewayId(0), 1, {}), None)
        await talk(choices, driver)

    asyncio.run(run())


def test_every_choice_of_every_prompt_is_a_turn_with_all_that_was_asked(text: ModelText) -> None:
    asked = Asked(
        "gpt-4o",
        Texts(["one", "two"]),
        Sampling(seed=7),
        Limits(output_tokens_max=9, choices=2),
        Hints(3, ServiceClass.BATCH),
    )

    async def talk(choices: Choices, driver: ScriptedDriver) -> None:
        collected = await choices.collect()
        assert ["".join(map(str, pieces)) for _, pieces in collected] == ["Hello world"] * 4
        first, second = (turn.prompt.count for turn in driver.turns[::2])
        assert choices.usage == Usage(first + second, 2, sum(done.tokens for done, _ in collected))
        assert [turn.sampling.seed for turn in driver.turns] == [7, 8, 7, 8]
        told = {(one.model, one.tenant, one.session, one.service_class, one.priority, one.name) for one in driver.turns}
        assert told == {(MODEL, "acme", "one", ServiceClass.BATCH, 3, "name")}
        assert {turn.output_tokens_max for turn in driver.turns} == {9}

    play(text, asked, Script(cached_tokens=1), talk)


def test_a_turn_has_no_more_tokens_than_the_context_has_room_for(text: ModelText) -> None:
    async def talk(choices: Choices, driver: ScriptedDriver) -> None:
        choices.cancel()
        [turn] = driver.turns
        assert turn.output_tokens_max == CONTEXT_TOKENS - turn.prompt.count

    for limit in (None, 10_000):
        play(text, Asked(MODEL, TALK, limits=Limits(output_tokens_max=limit)), Script(), talk)


def test_cancelling_ends_what_has_not_ended_and_nothing_else(text: ModelText) -> None:
    async def talk(choices: Choices, driver: ScriptedDriver) -> None:
        ended: list[Any] = []
        async for batch in choices.batches():
            ended += [choice for choice, _ in batch if choice.generation.finish_reason is not None]
            if ended:
                break
        choices.cancel()
        cancelled = {stream.request: stream.cancelled.is_set() for stream in driver.streams}
        assert {choice.stream.request for choice in ended} == {request for request, gone in cancelled.items() if not gone}
        assert {choice.generation.finish_reason for choice in ended} == {AnswerEnd.STOP}

    play(text, Asked(MODEL, TALK, limits=Limits(choices=3)), Script(), talk)
