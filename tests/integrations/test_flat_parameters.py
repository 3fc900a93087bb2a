"""FSDP1, whose flat parameters have no vocabulary, is refused with the remedy, whenever the optimizer is built."""

import re
from typing import Any

import flat_jobs
import pytest


@pytest.mark.long  # to start processes
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_with_the_remedy(use_orig_params: bool, processes: Any) -> None:
    for told in processes(2).run(flat_jobs.told_by_fsdp1, use_orig_params):
        assert len(told) == 3 + use_orig_params
        for name in ("model", "name"):
            assert re.search(r"lm_head|Linear", told[name]) and "FSDP1" in told[name] and "FSDP2" in told[name]
        if use_orig_params:
            assert re.search(r"'lm_head.weight' was flattened .*FSDP1.*Use FSDP2", told["step"])
        assert re.search("FSDP1.*gather", told["health"])
