"""The compiled extension for CUDA tensors (csrc/cuda/ops_bridge.cpp), where it was built."""

from ._calls import CorrelationCall, RowCall

def build_info() -> dict[str, str]: ...
def driver() -> str: ...
def device_info(index: int) -> dict[str, int]: ...
def rules(family: str) -> list[str]: ...

# By address, as their namesakes in _C.pyi, and where: device index and stream.

def row(
    student: int,
    teacher: int,
    gradient: int,
    of_rows: tuple[int, int, int, int],
    loss: int,
    parts: int,
    student_type: int,
    teacher_type: int,
    rows: int,
    classes: int,
    call: RowCall,
    device: int,
    stream: int,
    /,
) -> None: ...
def correlation(
    student: int,
    teacher: int,
    gradient: int,
    counted: int,
    loss: int,
    student_type: int,
    teacher_type: int,
    rows: int,
    classes: int,
    call: CorrelationCall,
    device: int,
    stream: int,
    /,
) -> None: ...
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
