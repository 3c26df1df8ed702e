"""Which of an alias's versions a request gets: one that its session's key always gets, or the next in turn.

Knows nothing of catalogues: targets come in, one of them comes out. Nothing is remembered of sessions;
of turns, a few numbers for each alias, for at most `aliases_max` of them.

Each replica of the gateway keeps turns of its own, beginning at a place of its own: what the replicas
give a target too much or too little then averages out, where equal beginnings would add it up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from math import log

_SESSION = b"loom.session"
_PLACE = b"loom.place"


@dataclass(frozen=True, slots=True)
class Target:
    """One share of an alias's traffic; `weight` is relative to the sum, at least 1."""

    digest: str
    weight: int


def sticky(alias: str, targets: Sequence[Target], session_key: str) -> Target:
    """The same target for the same key, alias and weights, on every replica.

    Weighted rendezvous hashing: the least of -ln(hash) / weight, with the hash in (0, 1), which falls to
    a target with probability weight / sum. A key moves only to a target whose weight grew against that
    of the one it leaves. Source: Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA
    2005 (the logarithmic method), on Thaler and Ravishankar's rendezvous hashing, 1998.
    """
    key = session_key.encode("utf-8", "surrogatepass")

    def distance(target: Target) -> float:
        return -log(_uniform(b"\0".join((alias.encode(), target.digest.encode(), key)))) / target.weight

    return min(targets, key=distance)


def _uniform(data: bytes) -> float:
    """A number in (0, 1) made of 52 bits, so that neither end can be reached by rounding."""
    number = int.from_bytes(blake2b(data, digest_size=8, person=_SESSION).digest(), "little")
    return ((number >> 12) + 0.5) / 2**52


class Rotation:
    """Targets in turn, so that each has its share of any requests in a row.

    With m targets, any N requests in a row give a target N x share, at most 2 - 1/(m - 1) more or less:
    one for two targets, never two. Source: Tijdeman, "The chairman assignment problem", Discrete
    Mathematics 32 (1980): of those whose turn would not come too early, the one with the earliest
    deadline. All in whole numbers: nothing drifts.
    """

    __slots__ = ("_owed", "_total", "targets")

    def __init__(self, targets: Sequence[Target], place: bytes) -> None:
        """At least two targets. `place` is hashed into where the rotation begins."""
        self.targets = tuple(targets)
        self._total = sum(target.weight for target in self.targets)
        self._owed = [0] * len(self.targets)
        """How much of a request each target is owed, times the sum of weights; together 0."""
        self._begin(place)

    def next(self) -> int:
        """The index of the target whose turn it is; `give` makes it the next one's."""
        return self._earliest([owed + t.weight for owed, t in zip(self._owed, self.targets, strict=True)])

    def give(self, index: int) -> None:
        """A request goes to this target."""
        for i, target in enumerate(self.targets):
            self._owed[i] += target.weight
        self._owed[index] -= self._total

    def _earliest(self, due: Sequence[int]) -> int:
        """Of the targets that may be given a request now, the one that must be given one soonest."""
        parts = 2 * len(due) - 2
        best, best_slack = -1, 0
        for i, amount in enumerate(due):
            if parts * amount < self._total:
                continue
            slack = (parts - 1) * self._total - parts * amount
            if best < 0 or slack * self.targets[best].weight < best_slack * self.targets[i].weight:
                best, best_slack = i, slack
        return best

    def _begin(self, place: bytes) -> None:
        """As if one request had been given before, of which each target was due a part drawn by `place`.

        With two targets every place of the rotation is then as likely as any other.
        """
        cuts = [0, self._total]
        for number in range(len(self.targets) - 1):
            drawn = blake2b(place + number.to_bytes(4, "little"), digest_size=8, person=_PLACE).digest()
            cuts.append(int.from_bytes(drawn, "little") * self._total >> 64)
        cuts.sort()
        due = [end - begin for begin, end in pairwise(cuts)]
        self._owed = due
        self._owed[self._earliest(due)] -= self._total


@dataclass(frozen=True, slots=True)
class Turn:
    """A choice. One that is not taken leaves everything as it was."""

    target: Target
    _rotation: Rotation | None = None
    _index: int = 0

    def take(self) -> None:
        """The request is admitted."""
        if self._rotation is not None:
            self._rotation.give(self._index)


class Canaries:
    """Chooses for every alias of one process."""

    def __init__(self, aliases_max: int, replica: bytes) -> None:
        """`replica` is what this process has to itself: its rotations begin where no other's do."""
        self._aliases_max = aliases_max
        self._replica = replica
        self._begun = 0
        self._rotations: OrderedDict[str, Rotation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rotations)

    def turn(self, alias: str, targets: Sequence[Target], session_key: str) -> Turn:
        """One of `targets`, of which there is at least one; the key may be empty."""
        if len(targets) == 1:
            return Turn(targets[0])
        if session_key:
            return Turn(sticky(alias, targets, session_key))
        rotation = self._rotation(alias, tuple(targets))
        index = rotation.next()
        return Turn(rotation.targets[index], rotation, index)

    def _rotation(self, alias: str, targets: tuple[Target, ...]) -> Rotation:
        """The alias's own, or a new one when its targets changed."""
        rotation = self._rotations.get(alias)
        if rotation is None or rotation.targets != targets:
            # Counted, so that one that is begun again and again does not give its first turn each time.
            self._begun += 1
            place = b"\0".join((self._replica, b"%d" % self._begun, alias.encode()))
            rotation = self._rotations[alias] = Rotation(targets, place)
        self._rotations.move_to_end(alias)
        if len(self._rotations) > self._aliases_max:
            self._rotations.popitem(last=False)
        return rotation
