"""A space of knobs without TVM: every point is valid, except where a tile's innermost part is 32 or more."""

import hashlib
import json

from tvmlab.core import Candidate
from tvmlab.spaces.encoding import Encoding
from tvmlab.spaces.knobs import Choice, Tile

KNOBS = (Tile(128, 4, 64), Tile(56, 4, 64), Tile(64, 2, 64), Choice(4))


class FakeSpace:
    """What Evolution uses of a SketchSpace, over `sketches` copies of the same knobs."""

    task_key = "f" * 16
    context = None

    def __init__(self, knobs=KNOBS, sketches=2):
        self._knobs = knobs
        self._sketches = sketches
        self.applied = 0

    def __len__(self):
        return self._sketches

    def random(self, sketch, rng):
        return sketch, [knob.random(rng) for knob in self._knobs]

    def mutate(self, point, rng):
        sketch, decisions = point
        changed = list(decisions)
        position = int(rng.integers(len(changed)))
        changed[position] = self._knobs[position].mutate(changed[position], rng)
        return sketch, changed

    def twins(self, point):
        sketch, decisions = point
        return [(other, list(decisions)) for other in range(self._sketches) if other != sketch]

    def encode(self, points):
        return Encoding([self._knobs] * self._sketches).encode(points)

    def realize(self, point):
        self.applied += 1
        sketch, decisions = point
        if any(isinstance(value, list) and value[-1] >= 32 for value in decisions):
            return None
        text = json.dumps(point)
        return Candidate(self.task_key, hashlib.sha256(text.encode()).hexdigest()[:16], sketch, decisions, text)

    def sample(self, sketch, rng):
        for _ in range(20):
            found = self.realize(self.random(sketch, rng))
            if found is not None:
                return found
        return None

    def replay(self, trace):
        return self.realize(tuple(json.loads(trace)))


class NoCostModel:
    """Stands for the model on program features, which a space without programs cannot feed."""

    trained = False

    def features(self, context, candidates):
        return [candidate.key for candidate in candidates]

    def update(self, task_key, rows, latencies_s):
        assert len(rows) == len(latencies_s)
