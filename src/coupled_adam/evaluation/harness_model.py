"""A model as lm-eval takes it, which shows how many of a task's requests it has answered, and how long the rest takes.

Import this only where lm-eval is installed.
"""

# mypy: disable-error-code="misc,no-any-return,has-type"

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from coupled_adam.progress import Update, progress_bar


class HarnessModel(HFLM):
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._shown(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        with self._shown(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with self._shown(requests):
            return super().generate_until(requests, disable_tqdm=True)

    @contextmanager
    def _shown(self, requests: list[Instance]) -> Iterator[None]:
        name = requests[0].task_name or "requests"
        with progress_bar(name, 0, len(requests), unit="request", passing=True) as show:
            before, self.cache_hook = self.cache_hook, _Counter(show)
            try:
                yield
            finally:
                self.cache_hook = before


class _Counter(CacheHook):
    """Where lm-eval would cache an answer, which it says once for each request."""

    def __init__(self, show: Update) -> None:
        super().__init__(None)
        self.show, self.answered = show, 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.answered += 1
        self.show(self.answered)
