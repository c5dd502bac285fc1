"""The learned cost models: gradient-boosted trees on a program's features, and on the knobs alone.

TVM's own XGBModel trains up to 10,000 rounds with a Python callback in each, draws its warm-up predictions from
numpy's global generator, and ignores the tree method it is given (docs/tvm.md). These train a fixed number of rounds
on one thread, and are deterministic for a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvmlab.compat import load_meta_schedule

__all__ = ["CostModel", "KnobModel"]

_ROUNDS = 60
_PARAMETERS = {
    "max_depth": 6,
    "eta": 0.2,
    "min_child_weight": 0,
    "gamma": 1e-3,
    "tree_method": "hist",
    "nthread": 1,
    "verbosity": 0,
}


class CostModel:
    """Predicts how close a program comes to the best one of its task (0 to 1), after Ansor section 5.2.

    The features are TVM's per-store features: their sum over the program, and those of the store with the most
    arithmetic. One model serves all tasks of a run. It predicts noise until `warm_up` programs were measured.
    """

    def __init__(self, seed: int, warm_up: int = 32) -> None:
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._warm_up = warm_up
        self._features: dict[str, list[Any]] = {}
        self._latencies: dict[str, list[float]] = {}
        self._booster: Any = None
        self._trained_on = 0
        self._extractor: Any = None

    @property
    def trained(self) -> bool:
        """Whether predictions are more than noise."""
        return self._booster is not None

    def features(self, context: Any, candidates: Sequence[Any]) -> list[Any]:
        """One float32 row for each of TVM's MeasureCandidates of one task: what `update` and `predict` take.

        Extraction takes about 10 ms each, so a caller keeps the rows of what it proposes until it is measured.
        """
        if self._extractor is None:
            meta_schedule = load_meta_schedule()
            self._extractor = meta_schedule.feature_extractor.PerStoreFeature()
        rows = []
        for found in self._extractor.extract_from(context, candidates):
            stores = found.numpy().astype("float32")
            heaviest = stores[stores[:, :16].sum(axis=1).argmax()]
            rows.append(np.concatenate([stores.sum(axis=0), heaviest]))
        return rows

    def update(self, task_key: str, rows: Sequence[Any], latencies_s: Sequence[float | None]) -> None:
        """Learn measured programs of a task; a failed one has latency None."""
        self._features.setdefault(task_key, []).extend(rows)
        self._latencies.setdefault(task_key, []).extend(np.inf if s is None else s for s in latencies_s)
        known = sum(map(len, self._latencies.values()))
        # Training costs grow with the data, its use with each batch falls: retrain when a tenth more is known.
        if known >= self._warm_up and known - self._trained_on >= self._trained_on / 10:
            features = np.array([row for rows in self._features.values() for row in rows])
            scores = np.concatenate([_scores(np.array(values)) for values in self._latencies.values()])
            self._booster = _train(features, scores, self._seed)
            self._trained_on = known

    def predict(self, rows: Sequence[Any]) -> Any:
        """Scores, float64 array of shape (len(rows),); higher is faster."""
        if self._booster is None:
            return self._rng.random(len(rows))
        return _predict(self._booster, np.array(rows))


class KnobModel:
    """Predicts how close a point of one task's space comes to the task's best, from its knobs alone.

    AutoTVM's cost model on knob features (Chen et al., "Learning to Optimize Tensor Programs", NeurIPS 2018).
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._features: list[Any] = []
        self._latencies: list[float] = []
        self._booster: Any = None

    def add(self, features: Any, latency_s: float | None) -> None:
        """Learn one measured point; a failed one has latency None."""
        self._features.append(features)
        self._latencies.append(np.inf if latency_s is None else latency_s)
        self._booster = None

    def predict(self, features: Any) -> Any:
        """Scores of shape (n,) for features of shape (n, width); 1 for every point while nothing is known."""
        if not self._features:
            return np.ones(len(features))
        if self._booster is None:
            self._booster = _train(np.array(self._features), _scores(np.array(self._latencies)), self._seed)
        return _predict(self._booster, features)


def _train(features: Any, scores: Any, seed: int) -> Any:
    import xgboost

    data = xgboost.DMatrix(features, label=scores, weight=np.maximum(scores, 0.05), nthread=1)
    return xgboost.train({**_PARAMETERS, "seed": seed}, data, num_boost_round=_ROUNDS)


def _predict(booster: Any, features: Any) -> Any:
    import xgboost

    # By default a matrix is copied by all threads, which takes 10 ms beside processes that use the cores, not 0.1.
    return booster.predict(xgboost.DMatrix(features, nthread=1)).astype("float64")


def _scores(latencies: Any) -> Any:
    """Best over each: 1 for the task's best program, 0 for a failed one."""
    best = latencies.min()
    return np.zeros_like(latencies) if np.isinf(best) else best / latencies
