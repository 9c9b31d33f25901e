"""Predicts when sessions' contexts are wanted again, and says which nodes have to hear of it.

    started    a turn runs: what is expected after it goes to its nodes with the assignment
    paused     it is over
    answered   its answer was understood: the model waits for a tool, or has said all: its nodes hear what is expected now
    hinted     a tool runs, with or without the time it will take, or has finished: its nodes hear what is expected now
    left       the session went another way: its nodes hear how likely it comes back, which is learned like any other pause
    joined     the last session that forked from it has ended: as if a tool had finished
    moved      its next turn runs elsewhere: nodes that had it before hear that nobody is expected

What is learned is how long contexts pause, by class (`pauses.py`): the first turns of a context, later ones, those whose model
called a tool (each for itself) or had said all, what was left, each tool that a harness told of, what its end is followed by.
"""

from collections.abc import Sequence

from orchestrator.core.cluster.contexts import Context, Marks, course_of
from orchestrator.core.cluster.pauses import EDGES_S, HAZARD, HAZARD_LEFT, Ages, Hazards, range_of
from orchestrator.core.outlook import ContextId, Outlook, risen
from orchestrator.core.types import BlockHash, NodeId, RequestId

#: Classes of pauses that are told apart; what further ones do counts for all together.
CLASSES_MAX = 64
#: What is predicted of a class is computed anew after so many predictions.
REFRESH = 32
#: How many pauses weigh as much as what is known of a wider class: of a tool's, which says much; of what a model waits for, which
#: says less; of any that nothing is known of, which says little beyond its age.
WEIGHT, WEIGHT_ANSWERED, WEIGHT_UNHINTED = 8.0, 32.0, 256.0
#: A tool that is said to take some time nearly always ends between these parts of it; one that is late within so many times it.
EARLY, LATE, VERY_LATE = 0.95, 1.05, 4.0
#: How likely it ends in time, and how likely ever.
IN_TIME, EVER = 0.9, 0.99
#: What comes back less likely than this after its first turn is no session.
LIKELY = 0.5
#: Seconds by which its end is uncertain at least.
UNCERTAIN_S = 0.05
#: Characters of a tool's name by which models' calls are told apart.
TOOL_CHARS_MAX = 64
#: Classes of pauses, or what their names begin with.
LEFT, FINISHED, TOOL, CALLED, ANSWERED = "left", "tool finished", "tool ", "called ", "answered"
#: Turns of a context by which pauses are told apart; what comes later is alike.
TURNS_MAX = 4

Told = tuple[NodeId, Outlook]


class Line:
    """What a session has of contexts."""

    __slots__ = ("contexts",)

    def __init__(self) -> None:
        #: The one that was used last at the end.
        self.contexts: list[Context] = []

    def forget(self) -> None:
        """Follow none of them any longer: pauses must not keep what is remembered of sessions that are not."""
        for context in self.contexts:
            context.forget()


class _Class:
    """Pauses of one class, and what is predicted of them."""

    __slots__ = ("_chances", "_predicted", "_uses", "hazards", "return_chance")

    def __init__(self) -> None:
        self.hazards = Hazards()
        #: How likely one comes back at all, as of the last prediction.
        self.return_chance = 1.0
        self._predicted: list[float] = []
        #: What follows from them, once somebody asked.
        self._chances: tuple[float, ...] = ()
        self._uses = 0

    def predict(self, wider: Sequence[float], weight: float) -> Sequence[float]:
        """Return the hazard of each range; where little is known, that of a wider class."""
        if self._uses % REFRESH == 0:
            self._predicted, self._chances = self.hazards.over(wider, weight), ()
            self.return_chance = self.hazards.return_chance(wider, weight)
        self._uses += 1
        return self._predicted

    def outlook(self, context: ContextId, wider: Sequence[float], weight: float) -> Outlook:
        """Return what is expected of a context that pauses so."""
        hazards = self.predict(wider, weight)
        if not self._chances:
            self._chances = risen(hazards)
        return Outlook(context, EDGES_S, self._chances)


