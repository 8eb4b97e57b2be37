"""What the plug-in learns from live steps: the performance model and its corrections.

The *reference* is pinned once, from the profile file or, on a bare server, from the first fit of live
steps: slowdown SLOs are defined by it and it never moves. The *model* that plans are made with is the
reference under a slow online correction, with margins that follow the evidence.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.core.fit import OnlineCorrection, StepSample, fit_perf_model
from slos_serve.core.perf import PerfModel
from slos_serve.records.profile import Profile, profile_document
from slos_serve.records.writer import BatchShape

logger = logging.getLogger("vllm.slos_serve")

FIT_STEPS = 200
KEPT_STEPS = 4000


def read_profile(path: Path, key: str) -> Profile:
    """Read a profile file; `ValueError` says why it cannot be used by the engine of `key` ("": by any)."""
    profile = Profile.load(path)
    if key and key != profile.key:
        raise ValueError(f"it was made for {profile.key!r}, this engine is {key!r}")
    return profile


class Learner:
    """Hold the reference and the corrected model; None until there is one.

    `poll` may run on another thread; everything else belongs to the scheduler's thread. A new model is
    handed over through `take_new`.
    """

    def __init__(self, *, path: Path | None, key: str) -> None:
        self.path = path
        self.key = key
        self.profile: Profile | None = None
        self.reference: PerfModel | None = None
        self.correction: OnlineCorrection | None = None
        self.num_steps = 0
        self.error_sum = 0.0
        self.num_errors = 0.0
        self._samples: deque[StepSample] = deque(maxlen=KEPT_STEPS)
        self._lock = threading.Lock()
        self._new: Profile | None = None
        self._is_done = False
        self._tried: tuple[int, int] | None = None
        self._fit_at = FIT_STEPS

    @property
    def full_key(self) -> str:
        """What a profile in use is valid for, as text."""
        return self.key or (self.profile.key if self.profile is not None else "null")

    def poll(self) -> None:
        """Load the profile if it has come, or fit live steps if there are enough and no file is awaited."""
        if self._is_done:
            return
        found = self._load() if self.path is not None else self._fit()
        if found is not None:
            with self._lock:
                self._new, self._is_done = found, True

    def _load(self) -> Profile | None:
        assert self.path is not None
        try:
            status = self.path.stat()
            seen = (status.st_mtime_ns, status.st_size)
            if seen == self._tried:
                return None
            self._tried = seen
            return read_profile(self.path, self.key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("slos-serve: profile %s is ignored: %s", self.path, error)
            return None

    def _fit(self) -> Profile | None:
        with self._lock:
            if len(self._samples) < self._fit_at:
                return None
            samples = list(self._samples)
        self._fit_at *= 2  # if it fails, only with twice the evidence again
        try:
            report = fit_perf_model(samples, rng=np.random.default_rng(0))
        except ValueError as error:
            logger.info("slos-serve: %d live steps do not make a performance model yet: %s", len(samples), error)
            return None
        return Profile.from_json(profile_document(report, key="live"), where="live steps")

    def take_new(self) -> bool:
        """Start to use a model that `poll` found; tell whether there was one."""
        if self._new is None:
            return False
        with self._lock:
            found, self._new = self._new, None
        assert found is not None
        self.profile, self.reference = found, found.perf_model
        self.correction = OnlineCorrection(self.reference)
        return True

    @property
    def model(self) -> PerfModel | None:
        """The corrected model that plans are made with."""
        return None if self.correction is None else self.correction.model

    @property
    def next_model(self) -> PerfModel | None:
        """The model that the next plan will be made with; an idle engine has not taken up what `poll` found."""
        new = self._new
        return self.model if new is None else new.perf_model

    def predict(self, shape: BatchShape) -> float | None:
        """Return the expected time of a batch, in seconds, None without a model."""
        model = self.model
        if model is None:
            return None
        return model.seconds(
            shape.num_tokens,
            shape.num_requests,
            context_tokens=shape.context_tokens,
            draft_steps=shape.draft_steps,
            attention_pairs=shape.attention_pairs,
        )

    def margin(self, shape: BatchShape) -> float:
        """Return the factor that plans put on the expected time of such a batch."""
        model = self.model
        if model is None:
            return 1.0
        return model.margin_prefill if shape.has_prefill else model.margin_decode

    def observe(self, shape: BatchShape, seconds: float, predicted_s: float | None) -> None:
        """Learn from one measured step."""
        self.num_steps += 1
        sample = StepSample(
            num_tokens=shape.num_tokens,
            num_requests=shape.num_requests,
            context_tokens=shape.context_tokens,
            draft_steps=shape.draft_steps,
            attention_pairs=shape.attention_pairs,
            has_prefill=shape.has_prefill,
            seconds=seconds,
        )
        if self.correction is not None:
            self.correction.observe(sample)
            if predicted_s:
                self.error_sum = self.error_sum * 0.999 + abs(seconds - predicted_s) / seconds
                self.num_errors = self.num_errors * 0.999 + 1
        elif self.path is None:
            with self._lock:
                self._samples.append(sample)

    @property
    def num_steady(self) -> int:
        """How many steps may be observed, the last of which may change `model`."""
        return FIT_STEPS if self.correction is None else self.correction.num_steady

    @property
    def is_settled(self) -> bool:
        """Tell whether the model is in use, and none is about to be."""
        return self.correction is not None and self._new is None

    @property
    def has_model(self) -> bool:
        """Tell whether there is a model, in use or about to be."""
        return self._is_done

    @property
    def summary(self) -> dict[str, Any] | None:
        """Return what is known about the profile, without its coefficients; None before there is one."""
        new = self._new
        profile = self.profile if new is None else new
        if profile is None:
            return None
        names = ("key", "r2", "mape_heldout", "margin_coverage", "num_steps", "longest_context", "created")
        return {name: profile.document.get(name) for name in (*names, "max_num_batched_tokens")}

    @property
    def mape(self) -> float | None:
        """Recent mean of |measured - predicted| / measured, None without a model."""
        return self.error_sum / self.num_errors if self.num_errors else None

    @property
    def coverage(self) -> float | None:
        """Share of steps that took no longer than predicted with margin, None without evidence."""
        return None if self.correction is None or not self.num_errors else self.correction.coverage
