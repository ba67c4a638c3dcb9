"""One process of vLLM, without a GPU: a configuration and groups of one rank. ``make test-engines``
runs these tests, in an environment of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM's layers need of the process that they are made in."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    rendezvous: Path = tmp_path_factory.mktemp("ranks") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{rendezvous}",
            local_rank=0,
            backend="gloo",
        )
        parallel_state.initialize_model_parallel(1, 1)
        with torch.no_grad():
            yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
