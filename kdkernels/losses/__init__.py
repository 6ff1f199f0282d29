"""The public losses: one file a loss, holding its function, its Module and its registry row.

To add a loss, import its public names here (one line); everything else finds it in the registry.
"""

from .aekt import AEKTLoss as AEKTLoss, aekt_loss as aekt_loss
from .dist import DISTLoss as DISTLoss, dist_loss as dist_loss
from .dkd import DKDLoss as DKDLoss, dkd_loss as dkd_loss
from .kd import KDLoss as KDLoss, kd_loss as kd_loss
