"""The driver's launch configuration (``CUlaunchConfig``) of a contract."""

from __future__ import annotations

from typing import Any

from router_runtime.device import driver
from router_runtime.format.contract import Contract

#: CUlaunchConfig as the C ABI lays it out: gridDimX, Y, Z are 32-bit words 0 to 2, hStream is at
#: byte 32.
CONFIG_BYTES = 56
STREAM_WORD = 4


def launch_config(contract: Contract) -> Any:
    """A launch configuration with everything but the stream and the varying grid axes set."""
    api = driver.bindings()
    config = api.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (axis.value for axis in contract.grid)
    config.blockDimX, config.blockDimY, config.blockDimZ = contract.block
    config.sharedMemBytes = contract.dynamic_shared_memory
    kinds = api.CUlaunchAttributeID
    attributes = []
    if contract.cluster_size > 1:
        cluster = api.CUlaunchAttribute()
        cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        extents = cluster.value.clusterDim
        extents.x, extents.y, extents.z = contract.cluster
        attributes.append(cluster)
    if contract.programmatic_dependent_launch:
        serial = api.CUlaunchAttribute()
        serial.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        serial.value.programmaticStreamSerializationAllowed = 1
        attributes.append(serial)
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config
