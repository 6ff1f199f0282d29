"""Losses of torch operations with their gradient written out, for CPU tensors in eager mode.

A file here exists where the reference under autograd is much slower than its compiled form; the
hint's and RKD's are not. Autograd keeps tensors of the size of the features and reads them again;
these pass over blocks that stay in the cache, and write the gradient in the forward pass (see
``_autograd``).

Each function takes (student, teacher, scale, reduction, need_gradient) in the working dtype, the
reduction as its code, and returns the loss, 0-d, and its gradient or None.
"""
