"""Calls of the kernels in csrc/cuda with torch's tensors. Nothing is imported here.

Each file allocates the outputs, passes pointers, sizes and strides to a launcher, and says which calls it covers. The
kernels themselves, and how they split the work, are in csrc/cuda.
"""

# From an op to the file that calls its kernel. An op and its gradients often share a file.
MODULES = dict(
    attention="attention",
    attention_backward="attention_backward",
    cross_entropy="cross_entropy",
    cross_entropy_backward="cross_entropy",
    decode_attention="decode_attention",
    embedding="embedding",
    embedding_backward="embedding",
    gelu="gelu",
    bias_gelu="gelu",
    gelu_backward="gelu",
    layer_norm="layer_norm",
    add_layer_norm="layer_norm",
    layer_norm_backward="layer_norm",
    linear="linear",
    linear_backward="linear",
    linear_cross_entropy="linear_cross_entropy",
    linear_cross_entropy_backward="linear_cross_entropy",
    mlp_backward="mlp",
    adamw_="adamw_",
    gradient_norm="gradient_norm",
    sample="sample",
)
