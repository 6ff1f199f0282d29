"""The compiled extension (csrc/bindings.cpp); a pure-Python installation has none."""

from ._calls import CorrelationCall, RowCall, TopKCall

def build_info() -> dict[str, str]: ...
def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def rules(family: str) -> list[str]: ...

# The choices of csrc/cuda/plan.cpp, without a GPU; dtype codes as below.

def cuda_row_plan(
    rows: int,
    classes: int,
    dtype: int,
    dense: bool,
    alike: bool,
    aligned: bool,
    adjacent: bool,
    plain: bool,
    arch: int,
    multiprocessors: int,
    block_shared: int,
    most_cluster: int,
) -> dict[str, int]: ...
def cuda_correlation_plan(
    rows: int,
    classes: int,
    dtype: int,
    dense: bool,
    aligned: bool,
    adjacent: bool,
    plain: bool,
    run: int,
    arch: int,
    multiprocessors: int,
    block_shared: int,
    most_cluster: int,
) -> dict[str, int]: ...

# By address: what is absent is 0; dtype codes are those of csrc/problem.h.

def row(
    student: int,
    teacher: int,
    gradient: int,
    of_rows: tuple[int, int, int, int],  # addresses of the family's other constants
    loss: int,
    parts: int,
    student_type: int,
    teacher_type: int,
    rows: int,
    classes: int,
    call: RowCall,
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
    /,
) -> None: ...
def topk_loss(
    student: int,
    gradient: int,
    ids: int,
    buckets: int,
    of_rows: tuple[int, int, int, int],
    loss: int,
    parts: int,
    student_type: int,
    rows: int,
    classes: int,
    k: int,
    rows_call: TopKCall,
    call: RowCall,
    /,
) -> None: ...
