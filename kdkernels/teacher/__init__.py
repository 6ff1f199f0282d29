"""Teachers that never enter training memory: top-k, sampled, hidden states.

from kdkernels.teacher import TopKTeacher, top_k
"""

from .linear import LinearTeacher as LinearTeacher
from .sparse import TopKTeacher as TopKTeacher
from .targets import sampled as sampled, top_k as top_k

__all__ = ["LinearTeacher", "TopKTeacher", "sampled", "top_k"]
