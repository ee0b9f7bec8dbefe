"""What the curves of a run say: healthy, or which way it has gone wrong, in a sentence with the likely remedy.

Every bound is about a figure of its own meaning, not about one method's loss: spread of unit vectors, mutual information
of assignments, RankMe, the size of the weights, and a loss against its own beginning. docs/watching.md explains them.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from typing import Any

from carina.pretrain.pretexts import Pretext

WINDOW = 20  # steps over which a curve is smoothed
SETTLED = 100  # steps after the warm-up before which no verdict says that nothing is learned

POINT = 0.05  # spread: 1 fills the sphere; healthy embeddings stay above 0.2, also in their first steps
POINT_SHARE = 0.2  # of the spread at the start
SOLVED, SOLVED_SHARE = 0.02, 0.5  # a loss that all but vanished while the spread halved: views agree because all do
NO_INFORMATION = 0.005  # in shares of what assignments could tell; 0 when every image gets the same
ONE_LINE, RANK_SHARE = 1.5, 0.1  # RankMe: a mean and nothing else has 1; share of what it was before training
FLAT = 0.01  # range of the smoothed loss over the whole run, as a share of its start
RISEN = 10.0  # loss against its start; a queue that fills multiplies a loss by 7 at most
STEEP = 100.0  # norm of the gradient against its start, beside a loss that rose
GROWN, GROWN_LATE, EARLY = 4.0, 20.0, 200  # size of the weights against their start: in the first 200 steps, and later


class Curve:
    """A figure over the steps, in little memory: its start, its present, and the range of its smoothed course."""

    def __init__(self) -> None:
        self.count, self.low, self.high = 0, math.inf, -math.inf
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        self.count += 1
        if len(self.first) < 5:
            self.first.append(value)
        self.recent.append(value)
        if self.count % WINDOW == 0:
            self.low, self.high = min(self.low, self.now), max(self.high, self.now)

    @property
    def start(self) -> float:
        return statistics.median(self.first)

    @property
    def now(self) -> float:
        return statistics.median(self.recent)


class Judge:
    """Is told the figures of every step, and says what they mean.

    pretexts: whose names begin the figures. warm: steps of the learning rate's warm-up. before: figures of the network
    before training.
    """

    def __init__(self, pretexts: dict[str, Pretext], warm: int, before: dict[str, float]):
        self.pretexts, self.warm, self.before = pretexts, warm, before
        self.curves: dict[str, Curve] = defaultdict(Curve)
        self.steps = 0
        self.ranks: deque[float] = deque(maxlen=3)  # of the last looks
        self.grown: tuple[float, int] | None = None  # how far and when; a network that was blown up stays so
        self.embeds = False

    def add(self, values: dict[str, Any]) -> None:
        self.steps += 1
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.curves[name].add(value)
        self.embeds |= any(name.endswith((".spread", ".information")) for name in values)
        if values.get("watch.rankme") is not None:
            self.ranks.append(values["watch.rankme"])
        weights = values.get("watch.weights") or 0.0
        if self.grown is None and weights > (GROWN if self.steps <= EARLY else GROWN_LATE):
            self.grown = weights, self.steps

    def findings(self) -> dict[str, str]:
        """Kind of fault -> sentence; empty for a healthy run."""
        if self.steps < WINDOW:
            return {}
        found: dict[str, str] = {}
        for name, pretext in self.pretexts.items():
            for kind, words in self._of_method(name).items():
                found.setdefault(kind, f"{name}: {words}; what helps: {pretext.remedy}")
        for kind, words in self._of_network().items():
            remedies = "; ".join(pretext.remedy for pretext in self.pretexts.values())
            found.setdefault(kind, f"{words}; what helps: {remedies}")
        return found

    def _of_method(self, name: str) -> dict[str, str]:
        found, loss = {}, self.curves.get(f"{name}.loss", Curve())
        spread, information = self.curves.get(f"{name}.spread"), self.curves.get(f"{name}.information")
        size = abs(loss.start) if loss.count else math.inf
        if spread is not None:
            solved = loss.count and abs(loss.now) < SOLVED * size and spread.now < SOLVED_SHARE * spread.first[0]
            if spread.now < max(POINT, POINT_SHARE * spread.first[0]) or solved:
                found["collapsed"] = (
                    f"the embeddings of different images are becoming one point (spread {spread.now:.3f}, it began at "
                    f"{spread.first[0]:.2f}; 1 fills the sphere)"
                )
        if information is not None and self.steps >= self.warm + SETTLED and max(information.recent) < NO_INFORMATION:
            found["one assignment"] = (
                f"every image gets nearly the same assignment (information {information.now:.4f} of 1, it began at "
                f"{information.start:.3f})"
            )
        if self.steps >= self.warm + SETTLED and loss.high - loss.low < FLAT * size:
            found["no learning"] = (
                f"the loss has stayed at {loss.now:.4g} for {self.steps} steps: temperature or learning rate may be far "
                "too high or too low"
            )
        if loss.count and abs(loss.now) > RISEN * size:
            found["diverged"] = f"the loss has risen from {loss.start:.3g} to {loss.now:.3g}"
        return found

    def _of_network(self) -> dict[str, str]:
        found = {}
        gradient, loss = self.curves.get("grad_norm"), self.curves.get("loss")
        if gradient and loss and gradient.now > STEEP * gradient.start and loss.now > loss.start:
            found["diverged"] = f"the norm of the gradient has risen from {gradient.start:.3g} to {gradient.now:.3g}"
        if self.grown:
            found["diverged"] = (
                f"the weights had grown to {self.grown[0]:.3g} times their size after {self.grown[1]} steps, so the "
                "learning rate is far too high; lower optim.lr"
            )
        before = self.before.get("watch.rankme")
        if self.embeds and before and len(self.ranks) == 3:
            falling = self.ranks[0] > self.ranks[1] > self.ranks[2]
            if falling and self.ranks[2] < max(min(ONE_LINE, before / 2), RANK_SHARE * before):
                found["few dimensions"] = (
                    f"the features fill ever fewer dimensions (RankMe {self.ranks[2]:.1f}, before training {before:.1f})"
                )
        return found
