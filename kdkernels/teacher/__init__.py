"""Teachers that never enter training memory: top-k, sampled, hidden states, caches on disk.

    from kdkernels.teacher import CacheWriter, open_cache, top_k

Nothing here imports safetensors until a cache is written or opened.
"""

from .._ensemble import EnsembleTeacher as EnsembleTeacher
from .batches import (
    CachedSequence as CachedSequence,
    TeacherBatch as TeacherBatch,
    collate as collate,
)
from .importers import from_trl as from_trl, from_vllm as from_vllm
from .linear import LinearTeacher as LinearTeacher
from .reader import TeacherCache as TeacherCache, open_cache as open_cache
from .sparse import TopKTeacher as TopKTeacher
from .targets import sampled as sampled, top_k as top_k
from .writer import CacheWriter as CacheWriter

__all__ = [
    "CacheWriter",
    "CachedSequence",
    "EnsembleTeacher",
    "LinearTeacher",
    "TeacherBatch",
    "TeacherCache",
    "TopKTeacher",
    "collate",
    "from_trl",
    "from_vllm",
    "open_cache",
    "sampled",
    "top_k",
]
