"""The public losses: one file a loss, holding its function, its Module and its registry row.

To add a loss, import its public names here (one line); everything else finds it in the registry.
"""

from .acceptance import AcceptanceLoss as AcceptanceLoss, acceptance_loss as acceptance_loss
from .aekt import AEKTLoss as AEKTLoss, aekt_loss as aekt_loss
from .alpha_beta import AlphaBetaLoss as AlphaBetaLoss, alpha_beta_loss as alpha_beta_loss
from .attention import (
    AttentionTransferLoss as AttentionTransferLoss,
    attention_transfer_loss as attention_transfer_loss,
)
from .dist import DISTLoss as DISTLoss, dist_loss as dist_loss
from .dkd import DKDLoss as DKDLoss, dkd_loss as dkd_loss
from .hint import HintLoss as HintLoss, hint_loss as hint_loss
from .iekd import IEKDLoss as IEKDLoss, iekd_loss as iekd_loss
from .jsd import JSDLoss as JSDLoss, jsd_loss as jsd_loss
from .kd import KDLoss as KDLoss, kd_loss as kd_loss
from .mixed_kl import MixedKLLoss as MixedKLLoss, mixed_kl_loss as mixed_kl_loss
from .pkd import PKDLoss as PKDLoss, pkd_loss as pkd_loss
from .refilled import (
    ClassCenters as ClassCenters,
    LocalClassifierLoss as LocalClassifierLoss,
    TupleMatchingLoss as TupleMatchingLoss,
    class_centers as class_centers,
    local_classifier_loss as local_classifier_loss,
    semihard_tuples as semihard_tuples,
    tuple_matching_loss as tuple_matching_loss,
)
from .reverse_kl import ReverseKLLoss as ReverseKLLoss, reverse_kl_loss as reverse_kl_loss
from .rkd import RKDLoss as RKDLoss, rkd_loss as rkd_loss
from .sampled_kl import SampledKLLoss as SampledKLLoss, sampled_kl_loss as sampled_kl_loss
from .sigmoid_dist import (
    SigmoidDISTLoss as SigmoidDISTLoss,
    sigmoid_dist_loss as sigmoid_dist_loss,
)
from .sigmoid_kd import SigmoidKDLoss as SigmoidKDLoss, sigmoid_kd_loss as sigmoid_kd_loss
from .skew_kl import SkewKLLoss as SkewKLLoss, skew_kl_loss as skew_kl_loss
from .skew_reverse_kl import (
    SkewReverseKLLoss as SkewReverseKLLoss,
    skew_reverse_kl_loss as skew_reverse_kl_loss,
)
from .topk_kd import (
    TopKKDLoss as TopKKDLoss,
    TopKMass as TopKMass,
    topk_kd_loss as topk_kd_loss,
)
from .tv import TVLoss as TVLoss, tv_loss as tv_loss
