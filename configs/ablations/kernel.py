"""The kernel of the sparse operator: one number per channel and tap, or a matrix over channels per tap.

Published for FFHQ-128: FID_CLIP 4.75 depthwise, 5.63 with matrices.
"""


def get_variants(base):
    return {"depthwise": {"model.depthwise_sparse": True}, "full": {"model.depthwise_sparse": False}}
