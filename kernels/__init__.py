"""The Triton kernels, installed as ``gpt2fast.kernels``. Importing this package does not import Triton."""

# Maps each op to the file that holds its kernel. Ops that share a formula share a file.
MODULES = dict(
    embedding="embedding",
    embedding_backward="embedding",
    gelu="gelu",
    bias_gelu="gelu",
    gelu_backward="gelu",
    layer_norm="layer_norm",
    add_layer_norm="layer_norm",
    layer_norm_backward="layer_norm",
    attention="attention",
    attention_backward="attention_backward",
    cross_entropy="cross_entropy",
    decode_attention="decode_attention",
    cross_entropy_backward="cross_entropy",
    linear="linear",
    linear_backward="linear",
    mlp_backward="mlp",
    sample="sample",
    adamw_="adamw_",
    gradient_norm="gradient_norm",
    linear_cross_entropy="linear_cross_entropy",
    linear_cross_entropy_backward="linear_cross_entropy",
)