class Expectations:
    """What is expected of all sessions of one gateway."""

    __slots__ = ("_ages", "_all", "_classes", "_others", "_paused")

    def __init__(self) -> None:
        self._all = _Class()
        self._classes: dict[str, _Class] = {}
        #: Of classes beyond `CLASSES_MAX`.
        self._others = _Class()
        self._ages: Ages[Context] = Ages()
        #: Whether any session has paused: until then nothing is known of anything.
        self._paused = False

    @property
    def classes(self) -> int:
        """Classes of pauses that are told apart so far."""
        return len(self._classes)

    def started(
        self, line: Line, request: RequestId, hashes: Sequence[BlockHash], nodes: tuple[NodeId, ...], again: bool, now: float
    ) -> tuple[Context, list[Told]]:
        """Note that a turn runs on nodes, perhaps again elsewhere; return its context, and what other nodes have to hear."""
        self._ages.pass_time(now, self._reach)
        course = course_of(line.contexts, ContextId(request), hashes)
        context = course.context
        if context.paused_s is not None:
            self._come_back(context, now - context.paused_s)
        told = [(node, Outlook(context.id)) for node in context.nodes if node not in nodes]
        if course.left is not None:
            told += self._hint(course.left, LEFT, now)
        if not again:
            context.turns += 1
            context.running += 1
        context.paused_s, context.expected_s, context.nodes, context.marks = None, None, nodes, Marks.of(hashes)
        context.request = request
        context.kind = f"after {min(context.turns, TURNS_MAX)}"
        return context, told

    def paused(self, context: Context, now: float) -> list[Told]:
        """Note that a turn is over; return what its nodes have to hear if something was said of the pause before."""
        context.running -= 1
        assert context.running >= 0, f"{-context.running} turns of context {context.id} have ended that were not started"
        if context.running:
            return []
        kind, expected_s = context.kind, context.expected_s
        if not kind.startswith(TOOL):
            self._pause(context, kind, now)
            return []
        return self._hint(context, kind, now, expected_s)

    def outlook(self, context: Context | None, request: RequestId) -> Outlook | None:
        """Return what to expect after a turn of a context; of a request without session, what all have in common.

        None where there are no sessions: what is used last is kept longest then, and that needs no telling. Where hardly any
        comes back after a first turn (clients that name each request a session of its own), that is expected as if nothing
        were known of it, which keeps longest what is used last as well, whoever asks for it again.
        """
        if context is None:
            if not self._paused:
                return None
            return self._all.outlook(ContextId(request), _BASE, WEIGHT_UNHINTED)
        outlook = self._outlook(context)
        if context.turns > 1 or self._class(context.kind).return_chance >= LIKELY:
            return outlook
        return Outlook(context.id, EDGES_S, _UNKNOWN)

    def answered(self, line: Line, request: RequestId, tool: str, now: float) -> list[Told]:
        """Note what the model waits for after a turn; return what its nodes have to hear. Nothing if more is known by now."""
        for context in line.contexts:
            if context.request == request and not context.running and not _hinted(context.kind):
                return self._hint(context, CALLED + tool[:TOOL_CHARS_MAX] if tool else ANSWERED, now)
        return []

    # --- hints ------------------------------------------------------------------------------------------------------------

    def tool_started(self, line: Line, tool: str, expected_s: float | None, now: float) -> list[Told]:
        """Note that a session waits for a tool; return what its nodes have to hear."""
        return [one for context in line.contexts[-1:] for one in self._hint(context, TOOL + tool, now, expected_s)]

    def tool_finished(self, line: Line, now: float) -> list[Told]:
        """Note that a session's tool has ended; return what its nodes have to hear."""
        return [one for context in line.contexts[-1:] for one in self._hint(context, FINISHED, now)]

    def joined(self, line: Line, now: float) -> list[Told]:
        """Note that the last of the sessions that a session waited for has ended; return what its nodes have to hear."""
        contexts = [context for context in line.contexts[-1:] if not context.running]
        return [one for context in contexts for one in self._hint(context, FINISHED, now)]

    def ended(self, line: Line) -> list[Told]:
        """Return what nodes have to hear of a session that comes back no more; nothing may be noted of it after."""
        told = [(node, Outlook(context.id)) for context in line.contexts for node in context.nodes]
        line.forget()
        for context in line.contexts:
            context.nodes = ()
        return told

    def _hint(self, context: Context, kind: str, now: float, expected_s: float | None = None) -> list[Told]:
        """Let a pause be of another class from now on, or let it be so once it begins."""
        context.expected_s = expected_s
        if context.running:
            context.kind = kind
            return []
        self._pause(context, kind, now)
        outlook = self._outlook(context) if expected_s is None else punctual(context.id, expected_s)
        return [(node, outlook) for node in context.nodes]

    # --- learning ---------------------------------------------------------------------------------------------------------

    def _pause(self, context: Context, kind: str, now: float) -> None:
        """Let a pause begin, or begin anew as one of another class: what was counted of it so far counts no more."""
        if context.paused_s is not None:
            self._uncount(context, now - context.paused_s)
        context.kind = kind
        self._paused = True
        if not context.forgotten:
            context.paused_s = now
            self._ages.pause(now, context)

    def _reach(self, context: Context, since_s: float, place: int) -> bool:
        if context.paused_s != since_s:
            return False
        for hazards in self._tables(context):
            hazards.reach(place - 1)
        return True

    def _come_back(self, context: Context, age_s: float) -> None:
        place = range_of(age_s)
        if place is not None:
            for hazards in self._tables(context):
                hazards.reach(place)
                hazards.come_back(place)

    def _uncount(self, context: Context, age_s: float) -> None:
        place = range_of(age_s)
        for hazards in self._tables(context):
            hazards.forget(len(EDGES_S) - 1 if place is None else place - 1)

    def _tables(self, context: Context) -> tuple[Hazards, ...]:
        """Return where a pause is counted."""
        return self._all.hazards, self._class(context.kind).hazards

    def _class(self, kind: str) -> "_Class":
        known = self._classes.get(kind)
        if known is None:
            if len(self._classes) >= CLASSES_MAX:
                return self._others
            known = self._classes[kind] = _Class()
        return known

    def _outlook(self, context: Context) -> Outlook:
        kind = context.kind
        known = self._class(kind)
        if kind == LEFT:
            return known.outlook(context.id, _SELDOM, WEIGHT)
        return known.outlook(context.id, self._all.predict(_BASE, WEIGHT_UNHINTED), _weight(kind))


def _hinted(kind: str) -> bool:
    return kind == FINISHED or kind.startswith(TOOL)


def _weight(kind: str) -> float:
    if _hinted(kind):
        return WEIGHT
    return WEIGHT_ANSWERED if kind == ANSWERED or kind.startswith(CALLED) else WEIGHT_UNHINTED


def punctual(context: ContextId, expected_s: float) -> Outlook:
    """Return the outlook of a context whose tool is said to take so long."""
    early = max(EARLY * expected_s, UNCERTAIN_S / 2)
    late = max(LATE * expected_s, early + UNCERTAIN_S)
    return Outlook(context, (early, late, VERY_LATE * late), (0.0, IN_TIME, EVER))


_BASE = [HAZARD] * len(EDGES_S)
#: How likely what nothing is known of has come back by each age.
_UNKNOWN = risen(_BASE)
_SELDOM = [HAZARD_LEFT] * len(EDGES_S)
