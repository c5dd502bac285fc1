"""Transfer-tuning as a strategy: the schedules of other kernels of the same class, adapted, the most similar first.

Gibson & Cano, "Transfer-Tuning" (PACT 2022): each kernel of a model tries every schedule of its class, on its own, and
keeps the fastest. Nothing is learned from the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tvmlab.core import Candidate, Trial
from tvmlab.sources import Origin

__all__ = ["DUPLICATE", "MEASURED", "TRIED", "Fate", "Transfer"]

Fate = tuple[Origin, str, str]  # the key of the program that an origin gave, and the outcome
TRIED, MEASURED, DUPLICATE = "tried", "measured before", "same as a nearer one"


class Transfer:
    """Asks for the adapted schedule of each origin, in the order given.

    `adapt` makes an origin's candidate, or says why there is none. A program that was measured before (its key is in
    `known`) or that a nearer origin gave is left out. `note` is told what came of the origins that had their turn: the
    key of each one's program ("" if there is none) and the outcome. After the origins come `own`, candidates of the
    task's own space that compete on the same terms, until there are `most` together (None: all); nothing is noted of
    them.
    """

    name = "transfer"

    def __init__(
        self,
        origins: Sequence[Origin],
        adapt: Callable[[Origin], Candidate | str],
        *,
        own: Iterable[Candidate] = (),
        most: int | None = None,
        known: Iterable[str] = (),
        note: Callable[[list[Fate]], None] = lambda fates: None,
    ) -> None:
        self._rest = iter(origins)
        self._own = iter(own)
        self._most = most
        self._adapt = adapt
        self._known = set(known)
        self._asked: set[str] = set()
        self._note = note

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` new candidates; an empty list when every origin, and what is its own, had its turn."""
        found: list[Candidate] = []
        fates: list[Fate] = []
        while len(found) < count and (origin := next(self._rest, None)) is not None:
            made = self._adapt(origin)
            if isinstance(made, str):
                fates.append((origin, "", made))
            elif made.key in self._known:
                fates.append((origin, made.key, MEASURED))
            elif made.key in self._asked:
                fates.append((origin, made.key, DUPLICATE))
            else:
                self._asked.add(made.key)
                fates.append((origin, made.key, TRIED))
                found.append(made)
        self._note(fates)
        room = count if self._most is None else min(count, self._most - len(self._asked) + len(found))
        while len(found) < room and (own := next(self._own, None)) is not None:
            if own.key not in self._known | self._asked:
                self._asked.add(own.key)
                found.append(own)
        return found

    def tell(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        """There is nothing to learn: what is tried next does not depend on it."""
