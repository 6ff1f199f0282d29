"""The specification: plain PyTorch on any float dtype and any device, differentiable by autograd.

Row losses take (rows, classes) and return one value a row; reduction, masking, weights and the
factor T^2 are applied by ``kdkernels._reduce``. Nothing here knows about kernels.
"""
