"""Which tokens a node computes only because it forgot them."""

from collections.abc import Callable

from orchestrator.core.commands import ReportEnded
from orchestrator.core.events import Assigned
from orchestrator.core.node.node import Node
from orchestrator.core.node.regret import Regret
from tests.builders import assignment, prompt_hashes
from tests.core.node.test_node import feed, finished, token

MakeNode = Callable[..., Node]


def serve(node: Node, serial: int, prompt: str) -> int:
    """Let a prompt be computed as step `serial`; return the tokens of it that need not have been."""
    feed(node, Assigned(assignment(serial, prompt, output_tokens_max=1)))
    (report,) = [one for one in feed(node, finished(serial, token(serial))) if isinstance(one, ReportEnded)]
    return report.report.regretted_tokens


def test_what_is_computed_again_after_it_was_pushed_out_is_regretted_once(make_node: MakeNode) -> None:
    node = make_node(blocks=8)
    assert serve(node, 1, "abcd") == 0
    assert serve(node, 2, "abcd") == 0  # it was there
    assert serve(node, 3, "uvwxyz") == 0  # pushes out c and d and, for its last token, b
    assert serve(node, 4, "abcd") == 3 * 4
    assert serve(node, 5, "abcd") == 0


def test_the_memory_is_bounded_and_the_oldest_is_forgotten_first() -> None:
    regret = Regret(3)
    regret.forgot(prompt_hashes("abcd")[:0:-1])  # d, c, b: a chain is forgotten from its end
    regret.forgot(prompt_hashes("a"))
    regret.forgot(prompt_hashes("xyz")[::-1])
    assert regret.computed(prompt_hashes("abcd")) == 1  # a: the others are older than as many as the node has blocks
    assert regret.computed(prompt_hashes("abcd")) == 0
    assert regret.computed(prompt_hashes("xyzw")) == 3
    assert regret.computed(prompt_hashes("xyz")) == 0
