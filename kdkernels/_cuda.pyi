"""The compiled extension for CUDA tensors (csrc/cuda/ops_bridge.cpp), where it was built."""

def build_info() -> dict[str, str]: ...
def device_info(index: int) -> dict[str, int]: ...
def rules(family: str) -> list[str]: ...
def scale(
    gradient: int,
    type: int,
    size: int,
    upstream: int,
    upstream_type: int,
    device: int,
    stream: int,
    /,
) -> None: ...
