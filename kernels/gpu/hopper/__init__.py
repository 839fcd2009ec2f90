"""Attention to long ranges of keys on a Hopper GPU, in Gluon: a warp that loads beside warps that compute.

Same results as the kernels in Triton beside this folder, which serve every other GPU, dtype, head size and visibility;
`launch.handles` says what these take.  In each program one warp copies tiles from memory into a ring of shared memory
(`ring.py`), and two warpgroups of 64 rows each take them from there.  While one computes exponentials the other's
matrix products run; Triton, given the same loop, waits for each product.

* forward.py: the softmax over the compressed keys, as in FlashAttention-3 (arXiv 2407.08608);
* query_gradient.py, key_gradient.py: its gradients, the latter for windows too.

Keys are those of `flash.py` with LENGTH and STRIDE: key i stands for the tokens [i·STRIDE, i·STRIDE + LENGTH).
"""
