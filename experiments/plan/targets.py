"""The GPUs that a run can be planned for: descriptions for the compiler, and rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU.

    Attributes:
      name: the name in the driver.
      capability: compute capability, major and minor.
      cores: streaming multiprocessors.
      core_memory: bytes of shared memory a core; a block can have 1024 fewer.
      fpus: float32 units a core.
      clock_ghz, l2_bytes, memory_bytes, bandwidth: from the data sheet, for the compiler; bytes and bytes a second.
      reached_bandwidth: bytes a second that kernels of this size reach.
      flops: float operations a second that products of 24,576 x 256 x 256 and more reach, by the precision of
        their factors: "float32", "tensorfloat32" and "bfloat16".
    """

    name: str
    capability: tuple[int, int]
    cores: int
    core_memory: int
    fpus: int
    clock_ghz: float
    l2_bytes: int
    memory_bytes: int
    bandwidth: float
    reached_bandwidth: float
    flops: Mapping[str, float]

    def description(self) -> str:
        """The description for XLA's compiler, as the text of its message `GpuTargetConfigProto`."""
        major, minor = self.capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.core_memory}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth:.0f}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  shared_memory_per_block_optin: {self.core_memory - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{self.name}"
"""


# The H200's rates were measured (see experiments/PERFORMANCE.md); the rates of the others are scaled from the H200 by
# the data sheets.
TARGETS = {
    "a100": Target(
        name="NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        cores=108,
        core_memory=167_936,
        fpus=64,
        clock_ghz=1.41,
        l2_bytes=41_943_040,
        memory_bytes=42_000_000_000,
        bandwidth=1.555e12,
        reached_bandwidth=1.3e12,
        flops={"float32": 14e12, "tensorfloat32": 75e12, "bfloat16": 150e12},
    ),
    "h100": Target(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        core_memory=233_472,
        fpus=128,
        clock_ghz=1.98,
        l2_bytes=52_428_800,
        memory_bytes=84_929_347_584,
        bandwidth=3.35e12,
        reached_bandwidth=2.8e12,
        flops={"float32": 40e12, "tensorfloat32": 150e12, "bfloat16": 376e12},
    ),
    "h200": Target(
        name="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        core_memory=233_472,
        fpus=128,
        clock_ghz=1.98,
        l2_bytes=62_914_560,
        memory_bytes=150_000_000_000,
        bandwidth=4.8e12,
        reached_bandwidth=4.0e12,
        flops={"float32": 40e12, "tensorfloat32": 150e12, "bfloat16": 376e12},
    ),
}
