"""Values that every config starts from."""

# Logical axis -> mesh axes. Parameters name their logical axes where they are created; an axis
# without a rule is an error, None is replicated.
SHARDING = {
    # activations
    "batch": ("replica", "data", "fsdp"),
    "length": "context",
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "gate": None,
    "mlp": "tensor",
    "pixels": None,
    "window": None,
    "place": None,
    "code": None,
}
