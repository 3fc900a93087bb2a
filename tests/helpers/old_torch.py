"""What older versions of torch cannot do, whoever's optimizer steps."""

import pytest
import torch

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

compiles_clipped_steps = pytest.mark.skipif(
    VERSION < (2, 11), reason="the compilers of torch 2.8 to 2.10 do not take the norm of a clipped or sharded step"
)
keeps_masks = pytest.mark.skipif(
    VERSION < (2, 9), reason="an embedding under tensor parallelism in torch 2.8 may lose the mask of its own tokens"
)
tells_errors_of_compiled_steps = pytest.mark.skipif(
    VERSION < (2, 11), reason="the compilers of torch 2.8 to 2.10 say of an error only that there was one"
)
averages_gradients = pytest.mark.skipif(
    VERSION < (2, 9), reason="on gloo the fully_shard of torch 2.8 sums gradients over the ranks, not averages them"
)
