"""The kernels of csrc/cuda for torch's tensors, one file an op. Nothing is imported here."""

# By op the file that calls its kernel; ops of one formula share a file.
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
